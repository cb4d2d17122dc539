"""A peer's decode loop behind a pipe. Run by the peers' Python, which has no intertitle.

``worker.py gguf OUT SHAPE`` writes a random Q4_0 model and prints its bytes; ``worker.py llama MODEL THREADS`` and
``worker.py genai MODEL THREADS`` load a model, print one line of JSON about themselves, then answer each line
``{"prompt": P, "tokens": N}`` with ``{"seconds": ...}``: the seconds per token of N greedy steps after P tokens.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

_ROWS = 8192


def write_gguf(path: str, shape: dict[str, int]) -> int:
    """A Qwen2 model of random Q4_0 weights, output head and token table included, without a tokenizer.

    Returns the bytes of weights that a step reads: everything but the table, of which it reads one row.
    """
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["context_length"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)
    counted = 0

    def matrix(name: str, rows: int, columns: int) -> None:
        nonlocal counted
        parts = []
        for start in range(0, rows, _ROWS):
            part = rng.standard_normal((min(_ROWS, rows - start), columns), np.float32) * np.float32(0.02)
            parts.append(gguf.quantize(part, gguf.GGMLQuantizationType.Q4_0))
        packed = np.concatenate(parts)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        counted += packed.nbytes if name != "token_embd.weight" else 0

    def vector(name: str, size: int, mean: float) -> None:
        nonlocal counted
        writer.add_tensor(name, (mean + 0.02 * rng.standard_normal(size)).astype(np.float32))
        counted += 4 * size

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    dim = hidden // shape["num_heads"]
    kv = dim * shape["num_kv_heads"]
    matrix("token_embd.weight", shape["vocab_size"], hidden)
    vector("output_norm.weight", hidden, 1.0)
    matrix("output.weight", shape["vocab_size"], hidden)
    for layer in range(shape["num_layers"]):
        at = f"blk.{layer}"
        vector(f"{at}.attn_norm.weight", hidden, 1.0)
        vector(f"{at}.ffn_norm.weight", hidden, 1.0)
        for part, width in (("q", hidden), ("k", kv), ("v", kv)):
            matrix(f"{at}.attn_{part}.weight", width, hidden)
            vector(f"{at}.attn_{part}.bias", width, 0.0)
        matrix(f"{at}.attn_output.weight", hidden, hidden)
        matrix(f"{at}.ffn_gate.weight", inner, hidden)
        matrix(f"{at}.ffn_up.weight", inner, hidden)
        matrix(f"{at}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counted


#: Callbacks that C code holds: Python must not free them.
_kept: list[object] = []


def _silence(llama) -> object:
    callback = llama.llama_log_callback(lambda level, text, data: None)
    _kept.append(callback)
    return callback


def open_llama(path: str, threads: int) -> tuple[dict[str, object], Callable[[int, int], float]]:
    """llama.cpp by its C interface: ``llama_decode`` of one token at a time, logits of the last token, no sampler."""
    import llama_cpp as llama  # pyright: ignore[reportMissingImports]

    llama.llama_log_set(_silence(llama), ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")

    def run(prompt: int, tokens: int) -> float:
        params = llama.llama_context_default_params()
        params.n_ctx = prompt + tokens + 8
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        context = llama.llama_init_from_model(model, params)

        def decode(ids: list[int]) -> None:
            array = (llama.llama_token * len(ids))(*ids)
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids))):
                raise SystemExit("llama_decode failed")
            llama.llama_synchronize(context)
            llama.llama_get_logits_ith(context, -1)

        ids = [(7919 * index) % 50000 for index in range(prompt + tokens)]
        # Token by token, though slow: on CPUs with AMX llama.cpp as of llama_cpp_python 0.3.36 crashes in a batch.
        for token in ids[:prompt]:
            decode([token])
        started = time.perf_counter()
        for token in ids[prompt:]:
            decode([token])
        seconds = (time.perf_counter() - started) / tokens
        llama.llama_free(context)
        return seconds

    about: dict[str, object] = {"versions": {"llama_cpp_python": version("llama_cpp_python")}}
    return about | {"system": llama.llama_print_system_info().decode()}, run


def open_genai(path: str, threads: int) -> tuple[dict[str, object], Callable[[int, int], float]]:
    """ONNX Runtime GenAI's generator with greedy search."""
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(prompt: int, tokens: int) -> float:
        params = og.GeneratorParams(model)
        # The random weights may name the end token: min_length keeps it out of the search.
        params.set_search_options(do_sample=False, max_length=prompt + tokens + 1, min_length=prompt + tokens + 1)
        generator = og.Generator(model, params)
        generator.append_tokens([(7919 * index) % 50000 for index in range(prompt)])
        generator.generate_next_token()  # comes from the prompt's logits
        started = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return (time.perf_counter() - started) / tokens

    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    return {"versions": versions}, run


def main() -> None:
    """See the module's docstring."""
    what, path, argument = sys.argv[1:4]
    if what == "gguf":
        print(json.dumps({"weight_bytes": write_gguf(path, json.loads(argument)), "gguf": version("gguf")}), flush=True)
        return
    # The peers' libraries print: the answers go to the real stdout, theirs to stderr.
    about, run = {"llama": open_llama, "genai": open_genai}[what](path, int(argument))
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"seconds": run(asked["prompt"], asked["tokens"])}), flush=True)


if __name__ == "__main__":
    main()
