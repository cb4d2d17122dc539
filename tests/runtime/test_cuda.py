"""What is taken of a GPU is given back, and what it refuses is told, over a CUDA runtime that is none."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from intertitle.errors import TargetError


def test_pinned_memory_lives_as_long_as_its_last_view(gpu):
    array = gpu.pinned((3, 4), np.float32)
    array[...] = np.arange(12).reshape(3, 4)
    (block,) = gpu._api.blocks.values()
    assert np.frombuffer(block, np.float32).tolist() == list(range(12))
    view = array[1:, 0]
    del array
    gc.collect()
    assert view.tolist() == [4, 8]
    assert gpu._api.given_back == []
    del view
    gc.collect()
    assert gpu._api.given_back == [block]


def test_a_captured_graph_is_given_back_with_its_launcher(gpu):
    launch = gpu.capture(lambda: None)
    launch()
    launch()
    assert (gpu._api.launched, gpu._api.given_back) == (["executable of graph"] * 2, ["graph"])
    del launch
    gc.collect()
    assert gpu._api.given_back == ["graph", "executable of graph"]


def test_what_breaks_a_capture_is_told(gpu):
    broken = SimpleNamespace(name="cudaErrorStreamCaptureInvalidated")
    gpu._api.cudaStreamEndCapture = lambda stream: (broken, None)

    def work():
        raise TargetError("the engine did not run")

    with pytest.raises(TargetError, match="the engine did not run"):
        gpu.capture(work)


def test_a_gpu_without_room(gpu):
    """``cudaMalloc`` as it answers when memory is out; the message says how much there is."""
    failure = SimpleNamespace(name="cudaErrorMemoryAllocation")
    gpu._api.cudaMalloc = lambda size: (failure, 0)
    gpu._api.cudaMemGetInfo = lambda: (gpu._api.cudaError_t.cudaSuccess, 3 << 20, 8 << 30)
    with pytest.raises(TargetError, match=r"the GPU has 3 MiB left, 2,048 MiB are needed: fewer or shorter rows\?"):
        gpu.allocate(2 << 30)
    gpu._api.cudaHostAlloc = lambda size, flags: (failure, 0)
    with pytest.raises(TargetError, match=r"CUDA: MemoryAllocation"):
        gpu.pinned((1,), np.float32)
