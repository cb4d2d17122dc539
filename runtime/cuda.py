"""The GPU of this machine through cuda-python: memory, copies, one stream, captured graphs. It knows no TensorRT."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import TargetError

Array = npt.NDArray[Any]


class Memory(Protocol):
    """``size`` bytes on a device from ``address`` on. They are freed with the object."""

    address: int
    size: int


class Device(Protocol):
    """What a session needs of a GPU. Work is queued on one stream, in order; ``synchronize`` waits for it.

    Until then arrays of ``upload`` must not change, and arrays of ``download`` are not filled.
    """

    stream: int

    def allocate(self, size: int) -> Memory: ...
    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array: ...
    def upload(self, address: int, array: Array) -> None: ...
    def download(self, array: Array, address: int) -> None: ...
    def copy(self, target: int, source: int, width: int, height: int, pitch: int) -> None: ...
    def zero(self, address: int, size: int) -> None: ...
    def synchronize(self) -> None: ...
    def capture(self, work: Callable[[], None]) -> Callable[[], None]: ...


class Cuda:
    """A CUDA device. ``TargetError`` if cuda-python, the driver or the GPU is missing."""

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import runtime  # type: ignore[attr-defined]  # not where lint runs
        except ImportError as error:
            raise TargetError(f"cuda-python is not installed (pip install cuda-bindings): {error}") from None
        self._api = runtime
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or not count:
            raise TargetError(f"no NVIDIA GPU ({_name(status)})" if int(status) else "no NVIDIA GPU")
        self._check(runtime.cudaSetDevice(index))
        properties = self._check(runtime.cudaGetDeviceProperties(index))
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        self.capability = f"{properties.major}.{properties.minor}"
        self.stream = int(self._check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    @property
    def memory(self) -> tuple[int, int]:
        """Free bytes and all bytes."""
        return self._check(self._api.cudaMemGetInfo())

    def allocate(self, size: int) -> Memory:
        """``size`` bytes. ``TargetError`` if the device has fewer left."""
        return _Allocation(self, size)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array that the device copies from and to directly. It is freed with its last view."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._check(self._api.cudaHostAlloc(max(size, 1), self._api.cudaHostAllocDefault))
        view = (ctypes.c_uint8 * size).from_address(int(address))
        weakref.finalize(view, self._api.cudaFreeHost, address).atexit = False
        return np.ctypeslib.as_array(view).view(dtype).reshape(shape)

    def upload(self, address: int, array: Array) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._api.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: Array, address: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(self._api.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def copy(self, target: int, source: int, width: int, height: int, pitch: int) -> None:
        """Copy ``height`` runs of ``width`` bytes, ``pitch`` bytes apart, from one address on the device to another."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._check(self._api.cudaMemcpy2DAsync(target, pitch, source, pitch, width, height, kind, self.stream))

    def zero(self, address: int, size: int) -> None:
        self._check(self._api.cudaMemsetAsync(address, 0, size, self.stream))

    def synchronize(self) -> None:
        self._check(self._api.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``work`` queues as one launch that can be repeated.

        ``work`` must have run once before. It lives as long as the launch, because it owns the memory that is used.
        """
        return _Captured(self, work)

    def timer(self) -> EventTimer:
        """Times the work that is queued in its ``with`` block, by the clock of the device."""
        return EventTimer(self)

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._api.cudaError_t.cudaSuccess:
            raise TargetError(f"CUDA: {_name(status)}")
        return values[0] if len(values) == 1 else tuple(values)


class EventTimer:
    """``seconds`` of a ``with`` block, after its end."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.seconds = cuda, 0.0
        self._events = [cuda._check(cuda._api.cudaEventCreate()) for _ in range(2)]

    def __enter__(self) -> EventTimer:
        self._cuda._check(self._cuda._api.cudaEventRecord(self._events[0], self._cuda.stream))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        api = self._cuda._api
        self._cuda._check(api.cudaEventRecord(self._events[1], self._cuda.stream))
        self._cuda._check(api.cudaEventSynchronize(self._events[1]))
        self.seconds = float(self._cuda._check(api.cudaEventElapsedTime(*self._events))) / 1000
        for event in self._events:
            api.cudaEventDestroy(event)


class _Captured:
    """A captured graph. It is freed before the memory that it uses."""

    def __init__(self, cuda: Cuda, work: Callable[[], None]) -> None:
        self._cuda, self._work, api = cuda, work, cuda._api
        mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda._check(api.cudaStreamBeginCapture(cuda.stream, mode))
        try:
            work()
        except BaseException:
            # Raise the first error, not the one about the broken capture.
            _, graph = api.cudaStreamEndCapture(cuda.stream)
            api.cudaGraphDestroy(graph)
            raise
        graph = cuda._check(api.cudaStreamEndCapture(cuda.stream))
        try:
            self._executable = cuda._check(api.cudaGraphInstantiate(graph, 0))
        finally:
            api.cudaGraphDestroy(graph)
        weakref.finalize(self, api.cudaGraphExecDestroy, self._executable).atexit = False

    def __call__(self) -> None:
        self._cuda._check(self._cuda._api.cudaGraphLaunch(self._executable, self._cuda.stream))


class _Allocation:
    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size = cuda, size
        status, address = cuda._api.cudaMalloc(max(size, 1))
        if status != cuda._api.cudaError_t.cudaSuccess:
            free = cuda.memory[0]
            raise TargetError(
                f"the GPU has {free / 2**20:,.0f} MiB left, {size / 2**20:,.0f} MiB are needed: fewer or shorter rows?"
            )
        self.address = int(address)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._cuda._api.cudaFree(self.address)


def _name(status: Any) -> str:
    return str(getattr(status, "name", status)).removeprefix("cudaError")
