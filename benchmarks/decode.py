"""The decode loop against its peers, at a Qwen2-0.5B decoder shape with random weights, as ratios in one run.

captioner  the runtime's own loop: embedding look-up, one step, repetition penalty, arg-max, log-probability
bare       the same session and bindings alike, ``run_with_iobinding`` and nothing else: what ONNX Runtime alone allows
           (two sessions of one graph differ by up to 12 %, so they share one)
           (bare_small_pages: another session, its weights on pages of 4 KiB)
torch      transformers' Qwen2 in bfloat16, eager, with its own cache
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from ..contract.records import DecoderShape
from ..export.compile import compile_bundle
from ..models import open_checkpoint
from ..models.config import DecoderConfig
from ..models.random_checkpoint import write_checkpoint
from ..runtime.bundle import Bundle
from ..runtime.decoding import Settings, TokenSearch, generate
from ..runtime.ort import OrtDecoder, open_session
from .harness import alternate, paired_ratio, write_result

REPETITION_PENALTY = 1.05


def captioner_loop(decoder: OrtDecoder, prompt: np.ndarray, tokens: int) -> float:
    """Seconds a token of ``runtime.decoding.generate`` after the prompt."""
    inference = decoder.open(1, len(prompt) + tokens + 1)
    logits = inference.prefill(0, prompt)[0].copy()
    settings = Settings(max_new_tokens=tokens + 1, repetition_penalty=REPETITION_PENALTY, eos_token_ids=())
    generated = generate(inference, logits, TokenSearch(settings))
    next(generated)  # comes from the prompt's logits, without a step
    started = time.perf_counter()
    for _ in generated:
        pass
    return (time.perf_counter() - started) / tokens


def bare_loop(session, spec: DecoderShape, prompt: np.ndarray, tokens: int) -> float:
    """Seconds a token of bare runs: fixed inputs, the lengths counted up, outputs ignored."""
    import onnxruntime

    value_of = onnxruntime.OrtValue.ortvalue_from_numpy
    length = len(prompt)
    shape = (1, spec.num_kv_heads, length + tokens + 1, spec.head_dim)
    cache = {f"{i}.{part}": np.zeros(shape, np.float32) for i in range(spec.num_layers) for part in ("key", "value")}

    def bind(embeds: np.ndarray):
        arrays = {
            "inputs_embeds": embeds[np.newaxis],
            "lengths": np.array([len(embeds) - 1], np.int32),
            "total_length": np.array(len(embeds), np.int32),
            "logits_index": np.array([[len(embeds) - 1]]),
            "logits": np.empty((1, 1, spec.vocab_size), np.float32),
        }
        binding = session.io_binding()
        values = {name: value_of(array) for name, array in arrays.items()}
        for name in ("inputs_embeds", "lengths", "total_length", "logits_index"):
            binding.bind_ortvalue_input(name, values[name])
        binding.bind_ortvalue_output("logits", values["logits"])
        for name, buffer in cache.items():
            value = values[name] = value_of(buffer)
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding, arrays, values

    binding, arrays, values = bind(prompt)
    session.run_with_iobinding(binding)
    binding, arrays, values = bind(prompt[-1:])
    started = time.perf_counter()
    for step in range(tokens):
        arrays["lengths"][0] = length + step
        arrays["total_length"][...] = length + step + 1
        session.run_with_iobinding(binding)
    del values
    return (time.perf_counter() - started) / tokens


class TorchEager:
    """transformers' Qwen2 of the same shape in bfloat16."""

    def __init__(self, d: DecoderConfig) -> None:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=d.vocab_size,
            hidden_size=d.hidden_size,
            intermediate_size=d.intermediate_size,
            num_hidden_layers=d.num_layers,
            num_attention_heads=d.num_heads,
            num_key_value_heads=d.num_kv_heads,
            tie_word_embeddings=False,
        )
        self._torch = torch
        self._model = Qwen2ForCausalLM(config).bfloat16().eval()

    def seconds_per_token(self, prompt: np.ndarray, tokens: int) -> float:
        """Greedy steps after a prompt given as embeddings."""
        torch, model = self._torch, self._model
        with torch.no_grad():
            out = model(
                inputs_embeds=torch.from_numpy(prompt)[None].to(torch.bfloat16), use_cache=True, logits_to_keep=1
            )
            started = time.perf_counter()
            for _ in range(tokens):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            return (time.perf_counter() - started) / tokens


@click.command()
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint; it is made there if it is missing."
)
@click.option("--prompt-tokens", default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=64, show_default=True, help="New tokens of each measurement.")
@click.option("--rounds", default=7, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="decode-0.5b", show_default=True, help="The name of the file in results/.")
def main(checkpoint: Path | None, prompt_tokens: int, tokens: int, rounds: int, result: str) -> None:
    """Measure seconds per decoded token of each loop."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = checkpoint or Path(scratch) / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, "0.5b")
        compiled = compile_bundle(checkpoint, Path(scratch) / "bundle", weights="int4")
        bundle = Bundle.open(compiled.path)
        spec, graph = bundle.manifest.decoder, bundle.file(bundle.manifest.components["decoder"].graph)
        decoder = OrtDecoder(graph, spec, bundle.embed)
        small_pages = open_session(graph)
        torch_eager = TorchEager(open_checkpoint(checkpoint).config.decoder)
        prompt = np.random.default_rng(0).standard_normal((prompt_tokens, spec.hidden_size)).astype(np.float32) * 0.02
        seconds = alternate(
            {
                "captioner": lambda: captioner_loop(decoder, prompt, tokens),
                "bare": lambda: bare_loop(decoder.session, spec, prompt, tokens),
                "bare_small_pages": lambda: bare_loop(small_pages, spec, prompt, tokens),
                "torch_bf16_eager": lambda: torch_eager.seconds_per_token(prompt, tokens),
            },
            rounds,
        )
        figures = {
            "shape": "Qwen2-0.5B decoder, int4 block 32 incl. output head",
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "rounds": rounds,
            "decoder_bytes": sum(bundle.manifest.files[name].size for name in (graph.name, f"{graph.name}.data")),
            "tokens_per_second": {name: round(1 / statistics.median(values), 2) for name, values in seconds.items()},
            "captioner_over_bare": paired_ratio(seconds["bare"], seconds["captioner"]),
            "bare_over_small_pages": paired_ratio(seconds["bare_small_pages"], seconds["bare"]),
            "captioner_over_torch_bf16_eager": paired_ratio(seconds["torch_bf16_eager"], seconds["captioner"]),
            "seconds_per_token": seconds,
        }
    path = write_result(result, figures, "python -m intertitle.benchmarks.decode")
    for name in (
        "tokens_per_second",
        "captioner_over_bare",
        "bare_over_small_pages",
        "captioner_over_torch_bf16_eager",
    ):
        click.echo(f"{name}: {figures[name]}")
    click.echo(path)


if __name__ == "__main__":
    main()
