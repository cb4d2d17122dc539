"""Where a bundle runs: the one place that knows which runtimes there are.

A backend opens the components of one bundle; the rest of the runtime sees functions and the ``Inference`` seam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..errors import TargetError
from .bundle import Bundle
from .inference import FloatArray, Inference

DEVICES = ("auto", "cpu", "tensorrt-rtx", "tensorrt", "tensorrt-10.3")


class Decoder(Protocol):
    """A loaded decoder, from which caches are opened; ``longest``: tokens that a row can be asked to hold."""

    @property
    def longest(self) -> int: ...

    def open(self, rows: int, max_length: int) -> Inference: ...


class Backend(Protocol):
    """A bundle on a device; ``device`` says which, for a reader."""

    device: str

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        """An encoder, loaded: float32 in, float32 out. ``graph``: which of the component's graphs."""
        ...

    def decoder(self) -> Decoder: ...


class OrtBackend:
    """ONNX Runtime on the processor. ``threads``: of each session, one a core when ``None``."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle, self._threads, self.device = bundle, threads, "cpu"

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        from .ort import OrtComponent

        return OrtComponent(self._bundle.file(graph), self._threads)

    def decoder(self) -> Decoder:
        from .ort import OrtDecoder

        manifest = self._bundle.manifest
        graph = self._bundle.file(manifest.components["decoder"].graph)
        return OrtDecoder(graph, manifest.decoder, self._bundle.embed, self._threads)


class EngineBackend:
    """TensorRT on a GPU, with the engines that ``intertitle build`` left in this user's cache.

    ``library`` and ``gpu``: those at hand when ``None``. ``TargetError`` where there are none.
    """

    def __init__(self, bundle: Bundle, target: str, library: Any = None, gpu: Any = None) -> None:
        from .engines.cuda import Cuda
        from .engines.library import load_library

        self._bundle = bundle
        self._library = load_library(target) if library is None else library
        self._gpu = Cuda() if gpu is None else gpu
        self.device = f"{target} {self._library.version} on {self._gpu.name}"
        # Now, and not when the first clip is half way through.
        from .engines.builder import find_engines

        self._engines = find_engines(bundle, self._library, self._gpu.capability)

    def component(self, name: str, graph: str) -> Callable[[FloatArray], FloatArray]:
        from .engines.session import EngineComponent

        engine = self._open(graph.removesuffix(".onnx"))
        return EngineComponent(engine, self._bundle.manifest.components[name])

    def decoder(self) -> Decoder:
        from .engines.builder import limits_of
        from .engines.session import EngineDecoder

        manifest = self._bundle.manifest
        limits = limits_of(self._engines["decoder"])
        component = manifest.components["decoder"]
        return EngineDecoder(self._open("decoder"), component, manifest.decoder, limits, self._bundle.embed)

    def _open(self, name: str) -> Any:
        from .engines.cache import EngineCache
        from .engines.session import Engine

        plan = EngineCache.open().load(self._engines[name])
        return Engine(self._library, self._gpu, plan, name)


def open_backend(bundle: Bundle, device: str = "auto", threads: int | None = None) -> Backend:
    """The backend of a device; ``auto``: the one that the bundle was compiled for.

    ``TargetError`` for a device that is unknown, not there, or not what the bundle was compiled for.
    """
    manifest = bundle.manifest
    if device not in DEVICES:
        raise TargetError(f"device '{device}' is not supported; this version knows: {', '.join(DEVICES)}")
    if manifest.dialect != "ort":
        target = manifest.target if device == "auto" else device
        if target == "cpu":
            raise TargetError(
                f"{bundle.path}: the bundle is for {manifest.target}, not for the CPU; compile the checkpoint with "
                "--target cpu"
            )
        return EngineBackend(bundle, target)
    if device not in ("auto", "cpu"):
        raise TargetError(
            f"{bundle.path}: the bundle is for {manifest.target}; for {device} compile the checkpoint with --target "
            "tensorrt-rtx"
        )
    return OrtBackend(bundle, threads)
