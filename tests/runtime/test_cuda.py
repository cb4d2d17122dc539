"""What is taken of a GPU is given back, and what it refuses is told, over a CUDA runtime that is none."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest
from intertitle.errors import TargetError
from intertitle.runtime.cuda import Cuda

SUCCESS = SimpleNamespace(name="cudaSuccess")


class FakeRuntime:
    """``cuda.bindings.runtime`` as far as these tests go; ``given_back`` in order."""

    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaHostAllocDefault = 0

    def __init__(self) -> None:
        self.blocks, self.given_back, self.launched = {}, [], []

    def cudaHostAlloc(self, size, flags):
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return SUCCESS, ctypes.addressof(block)

    def cudaFreeHost(self, address):
        self.given_back.append(self.blocks.pop(address))
        return (SUCCESS,)

    def cudaStreamBeginCapture(self, stream, mode):
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream):
        return SUCCESS, "graph"

    def cudaGraphInstantiate(self, graph, flags):
        return SUCCESS, f"executable of {graph}"

    def cudaGraphDestroy(self, graph):
        self.given_back.append(graph)
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, executable):
        self.given_back.append(executable)
        return (SUCCESS,)

    def cudaGraphLaunch(self, executable, stream):
        self.launched.append(executable)
        return (SUCCESS,)


@pytest.fixture
def gpu() -> Cuda:
    gpu = Cuda.__new__(Cuda)
    gpu._api, gpu.stream = FakeRuntime(), 7
    return gpu


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


def test_a_gpu_without_room(gpu):
    """``cudaMalloc`` as it answers when memory is out; the message says how much there is."""
    failure = SimpleNamespace(name="cudaErrorMemoryAllocation")
    gpu._api.cudaMalloc = lambda size: (failure, 0)
    gpu._api.cudaMemGetInfo = lambda: (SUCCESS, 3 << 20, 8 << 30)
    with pytest.raises(TargetError, match=r"the GPU has 3 MiB left, 2,048 MiB are needed: fewer or shorter rows\?"):
        gpu.allocate(2 << 30)
    gpu._api.cudaHostAlloc = lambda size, flags: (failure, 0)
    with pytest.raises(TargetError, match=r"CUDA: MemoryAllocation"):
        gpu.pinned((1,), np.float32)
