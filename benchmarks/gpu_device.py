"""Where ``benchmarks.gpu`` runs: a GPU with TensorRT or ONNX Runtime, or the processor for a dry run."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..contract.devices import DEVICES
from ..runtime.bundle import Bundle
from ..runtime.captioner import Captioner
from ..runtime.cuda import Cuda
from ..runtime.engines.builder import build_bundle
from ..runtime.engines.library import load_library
from ..runtime.engines.shapes import default_limits
from ..runtime.ort_cuda import load_cuda_provider

_BLOCK = 1 << 30


class Place(Protocol):
    """``target`` and ``weights`` are what bundles are compiled for."""

    target: str
    weights: tuple[str, ...]
    torch_device: str

    def describe(self) -> dict[str, Any]: ...
    def build(self, bundle: Path, rows: int) -> dict[str, Any]: ...
    def open(self, bundle: Path) -> Captioner: ...
    def bandwidth(self) -> float: ...
    def memory_used(self) -> int: ...

    def variants(self, weights: str) -> dict[str, dict[str, str]]:
        """Other ways in which a decoder of these weights can be run: settings of the environment, by their name."""
        ...


class CpuPlace:
    """The processor."""

    target, weights, torch_device = "cpu", ("fp32", "int4"), "cpu"

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu"}

    def build(self, bundle: Path, rows: int) -> dict[str, Any]:
        return {}

    def open(self, bundle: Path) -> Captioner:
        return Captioner.load(bundle)

    def bandwidth(self) -> float:
        """Bytes a second read by one thread, the best of three."""
        block = np.ones(_BLOCK >> 3, np.uint8)
        return max(_rate(lambda: block.view(np.uint64).sum(), block.nbytes) for _ in range(3))

    def memory_used(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def variants(self, weights: str) -> dict[str, dict[str, str]]:
        return {}


class _Gpu:
    """The GPU at hand."""

    weights, torch_device = ("int4", "fp16"), "cuda"

    def __init__(self, target: str) -> None:
        self.target, self._cuda = target, Cuda()

    def describe(self) -> dict[str, Any]:
        free, total = self._cuda.memory
        return {
            "device": self._cuda.name,
            "compute_capability": self._cuda.capability,
            "memory_bytes": total,
            "free_bytes": free,
        }

    def open(self, bundle: Path) -> Captioner:
        return Captioner.load(bundle, device=self.target)

    def bandwidth(self) -> float:
        """Bytes a second, read and written, of copies within the device's memory; the best of five."""
        memory = [self._cuda.allocate(_BLOCK) for _ in range(2)]
        best = 0.0
        for _ in range(5):
            with self._cuda.timer() as timer:
                self._cuda.copy(memory[0].address, memory[1].address, _BLOCK, 1, _BLOCK)
            best = max(best, 2 * _BLOCK / timer.seconds)
        return best

    def memory_used(self) -> int:
        """Bytes in use on the whole device, by all processes."""
        free, total = self._cuda.memory
        return total - free

    def variants(self, weights: str) -> dict[str, dict[str, str]]:
        return {}


class CudaPlace(_Gpu):
    """ONNX Runtime's CUDA provider."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self._version = load_cuda_provider()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "library": f"ONNX Runtime {self._version}"}

    def build(self, bundle: Path, rows: int) -> dict[str, Any]:
        return {}

    def variants(self, weights: str) -> dict[str, dict[str, str]]:
        """ONNX Runtime's other kernels for int4."""
        return {"ORT_FPA_INTB_GEMM=1": {"ORT_FPA_INTB_GEMM": "1"}} if weights == "int4" else {}


class EnginePlace(_Gpu):
    """TensorRT; engines are built for the GPU at hand."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._library = load_library(target)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "library": f"{self._library.target} {self._library.version}"}

    def build(self, bundle: Path, rows: int) -> dict[str, Any]:
        opened = Bundle.open(bundle)
        limits = default_limits(opened.manifest, rows=max(rows, 8))
        built = build_bundle(opened, self._library, (self._cuda.capability,), limits, current=True)
        return {each.name: {"bytes": each.size, "seconds": round(each.seconds, 2)} for each in built}


def open_place(device: str) -> Place:
    """Where a device's name says. ``TargetError`` where it is not to be had."""
    return _PLACES[DEVICES[device].runtime](device)


_PLACES: dict[str, Callable[[str], Place]] = {
    "onnxruntime": lambda device: CpuPlace(),
    "onnxruntime-cuda": lambda device: CudaPlace(),
    "tensorrt": EnginePlace,
}


def _rate(work: Any, size: int) -> float:
    started = time.perf_counter()
    work()
    return size / (time.perf_counter() - started)
