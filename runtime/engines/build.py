"""One graph of a bundle into a serialized engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TargetError
from .axes import fix_axis
from .library import Library
from .shapes import Profile

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and the timing cache as its build leaves it (empty where the library keeps none).

    ``unfused``: attention layers for which there is no kernel of their own, and which run as the products and the
    softmax that they are made of.
    """

    engine: bytes
    timing: bytes
    unfused: int = 0


def build_engine(
    library: Library,
    graph: Path,
    profiles: Sequence[Profile],
    *,
    max_length: int,
    capabilities: Sequence[str] = (),
    memory: int | None = None,
    timing: bytes = b"",
    progress: Progress | None = None,
) -> Plan:
    """The engine of a graph.

    ``max_length``: the size of the axis of that name. ``capabilities``: those of ``parse_capabilities``, none for the
    GPU at hand. ``memory``: bytes of working memory that layers may take. ``progress`` hears of TensorRT's own steps
    of its outermost phases; an exception in it stops the build and is raised.
    Raises ``TargetError`` with TensorRT's first complaint where the graph is refused or no engine comes of it.
    """
    trt, heard = library.module, list[str]()
    logger = library.logger(heard)
    builder = trt.Builder(logger)
    if builder is None:
        raise TargetError(f"{library.target}: {_first(heard, 'no builder')}")
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    # The path is where the parser looks for the weights beside the graph.
    if not parser.parse(fix_axis(graph.read_bytes(), "max_length", max_length), str(graph)):
        complaints = [_complaint(parser.get_error(i)) for i in range(parser.num_errors)]
        raise TargetError(f"{graph.name}: {library.target} {library.version} refuses it: {_first(complaints, '?')}")
    for index in range(network.num_inputs):
        _fix_cache(network.get_input(index), max_length)
    config = builder.create_builder_config()
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            wanted = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}")
            if not config.set_compute_capability(wanted, index):
                raise TargetError(f"{library.target} {library.version} does not build for compute capability {name}")
    if memory is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory)
    # A library that builds for GPUs that are not there times no kernels.
    times = not library.ahead_of_time
    # Times of another GPU are refused, and new ones taken.
    if times and not config.set_timing_cache(config.create_timing_cache(timing), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan, unfused = builder.build_serialized_network(network, config), 0
    if plan is None and monitor.error is None:
        # Attention is fused or the build fails, unless it may be taken apart.
        unfused = _take_apart(trt, network)
        plan = builder.build_serialized_network(network, config) if unfused else None
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise TargetError(f"{graph.name}: {library.target} {library.version} builds no engine: {_first(heard, '?')}")
    taken = config.get_timing_cache() if times else None
    return Plan(bytes(plan), bytes(taken.serialize()) if taken is not None else b"", unfused)


def _take_apart(trt: Any, network: Any) -> int:
    """Let every attention layer be computed by others; returns how many there are."""
    found = 0
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            # How TensorRT's interface wants a layer to be told that it is of its kind.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            found += 1
    return found


def _strongly_typed(trt: Any) -> int:
    """Types are those of the graph. TensorRT 10 wants to be told, 11 knows nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _fix_cache(tensor: Any, max_length: int) -> None:
    if tensor.name.startswith("past."):
        rows, heads, _, width = tensor.shape
        tensor.shape = (rows, heads, max_length, width)


def _complaint(error: Any) -> str:
    return " ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".split())


def _first(complaints: Sequence[str], otherwise: str) -> str:
    return complaints[0] if complaints else otherwise


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """TensorRT's progress as ``(done, total)`` of the phase that is outermost.

    It calls from its own threads, where an exception would end the process: it is kept, and the build is told to stop.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._totals[phase_name] = num_steps
                self._tell(0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._totals:
                self._tell(step + 1, self._totals[phase_name])
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

        def _tell(self, done: int, total: int) -> None:
            if progress is not None and self.error is None:
                try:
                    progress(done, total)
                except BaseException as error:  # handed to the caller of the build
                    self.error = error

    return Monitor()
