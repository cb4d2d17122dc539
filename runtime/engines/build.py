"""Build one graph of a bundle into a serialized engine."""

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
    """A serialized engine and the timing cache after its build (empty if the library has none).

    ``unfused``: the number of attention layers without a fused kernel. They run as separate matmuls and a softmax.
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

    ``max_length``: the size of the axis of that name. ``capabilities``: the result of ``parse_capabilities``; empty
    for the GPU of this machine. ``memory``: the most bytes of temporary memory of a layer. ``progress`` gets the steps
    of TensorRT's outermost phases; an exception in it stops the build and is raised.
    Raises ``TargetError`` with TensorRT's first complaint if it refuses the graph or builds no engine.
    """
    trt, heard = library.module, list[str]()
    logger = library.logger(heard)
    builder = trt.Builder(logger)
    if builder is None:
        raise TargetError(f"{library.target}: {_first(heard, 'no builder')}")
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    # The parser looks for the weights beside this path.
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
    # A library that builds for absent GPUs does not time kernels.
    times = not library.ahead_of_time
    # The times of another GPU are refused; the build then measures new ones.
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
        # The build fails if attention cannot be fused, unless we allow its decomposition.
        unfused = _take_apart(trt, network)
        plan = builder.build_serialized_network(network, config) if unfused else None
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise TargetError(f"{graph.name}: {library.target} {library.version} builds no engine: {_first(heard, '?')}")
    taken = config.get_timing_cache() if times else None
    return Plan(bytes(plan), bytes(taken.serialize()) if taken is not None else b"", unfused)


def _take_apart(trt: Any, network: Any) -> int:
    """Allow the decomposition of every attention layer; returns the number of these layers."""
    found = 0
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            # TensorRT's Python interface has no other way to cast a layer.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            found += 1
    return found


def _strongly_typed(trt: Any) -> int:
    """The flag for a network with the types of the graph. TensorRT 10 needs it; 11 has no other networks."""
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
    """TensorRT's progress as ``(done, total)`` of the outermost phase.

    TensorRT calls it from its own threads, where an exception would end the process. So the exception is kept and the
    build is stopped.
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
