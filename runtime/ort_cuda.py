"""The decoder's graph on ONNX Runtime's CUDA provider: a ``Program`` of ``device_decoder``.

Memory is ours, by raw addresses, and so is the stream. A step is captured by ONNX Runtime itself, which runs it until
its memory is settled, records it under a number of the caller's choice, and replays what it has recorded under that
number (provider option ``enable_cuda_graph``, run option ``gpu_graph_id``). A capture around its runs it does not bear.
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

from ..errors import IntertitleError, TargetError
from .bundle import DecoderSpec
from .cuda import Device
from .device_decoder import STEP, Context, DeviceInference, Shape
from .inference import FloatArray
from .ort import Provider, check_context, load_onnxruntime, open_session

CUDA = "CUDAExecutionProvider"
#: Prompt tokens of one run, of which most prompts are one. It bounds the activations (0.6 GB at 7 B, reckoned);
#: attention over the cache keeps no table of scores. A run turns all int4 weights into float16 once, 6 ms of an H100
#: at 7 B.
PREFILL_CHUNK = 4096
#: Read on the host when a run is queued (GroupQueryAttention's ``total_sequence_length``).
_ON_HOST = ("total_length",)
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def load_cuda_provider() -> str:
    """Make the CUDA provider ready; returns ONNX Runtime's version. ``TargetError`` where it is a build without one."""
    runtime = load_onnxruntime()
    if CUDA not in runtime.get_available_providers():
        raise TargetError(
            f"ONNX Runtime {runtime.__version__} is a build without CUDA: pip uninstall onnxruntime, then pip install "
            "'intertitle[cuda]'"
        )
    # Its warnings about what it cannot load come by the dozen lines; the session's absence is told in one.
    runtime.set_default_logger_severity(4)
    # CUDA's libraries may have come with pip, where nothing else would look. What is not found is printed to where
    # captions go; the session then says so once more.
    with contextlib.redirect_stdout(io.StringIO()):
        runtime.preload_dlls()
    return str(runtime.__version__)


def cuda_provider(device: Device, options: Mapping[str, str], captures: bool) -> Provider:
    """The CUDA provider on a device's stream; ``options`` of the caller go over ours."""
    ours = {
        "device_id": "0",
        "user_compute_stream": str(device.stream),
        # Twice what is asked for, the default, is too much where memory is shared with the processor.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if captures else "0",
        # What the towers compare tokens by is float32, and which two are merged hangs on its last bits.
        "use_tf32": "0",
    }
    return CUDA, ours | dict(options)


def open_cuda_session(graph: Path, device: Device, options: Mapping[str, str], captures: bool = False) -> Any:
    """A session that runs on the device. ``TargetError`` where the provider does not load or memory does not suffice,
    ``BundleError`` when the graph cannot be loaded."""
    with device_errors(graph.name):
        session = open_session(graph, providers=[cuda_provider(device, options, captures)])
    if CUDA not in session.get_providers():
        # ONNX Runtime goes on without a provider that it cannot load.
        raise TargetError(
            f"ONNX Runtime's CUDA provider does not load ({_why_not_loaded()}): pip install 'intertitle[cuda]' brings "
            "CUDA's libraries and cuDNN"
        )
    return session


def _why_not_loaded() -> str:
    """The system's own words about the provider's library; ONNX Runtime logs them and does not hand them out."""
    library = Path(load_onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(os.fspath(library))
    except OSError as error:
        return " ".join(str(error).split())
    return "is the driver too old for it?"


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """What ONNX Runtime raises inside of the ``with`` block as a ``TargetError`` of one line; memory by its name."""
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
    """A graph with all its tensors at given addresses. ``captured``: whether its steps are."""

    def __init__(self, session: Any, device: Device, name: str, captured: bool = True) -> None:
        self.session, self.device, self.name, self.captured = session, device, name, captured
        self.inputs = {value.name: _TYPES[value.type] for value in session.get_inputs()}
        self.outputs = {value.name: _TYPES[value.type] for value in session.get_outputs()}
        self._numbers = itertools.count(1)

    @classmethod
    def open(cls, graph: Path, device: Device, options: Mapping[str, str]) -> OrtProgram:
        """Raises what ``open_cuda_session`` does.

        A session that ONNX Runtime will not capture (it has nodes that this version leaves to the processor) runs
        without.
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
        """See ``Program``. What differs from run to run is not captured, so prompts are not."""
        return _OrtContext(self, next(self._numbers) if phase == STEP and self.captured else -1)


class _OrtContext:
    def __init__(self, program: OrtProgram, graph_id: int) -> None:
        self._program, self._binding = program, program.session.io_binding()
        self._options = load_onnxruntime().RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # Whoever queued the work waits for it.
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
    # A graph that was never captured is none to release.
    with contextlib.suppress(Exception):
        session.release_captured_graph(graph_id)


class OrtCudaComponent:
    """An encoder on the GPU, from and to host memory."""

    def __init__(self, graph: Path, device: Device, options: Mapping[str, str]) -> None:
        self._session = open_cuda_session(graph, device, options)
        self._name, self._input = graph.stem, self._session.get_inputs()[0].name
        self._options = load_onnxruntime().RunOptions()
        # As on the processor: activations are large and needed once a clip.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def __call__(self, value: FloatArray) -> FloatArray:
        """Run on one float32 array; shapes are those of the bundle's component."""
        with device_errors(self._name):
            return self._session.run(None, {self._input: np.ascontiguousarray(value)}, self._options)[0]


class OrtCudaDecoder:
    """The decoder, from which any number of caches can be opened."""

    def __init__(
        self,
        program: OrtProgram,
        selection: OrtProgram,
        spec: DecoderSpec,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        *,
        cache_dtype: npt.DTypeLike,
        shortlist: int,
    ) -> None:
        self._program, self._selection, self.spec, self._embed = program, selection, spec, embed
        self._cache_dtype, self._shortlist = cache_dtype, shortlist

    @property
    def longest(self) -> int:
        """Tokens that a row may hold: what the decoder was trained for."""
        return self.spec.context_length

    def open(self, rows: int, max_length: int) -> DeviceInference:
        """A fresh cache. ``OptionError`` when ``max_length`` exceeds what the decoder was trained for, ``TargetError``
        when the device has no room for it."""
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
