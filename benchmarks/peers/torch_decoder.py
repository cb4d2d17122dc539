"""transformers' Qwen2 of a decoder's shape, random weights, a static cache: seconds a step, eager or compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from ...models.config import DecoderConfig


def torch_decoder_seconds(
    config: DecoderConfig, device: str, compiled: bool, rows: Sequence[int], *, prompt: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Median seconds of a greedy step by rows, after a prompt of random tokens; float16 on a GPU, else bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    shape = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen2ForCausalLM(shape).eval()
        finally:
            torch.set_default_dtype(default)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds = {}
    for count in rows:
        cache = StaticCache(config=shape, max_cache_len=prompt + tokens + 8)
        ids = torch.randint(0, config.vocab_size, (count, prompt), device=device)
        with torch.no_grad():
            positions = torch.arange(prompt, device=device)
            out = model(input_ids=ids, past_key_values=cache, cache_position=positions, logits_to_keep=1)
            token, taken = out.logits[:, -1:].argmax(-1), []
            for index in range(tokens):
                wait()
                started = time.perf_counter()
                place = torch.tensor([prompt + index], device=device)
                out = step(input_ids=token, past_key_values=cache, cache_position=place)
                token = out.logits[:, -1:].argmax(-1).clone()
                wait()
                taken.append(time.perf_counter() - started)
        # The first steps compile and warm up.
        seconds[str(count)] = statistics.median(taken[min(5, tokens // 2) :])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "step_seconds": seconds,
        "tokens_per_second": {count: round(int(count) / value, 2) for count, value in seconds.items()},
        "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }
