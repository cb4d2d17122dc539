"""The decoder's graph on ONNX Runtime's CUDA provider: a ``Program`` of ``device_decoder``.

We own the memory (raw addresses) and the stream. ONNX Runtime captures a step itself: it runs the step until its memory
no longer changes, records it under a number that the caller chooses, and replays the recording of that number (provider
option ``enable_cuda_graph``, run option ``gpu_graph_id``). ONNX Runtime does not support being captured from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.records import DecoderShape
from ..errors import IntertitleError, TargetError
from .cuda import Device
from .device_decoder import STEP, Context, DeviceInference, Shape
from .inference import FloatArray
from .ort import Provider, check_context, load_onnxruntime, open_session, rounded_length

CUDA = "CUDAExecutionProvider"
#: The most prompt tokens of one run; most prompts need one run. The number bounds the activations (0.6 GB at 7 B, by
#: calculation): attention over the cache keeps no table of scores. Each run converts all int4 weights to float16 once,
#: which takes 6 ms on an H100 at 7 B.
PREFILL_CHUNK = 4096
#: Inputs that are read on the host when a run is queued (GroupQueryAttention's ``total_sequence_length``).
_ON_HOST = ("total_length",)
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def load_cuda_provider() -> str:
    """Load the CUDA provider and return ONNX Runtime's version. ``TargetError`` if this build has no CUDA."""
    runtime = load_onnxruntime()
    if CUDA not in runtime.get_available_providers():
        raise TargetError(
            f"ONNX Runtime {runtime.__version__} is a build without CUDA: pip uninstall onnxruntime, then pip install "
            "'intertitle[cuda]'"
        )
    # ONNX Runtime prints dozens of warnings about libraries that do not load. Our error says it in one line.
    runtime.set_default_logger_severity(4)
    # CUDA's libraries may have been installed by pip, where the loader does not look. ``preload_dlls`` prints missing
    # ones to stdout, where captions go; opening the session reports them anyway.
    with contextlib.redirect_stdout(io.StringIO()):
        runtime.preload_dlls()
    return str(runtime.__version__)


def cuda_provider(device: Device, options: Mapping[str, str], captures: bool) -> Provider:
    """The CUDA provider on a device's stream. The caller's ``options`` replace ours."""
    ours = {
        "device_id": "0",
        "user_compute_stream": str(device.stream),
        # The default doubles each request. That is too much where the GPU shares the CPU's memory.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if captures else "0",
        # AuroraCap's towers compare tokens in float32, and the last bits decide which two tokens are merged.
        "use_tf32": "0",
    }
    return CUDA, ours | dict(options)


def open_cuda_session(graph: Path, device: Device, options: Mapping[str, str], captures: bool = False) -> Any:
    """A session that runs on the device.

    ``TargetError`` if the provider does not load or memory does not suffice, ``BundleError`` if the graph cannot be
    loaded.
    """
    with device_errors(graph.name):
        session = open_session(graph, providers=[cuda_provider(device, options, captures)])
    if CUDA not in session.get_providers():
        # ONNX Runtime continues without a provider that it cannot load.
        raise TargetError(
            f"ONNX Runtime's CUDA provider does not load ({_why_not_loaded()}): pip install 'intertitle[cuda]' brings "
            "CUDA's libraries and cuDNN"
        )
    return session


def _why_not_loaded() -> str:
    """What the dynamic loader says about the provider's library. ONNX Runtime logs it but does not return it."""
    library = Path(load_onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(os.fspath(library))
    except OSError as error:
        return " ".join(str(error).split())
    return "is the driver too old for it?"


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Turn errors of ONNX Runtime in the ``with`` block into a ``TargetError`` of one line; it names lack of memory."""
    try:
        yield
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        reason = " ".join(str(error).split())
        if any(
            sign in reason.lower() for sign in ("out of memory", "failed to allocate memory", "cublas_status_alloc")
        ):
            raise TargetError(f"{what}: the GPU has too little memory: fewer or shorter rows? ({reason})") from error
        if isinstance(error, IntertitleError):
            raise
        raise TargetError(f"{what}: it does not run on the GPU: {reason}") from error


class OrtProgram:
    """A graph whose tensors all have given addresses. ``captured``: whether its steps are captured."""

    def __init__(self, session: Any, device: Device, name: str, captured: bool = True) -> None:
        self.session, self.device, self.name, self.captured = session, device, name, captured
        self.inputs = {value.name: _TYPES[value.type] for value in session.get_inputs()}
        self.outputs = {value.name: _TYPES[value.type] for value in session.get_outputs()}
        self._numbers = itertools.count(1)

    @classmethod
    def open(cls, graph: Path, device: Device, options: Mapping[str, str]) -> OrtProgram:
        """Open a graph; raises what ``open_cuda_session`` raises.

        If ONNX Runtime refuses to capture the session (some nodes run on the CPU in this version), it runs uncaptured.
        """
        name = graph.name.split(".")[0]
        try:
            captured = options.get("enable_cuda_graph") != "0"
            return cls(open_cuda_session(graph, device, options, captures=True), device, name, captured)
        except IntertitleError as error:
            if "capture" not in str(error).lower() and "cuda graph" not in str(error).lower():
                raise
            return cls(open_cuda_session(graph, device, options, captures=False), device, name, captured=False)

    def context(self, phase: int) -> Context:
        """See ``Program``. Prompts are not captured: their shapes differ from run to run."""
        return _OrtContext(self, next(self._numbers) if phase == STEP and self.captured else -1)


class _OrtContext:
    def __init__(self, program: OrtProgram, graph_id: int) -> None:
        self._program, self._binding = program, program.session.io_binding()
        self._options = load_onnxruntime().RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # The caller that queued the work waits for it.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph_id >= 0 and hasattr(program.session, "release_captured_graph"):
            weakref.finalize(self, _release, program.session, graph_id).atexit = False

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        program = self._program
        for name, dtype in program.inputs.items():
            place = "cpu" if name in _ON_HOST else "cuda"
            self._binding.bind_input(name, place, 0, dtype, list(shapes[name]), addresses[name])
        for name, dtype in program.outputs.items():
            self._binding.bind_output(name, "cuda", 0, dtype, list(shapes[name]), addresses[name])

    def run(self) -> None:
        with device_errors(self._program.name):
            self._program.session.run_with_iobinding(self._binding, self._options)

    def repeatable(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def _release(session: Any, graph_id: int) -> None:
    # A graph that was never captured cannot be released.
    with contextlib.suppress(Exception):
        session.release_captured_graph(graph_id)


class OrtCudaComponent:
    """A stage's graph on the GPU. Its inputs and its output are in host memory."""

    def __init__(self, graph: Path, device: Device, options: Mapping[str, str]) -> None:
        self._session = open_cuda_session(graph, device, options)
        self._name, self._inputs = graph.stem, [value.name for value in self._session.get_inputs()]
        self._options = load_onnxruntime().RunOptions()
        # As on the CPU: activations are large and needed once per clip.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def __call__(self, *values: FloatArray) -> FloatArray:
        """Run on one float32 array for each input; the shapes are those of the bundle's component."""
        given = {name: np.ascontiguousarray(value) for name, value in zip(self._inputs, values, strict=True)}
        with device_errors(self._name):
            return self._session.run(None, given, self._options)[0]


class OrtCudaDecoder:
    """The decoder. Any number of caches can be opened on it."""

    def __init__(
        self,
        program: OrtProgram,
        selection: OrtProgram,
        spec: DecoderShape,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        *,
        cache_dtype: npt.DTypeLike,
        shortlist: int,
    ) -> None:
        self._program, self._selection, self.spec, self._embed = program, selection, spec, embed
        self._cache_dtype, self._shortlist = cache_dtype, shortlist

    @property
    def most_rows(self) -> int | None:
        """Any number."""
        return None

    def row_length(self, wanted: int) -> int:
        """``wanted`` tokens rounded up."""
        return rounded_length(wanted, self.spec)

    def open(self, rows: int, max_length: int) -> DeviceInference:
        """A new cache.

        ``OptionError`` if ``max_length`` exceeds the decoder's context, ``TargetError`` if the device lacks memory.
        """
        check_context(max_length, self.spec)
        return DeviceInference(
            self._program,
            self._selection,
            self.spec,
            self._embed,
            rows=rows,
            max_length=max_length,
            chunk=min(PREFILL_CHUNK, max_length),
            cache_dtype=self._cache_dtype,
            shortlist=self._shortlist,
        )
