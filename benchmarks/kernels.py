"""Where the time of a step goes on an NVIDIA GPU, by kernel. The profiler is PyTorch's, which sees every kernel of the
process, ONNX Runtime's and TensorRT's too, and those of replayed graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_RUNS = 8


def kernels_of(work: Callable[[], object], most: int = 16) -> list[dict[str, Any]]:
    """Microseconds and launches of one ``work``, the most expensive kernels first. ``RuntimeError`` without a GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    work()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_RUNS):
            work()
    found = sorted(seen.key_averages(), key=lambda each: -each.device_time_total)
    return [
        {"us": round(each.device_time_total / _RUNS, 1), "launches": each.count / _RUNS, "kernel": each.key[:100]}
        for each in found[:most]
    ]
