"""The decode loop against llama.cpp and ONNX Runtime GenAI, and against the floor that the memory sets, in one run.

    python -m intertitle.benchmarks.decode_peers --peer-python PEERS/bin/python --genai-model GENAI

Peers live in an environment of their own (their ONNX Runtime is not ours): ``pip install gguf llama-cpp-python
onnxruntime-genai onnx``. The GenAI model is what its own builder makes of a Hugging Face Qwen2 checkpoint of the shape
(``python -m onnxruntime_genai.models.builder -i HF -o GENAI -p int4 -e cpu -c CACHE --extra_options
int4_block_size=32 int4_accuracy_level=4``); it is left out where no model is given. llama.cpp's is written here: random
Q4_0 weights of the same shape, token table and output head included. Weights are random everywhere and every contestant
makes the same number of steps after a prompt of the same length.

The floor: bytes of weights that a step reads over the read bandwidth, measured in every round with ``memchr`` on one
thread a core over 640 MiB.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from ..export.compile import compile_bundle
from ..models.random_checkpoint import write_checkpoint
from ..runtime.bundle import Bundle
from ..runtime.ort import OrtDecoder
from .decode import captioner_loop
from .harness import alternate, paired_ratio, write_result

WORKER = Path(__file__).parent / "peers" / "worker.py"
#: Several times any cache that a machine of two cores has to itself.
_READ_BYTES = 640 << 20
#: Qwen2-0.5B, as worker.py wants it.
_SHAPE = {
    "vocab_size": 151936,
    "context_length": 32768,
    "hidden_size": 896,
    "num_layers": 24,
    "intermediate_size": 4864,
    "num_heads": 14,
    "num_kv_heads": 2,
}


class Peer:
    """A worker process that times its own decode loop."""

    def __init__(self, python: Path, kind: str, model: Path, threads: int) -> None:
        command = [str(python), str(WORKER), kind, str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.about = json.loads(self._answer())

    def seconds_per_token(self, prompt: int, tokens: int) -> float:
        """Ask for one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())["seconds"]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended with exit code {self._process.wait()}")
        return line


def read_bandwidth(threads: int) -> Callable[[], float]:
    """A function that measures bytes a second read by ``threads`` threads, the best of three passes."""
    libc = ctypes.CDLL(None)
    libc.memchr.restype, libc.memchr.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    parts = [np.ones(_READ_BYTES // threads, np.uint8) for _ in range(threads)]
    executor = ThreadPoolExecutor(threads)

    def measure() -> float:
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            list(executor.map(lambda part: libc.memchr(part.ctypes.data, 7, part.nbytes), parts))
            best = min(best, time.perf_counter() - started)
        return _READ_BYTES / best

    return measure


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--peer-python",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="A Python in which the peers are installed.",
)
@click.option(
    "--genai-model", type=click.Path(path_type=Path, exists=True), help="The model that GenAI's builder wrote."
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint; it is made there if it is missing."
)
@click.option("--gguf", type=click.Path(path_type=Path), help="llama.cpp's model; it is made there if it is missing.")
@click.option(
    "--block-size",
    "block_sizes",
    type=int,
    multiple=True,
    default=(32, 128),
    show_default=True,
    help="Block sizes to measure; repeatable.",
)
@click.option("--prompt-tokens", default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=32, show_default=True, help="New tokens of each measurement.")
@click.option("--rounds", default=7, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="decode-peers", show_default=True, help="The name of the file in results/.")
def main(
    peer_python: Path,
    genai_model: Path | None,
    checkpoint: Path | None,
    gguf: Path | None,
    block_sizes: tuple[int, ...],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    result: str,
) -> None:
    """Measure seconds per token of every contestant, and the bandwidth."""
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = checkpoint or Path(scratch) / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, "0.5b")
        contestants: dict[str, Callable[[], float]] = {}
        weight_bytes: dict[str, int] = {}
        for size in block_sizes:
            path = compile_bundle(checkpoint, Path(scratch) / f"b{size}", weights="int4", block_size=size).path
            bundle = Bundle.open(path)
            spec, graph = bundle.manifest.decoder, bundle.file(bundle.manifest.components["decoder"].graph)
            decoder = OrtDecoder(graph, spec, bundle.embed)
            prompt = np.random.default_rng(0).standard_normal((prompt_tokens, spec.hidden_size)).astype(np.float32)
            contestants[f"intertitle_{size}"] = lambda d=decoder, p=prompt * 0.02: captioner_loop(d, p, tokens)
            # Rotary tables are in the file as well, but a step reads two rows of them.
            tables = 4 * spec.context_length * spec.head_dim
            weight_bytes[f"intertitle_{size}"] = bundle.manifest.files[f"{graph.name}.data"].size - tables
        gguf = gguf or Path(scratch) / "model.gguf"
        if not gguf.exists():
            made = subprocess.run(
                [str(peer_python), str(WORKER), "gguf", str(gguf), json.dumps(_SHAPE)], capture_output=True, check=True
            )
            weight_bytes["llama_cpp"] = json.loads(made.stdout)["weight_bytes"]
        peers = {"llama_cpp": Peer(peer_python, "llama", gguf, threads)}
        if genai_model is not None:
            peers["onnxruntime_genai"] = Peer(peer_python, "genai", genai_model, threads)
        for name, peer in peers.items():
            contestants[name] = lambda peer=peer: peer.seconds_per_token(prompt_tokens, tokens)
        measured = alternate({**contestants, "bandwidth": read_bandwidth(threads)}, rounds)
        bandwidth = measured.pop("bandwidth")
        own = f"intertitle_{block_sizes[0]}"
        figures = {
            "shape": "Qwen2-0.5B decoder, output head included, 4-bit weights",
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "rounds": rounds,
            "threads": threads,
            "weight_bytes": weight_bytes,
            "tokens_per_second": {name: round(1 / statistics.median(v), 2) for name, v in measured.items()},
            "tokens_per_second_over_peer": {
                mine: {peer: paired_ratio(measured[peer], measured[mine]) for peer in peers}
                for mine in measured
                if mine not in peers
            },
            "read_gigabytes_per_second": round(statistics.median(bandwidth) / 1e9, 2),
            "share_of_floor": {
                name: paired_ratio([size / b for b in bandwidth], measured[name]) for name, size in weight_bytes.items()
            },
            "peers": {name: peer.about for name, peer in peers.items()},
            "seconds_per_token": measured,
            "bandwidth": bandwidth,
        }
    path = write_result(result, figures, "python -m intertitle.benchmarks.decode_peers --peer-python … --genai-model …")
    click.echo(f"{own}: {figures['tokens_per_second']}\n{figures['tokens_per_second_over_peer']}")
    click.echo(f"share of the floor: {figures['share_of_floor']}\n{path}")


if __name__ == "__main__":
    main()
