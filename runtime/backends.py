"""Where a bundle runs: the one place that knows which runtimes there are.

A backend opens the components of one bundle; the rest of the runtime sees functions and the ``Inference`` seam.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..contract.devices import DEVICES
from ..contract.targets import TARGETS
from ..errors import IntertitleError, OptionError, TargetError
from .bundle import Bundle
from .inference import FloatArray, Inference

if TYPE_CHECKING:
    from .ort_cuda import OrtProgram

#: The device that stands for the best one that works.
AUTO = "auto"

#: Each session starts so many threads at once; a machine with more cores may use them all.
MAX_THREADS = 256

_log = logging.getLogger(__name__)

Options = Mapping[str, Mapping[str, str]]
"""Of each component, by name: options of the provider that it runs on."""


class Decoder(Protocol):
    """A loaded decoder, from which caches are opened. ``most_rows``: rows of a step, ``None`` for any number."""

    @property
    def most_rows(self) -> int | None: ...

    def row_length(self, wanted: int) -> int:
        """The tokens of a row that is opened for ``wanted`` ones: no fewer, even if ``open`` refuses as many."""
        ...

    def open(self, rows: int, max_length: int) -> Inference: ...


class Backend(Protocol):
    """A bundle on a device; ``device`` says which, for a reader. ``forks``: a forked child can go on using it."""

    forks: bool

    @property
    def device(self) -> str: ...

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        """An encoder, loaded: float32 in, float32 out. ``graph``: which of the component's graphs."""
        ...

    def decoder(self) -> Decoder: ...


class OrtBackend:
    """ONNX Runtime on the processor. ``threads``: of each session, one a core when ``None``."""

    forks = True

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle, self._threads, self.device = bundle, threads, "cpu"

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        from .ort import OrtComponent

        return OrtComponent(self._bundle.file(graph), self._threads)

    def decoder(self) -> Decoder:
        from .ort import OrtDecoder

        manifest = self._bundle.manifest
        graph = self._bundle.file(manifest.components["decoder"].graph)
        return OrtDecoder(graph, manifest.decoder, self._bundle.embed, self._threads, manifest.cache_dtype)


class CudaBackend:
    """ONNX Runtime's CUDA provider. ``options``: provider options by component, over ours; ``{"device": "cpu"}`` leaves
    an encoder to the processor. ``TargetError`` where the provider or a GPU is missing or does not work."""

    forks = False

    def __init__(self, bundle: Bundle, options: Options | None = None, threads: int | None = None) -> None:
        from .cuda import Cuda
        from .ort_cuda import load_cuda_provider

        components = bundle.manifest.components
        self._bundle, self._options, self._processor = bundle, options or {}, OrtBackend(bundle, threads)
        if unknown := sorted(set(self._options) - set(components)):
            raise OptionError(f"there is no component {unknown[0]!r}; there are {', '.join(components)}")
        version, self._gpu = load_cuda_provider(), Cuda()
        self._name, self._captured = f"cuda, ONNX Runtime {version} on {self._gpu.name}", True
        # Now, since it is small: whether the provider works is seen when it is loaded.
        self._selection = self._program("selection")

    @property
    def device(self) -> str:
        return self._name if self._captured else f"{self._name}, steps not captured"

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        from .ort_cuda import OrtCudaComponent

        options = dict(self._options.get(name, {}))
        if options.pop("device", "cuda") == "cpu":
            return self._processor.component(name, graph)
        return OrtCudaComponent(self._bundle.file(graph), self._gpu, options)

    def decoder(self) -> Decoder:
        from .ort_cuda import OrtCudaDecoder

        manifest = self._bundle.manifest
        return OrtCudaDecoder(
            self._program("decoder"),
            self._selection,
            manifest.decoder,
            self._bundle.embed,
            cache_dtype=manifest.cache_dtype,
            shortlist=manifest.shortlist,
        )

    def _program(self, name: str) -> OrtProgram:
        from .ort_cuda import OrtProgram

        graph = self._bundle.file(self._bundle.manifest.components[name].graph)
        opened = OrtProgram.open(graph, self._gpu, self._options.get(name, {}))
        self._captured = self._captured and opened.captured
        return opened


class EngineBackend:
    """TensorRT on a GPU, with the engines that ``intertitle build`` left in this user's cache.

    ``library`` and ``gpu``: those at hand when ``None``. ``TargetError`` where there are none.
    """

    forks = False

    def __init__(self, bundle: Bundle, target: str, library: Any = None, gpu: Any = None) -> None:
        from .cuda import Cuda
        from .engines.library import load_library

        self._bundle = bundle
        self._library = load_library(target) if library is None else library
        self._gpu = Cuda() if gpu is None else gpu
        self._library.check_gpu(self._gpu.capability)
        self._name, self._opened = f"{target} {self._library.version} on {self._gpu.name}", weakref.WeakSet[Any]()
        # Now, and not when the first clip is half way through.
        from .engines.builder import find_engines

        self._engines = find_engines(bundle, self._library, self._gpu.capability)

    @property
    def device(self) -> str:
        return self._name if all(engine.captured for engine in self._opened) else f"{self._name}, steps not captured"

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        from .engines.session import EngineComponent

        engine = self._open(graph.removesuffix(".onnx"))
        return EngineComponent(engine, self._bundle.manifest.components[name])

    def decoder(self) -> Decoder:
        from .engines.builder import limits_of
        from .engines.session import EngineDecoder

        manifest = self._bundle.manifest
        limits = limits_of(self._engines["decoder"])
        return EngineDecoder(
            self._open("decoder"),
            self._open("selection") if manifest.shortlist else None,
            manifest.decoder,
            limits,
            self._bundle.embed,
            cache_dtype=manifest.cache_dtype,
            shortlist=manifest.shortlist,
        )

    def _open(self, name: str) -> Any:
        from .engines.cache import EngineCache
        from .engines.session import Engine

        plan = EngineCache.open().load(self._engines[name])
        engine = Engine(self._library, self._gpu, plan, name)
        self._opened.add(engine)
        return engine


def open_backend(
    bundle: Bundle, device: str = "auto", threads: int | None = None, options: Options | None = None
) -> tuple[Backend, list[str]]:
    """The backend of a device; ``auto``: the best of those that the bundle is for that works here. With it, why better
    ones do not, a line each.

    ``options``: those of ``CudaBackend``, which other devices have no use for. ``TargetError`` for a device that is
    unknown, not there, or not what the bundle was compiled for; ``OptionError`` for options of a bundle not for CUDA.
    """
    if device not in (AUTO, *DEVICES):
        raise TargetError(f"device '{device}' is not supported; this version knows: {', '.join((AUTO, *DEVICES))}")
    if options and not any(DEVICES[name].options for name in candidates(bundle)):
        raise OptionError(
            f"{bundle.path}: options are for ONNX Runtime on CUDA, the bundle is for {bundle.manifest.target}"
        )
    check_threads(threads)
    if device != AUTO:
        return _open(bundle, device, threads, options), []
    reasons: list[str] = []
    for candidate in candidates(bundle):
        try:
            return _open(bundle, candidate, threads, options), reasons
        except OptionError:
            raise
        except IntertitleError as error:
            _log.info("not on %s: %s", candidate, error)
            reasons.append(f"{candidate}: {error}")
    raise TargetError("; ".join(reasons))


def check_threads(threads: int | None) -> None:
    """``OptionError`` for a number of threads that makes no sense; ``None`` is one a core."""
    most = max(MAX_THREADS, os.cpu_count() or 1)
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= most):
        raise OptionError(f"threads must be a whole number from 1 to {most}, not {threads}")


def where(bundle: Bundle) -> list[tuple[str, str | None]]:
    """The devices that a bundle was compiled for, the best first, and why it does not run there, if it does not."""
    found: list[tuple[str, str | None]] = []
    for device in candidates(bundle):
        try:
            found.append((_open(bundle, device, None, None).device, None))
        except IntertitleError as error:
            found.append((device, str(error)))
    return found


def candidates(bundle: Bundle) -> list[str]:
    """The devices that a bundle was compiled for, the best first."""
    manifest = bundle.manifest
    target = TARGETS.get(manifest.target)
    if target is None or target.dialect != manifest.dialect:
        raise TargetError(f"{bundle.path}: the bundle is for {manifest.target}, which this version does not know")
    return list(target.devices)


def _open(bundle: Bundle, device: str, threads: int | None, options: Options | None) -> Backend:
    if device not in candidates(bundle):
        raise TargetError(_other_target(bundle, device))
    return _OPENERS[DEVICES[device].runtime](bundle, device, threads, options)


#: What opens a bundle with each runtime (``Device.runtime``).
_OPENERS: Mapping[str, Callable[[Bundle, str, int | None, Options | None], Backend]] = {
    "onnxruntime": lambda bundle, device, threads, options: OrtBackend(bundle, threads),
    "onnxruntime-cuda": lambda bundle, device, threads, options: CudaBackend(bundle, options, threads),
    "tensorrt": lambda bundle, device, threads, options: EngineBackend(bundle, device),
}


def _other_target(bundle: Bundle, device: str) -> str:
    return (
        f"{bundle.path}: the bundle is for {bundle.manifest.target}; for {device} compile the checkpoint with --target "
        f"{device}"
    )
