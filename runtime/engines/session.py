"""Run engines: the encoders as plain functions, the decoder as a ``Program`` of ``device_decoder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contract.manifest import Component
from ...contract.records import DecoderShape
from ...errors import OptionError, TargetError
from ..cuda import Device, Memory
from ..device_decoder import STEP, DeviceInference
from ..inference import FloatArray
from .library import Library
from .shapes import Limits


class Engine:
    """A deserialized engine; a ``Program``. If it has several profiles, they are the phases (``shapes.profiles``).

    ``captured``: whether its steps are captured.
    """

    def __init__(self, library: Library, device: Device, plan: bytes, name: str) -> None:
        """``TargetError`` if TensorRT refuses the plan: another version, another GPU, too little memory."""
        self._module, self.device, self.name, self._heard = library.module, device, name, list[str]()
        self.captured = True
        self._runtime = self._module.Runtime(library.logger(self._heard))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error("TensorRT does not load the engine")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        given = self._module.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == given]
        #: Kernels that one context compiled, for the next one. Some libraries compile kernels on the GPU.
        self._compiled: Any = None

    def context(self, phase: int = 0) -> EngineContext:
        """A new execution context. A captured graph depends on the state of its context, so each needs its own."""
        context = self._engine.create_execution_context(self._settings(phase))
        if context is None:
            raise self.error("the GPU has too little memory for the engine's activations")
        if self._engine.num_optimization_profiles > 1:
            if not context.set_optimization_profile_async(phase, self.device.stream):
                raise self.error(f"profile {phase} cannot be chosen")
            self.device.synchronize()
        return EngineContext(self, context)

    def _settings(self, phase: int) -> Any:
        """The settings of a new context, in the form of this library."""
        # Allocate activations for this profile only: those of a step are a thousandth of those of a prompt.
        strategy = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if not hasattr(self._engine, "create_runtime_config"):
            return strategy
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        if hasattr(settings, "dynamic_shapes_kernel_specialization_strategy"):
            if phase == STEP:
                # By default the first run uses kernels for any shape while better ones are compiled in the background.
                # A captured graph would keep the slow ones. For prompts, whose lengths differ, the default is right.
                eager = self._module.DynamicShapesKernelSpecializationStrategy.EAGER
                settings.dynamic_shapes_kernel_specialization_strategy = eager
            if self._compiled is None:
                self._compiled = settings.create_runtime_cache()
            settings.set_runtime_cache(self._compiled)
        return settings

    def error(self, what: str) -> TargetError:
        """An error with TensorRT's last message, if there is one."""
        return TargetError(f"{self.name}: {what}{f' ({self._heard[-1]})' if self._heard else ''}")


class EngineContext:
    """One set of shapes and addresses with which an engine runs."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self._engine, self._context = engine, context

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Bind tensors to addresses and set the shapes of inputs; output shapes follow. Other tensors stay bound."""
        for name in self._engine.inputs:
            if name in shapes and not self._context.set_input_shape(name, shapes[name]):
                raise self._engine.error(f"{name} cannot have the shape {list(shapes[name])}")
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.error(f"{name} cannot be bound")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output, which follows from the shapes of the inputs."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self) -> None:
        """Queue one run."""
        if not self._context.execute_async_v3(self._engine.device.stream):
            raise self._engine.error("the engine did not run")

    def repeatable(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` as a captured graph, or ``work`` itself if it cannot be captured (see the engine's ``captured``)."""
        try:
            return self._engine.device.capture(work)
        except TargetError:
            self._engine.captured = False
            return work


class EngineComponent:
    """A stage's engine: one or several inputs and one output, all float32 in host memory."""

    def __init__(self, engine: Engine, component: Component) -> None:
        self._context, self._device = engine.context(), engine.device
        self._inputs, (made,) = [value.name for value in component.inputs], component.outputs
        self._output = made.name
        self._held: dict[str, Memory] = {}

    def __call__(self, *values: FloatArray) -> FloatArray:
        given = {
            name: np.ascontiguousarray(value, np.float32) for name, value in zip(self._inputs, values, strict=True)
        }
        sources = {name: self._memory(name, value.nbytes) for name, value in given.items()}
        self._context.bind(sources, {name: value.shape for name, value in given.items()})
        result = np.empty(self._context.shape(self._output), np.float32)
        target = self._memory(self._output, result.nbytes)
        self._context.bind({self._output: target}, {})
        for name, value in given.items():
            self._device.upload(sources[name], value)
        self._context.run()
        self._device.download(result, target)
        self._device.synchronize()
        return result

    def _memory(self, name: str, size: int) -> int:
        """Memory for a tensor. It is kept for the next clip, which mostly has the same size."""
        held = self._held.get(name)
        if held is None or held.size < size:
            self._held.pop(name, None)
            held = self._held[name] = self._device.allocate(size)
        return held.address


class EngineDecoder:
    """The engines of the decoder and of the selection. Any number of caches can be opened on them."""

    def __init__(
        self,
        engine: Engine,
        selection: Engine | None,
        spec: DecoderShape,
        limits: Limits,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        *,
        cache_dtype: npt.DTypeLike,
        shortlist: int,
    ) -> None:
        self._engine, self._selection, self.spec, self.limits, self._embed = engine, selection, spec, limits, embed
        self._cache_dtype, self._shortlist = cache_dtype, shortlist

    @property
    def most_rows(self) -> int:
        """The rows of a step, as the engine was built."""
        return self.limits.rows

    def row_length(self, wanted: int) -> int:
        """The tokens of every row, as the engine was built; ``wanted`` if they are too few."""
        return max(self.limits.max_length, wanted)

    def open(self, rows: int, max_length: int) -> DeviceInference:
        """A new cache with the length of the engine. ``OptionError`` for more than the engine was built for."""
        limits = self.limits
        if max_length > limits.max_length:
            raise OptionError(
                f"prompt and caption may take {max_length} tokens, the engine was built for {limits.max_length}: ask "
                f"for fewer new tokens, or run intertitle build --max-length {max_length}"
            )
        if rows > limits.rows:
            raise OptionError(
                f"{rows} rows are asked for, the engine was built for {limits.rows}: run intertitle build --rows {rows}"
            )
        return DeviceInference(
            self._engine,
            self._selection,
            self.spec,
            self._embed,
            rows=rows,
            max_length=limits.max_length,
            chunk=limits.chunk,
            cache_dtype=self._cache_dtype,
            shortlist=self._shortlist,
        )
