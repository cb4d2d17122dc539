"""Build a bundle's engines, one component after the other: the peak memory is that of the largest one."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...contract.dialects import DIALECTS
from ...contract.manifest import Component
from ...contract.targets import TARGETS
from ...errors import TargetError
from ..bundle import Bundle
from .build import build_engine
from .cache import EngineCache, Origin, describe_change
from .library import Library, check_device
from .shapes import Limits, profiles

#: ``(stage, steps done, steps in all)``.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Part:
    """A graph of the bundle that becomes an engine.

    ``name``: the file name without suffix and dialect. ``of``: the name of its component; a stage with variants has
    several graphs.
    """

    name: str
    of: str
    component: Component
    graph: Path


@dataclass(frozen=True)
class Built:
    """An engine that is in the cache now.

    ``reason``: why it was built; ``None`` if it was up to date. ``unfused``: see ``Plan``; 0 if it was not built.
    """

    name: str
    path: Path
    size: int
    reason: str | None
    seconds: float
    unfused: int = 0


def parts(bundle: Bundle) -> list[Part]:
    """All graphs of a bundle, with those of the variants of a stage. ``TargetError`` for a bundle without engines."""
    manifest = bundle.manifest
    if manifest.dialect not in DIALECTS or not DIALECTS[manifest.dialect].engines:
        example = next(target.name for target in TARGETS.values() if target.engines)
        raise TargetError(
            f"{bundle.path}: the bundle is for {manifest.target}, which needs no engines; for engines compile "
            f"the checkpoint with --target {example}"
        )
    components = manifest.components
    found = [Part(name, name, component, bundle.file(component.graph)) for name, component in components.items()]
    for stage in manifest.pipeline.stages:
        for variant in stage.variants[1:]:
            name = variant.graph.removesuffix(".onnx")
            found.append(Part(name, stage.name, components[stage.name], bundle.file(variant.graph)))
    return found


def origin(bundle: Bundle, part: Part, library: Library, capabilities: Sequence[str], limits: Limits) -> Origin:
    """What the engine of a part depends on. ``capabilities``: the compute capabilities it runs on, never empty."""
    files, component = bundle.manifest.files, part.component
    # The size of the cache concerns the decoder only; a change must not rebuild the encoders.
    options = asdict(limits)
    if part.name != "decoder":
        options = {"rows": limits.rows} if part.name == "selection" else {}
    return Origin(
        bundle=bundle.manifest.name,
        component=part.name,
        graph=files[part.graph.name].sha256,
        data=files[component.data].sha256 if component.data else "",
        library=library.target,
        version=library.version,
        platform=f"{sys.platform}-{platform.machine()}",
        capabilities=tuple(capabilities),
        options=options,
    )


def find_engines(bundle: Bundle, library: Library, capability: str) -> dict[str, Origin]:
    """The engines of a bundle that run on a GPU of this compute capability, by name. Of several, the largest counts.

    ``TargetError`` says what is wrong with the engines that exist.
    """
    cache, found = EngineCache.open(), dict[str, Origin]()
    for part in parts(bundle):
        wanted = origin(bundle, part, library, (capability,), Limits(0, 0, 0))
        candidates = cache.built(wanted)
        if not candidates:
            raise TargetError(f"{bundle.path}: no engine of {part.name} was built: run intertitle build")
        for name in ("graph", "data", "library", "version", "platform"):
            fitting = [each for each in candidates if getattr(each, name) == getattr(wanted, name)]
            if not fitting:
                change = describe_change(candidates[-1], wanted, name)
                raise TargetError(
                    f"{bundle.path}: the engine of {part.name} does not fit: {change}; run intertitle build"
                )
            candidates = fitting
        on_device = [each for each in candidates if capability in each.capabilities]
        if not on_device:
            check_device(candidates[-1].capabilities, capability, f"the engine of {part.name}")
        found[part.name] = max(
            on_device, key=lambda each: (each.options.get("max_length", 0), each.options.get("rows", 0))
        )
    return found


def limits_of(decoder: Origin) -> Limits:
    """The sizes that a decoder's engine was built for."""
    return Limits(**decoder.options)


def build_bundle(
    bundle: Bundle,
    library: Library,
    capabilities: Sequence[str],
    limits: Limits,
    *,
    current: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Built]:
    """Build the engines that are missing, and yield every engine of the bundle as soon as it exists.

    ``current``: build for the GPU of this machine, whose capability is in ``capabilities``. ``TargetError`` if the
    bundle needs no engines, TensorRT refuses a graph, or the cache cannot be used.
    """
    report, cache = progress or (lambda *_: None), EngineCache.open()
    if current:
        library.check_gpu(capabilities[0])
    # Without a name, a library that builds ahead of time makes an engine for all GPUs, which is slower on each.
    named = () if current and capabilities[0] not in library.ahead_of_time else capabilities
    with cache.building(lambda: report("waiting for another build", 0, 0)):
        for part in parts(bundle):
            wanted, started = origin(bundle, part, library, capabilities, limits), time.perf_counter()
            reason, unfused = cache.why_missing(wanted), 0
            if reason is not None:
                report(f"building {part.name}", 0, 0)
                plan = build_engine(
                    library,
                    part.graph,
                    profiles(part.of, part.component, bundle.manifest, limits),
                    max_length=limits.max_length,
                    capabilities=named,
                    memory=memory,
                    timing=cache.timing(library.target, library.version),
                    progress=lambda done, total, name=part.name: report(f"building {name}", done, total),
                )
                cache.store(wanted, plan.engine)
                cache.keep_timing(library.target, library.version, plan.timing)
                unfused = plan.unfused
            path = cache.path(wanted)
            yield Built(part.name, path, path.stat().st_size, reason, time.perf_counter() - started, unfused)
