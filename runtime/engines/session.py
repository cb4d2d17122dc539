"""Engines at work: the encoders as plain functions, the decoder behind the ``Inference`` seam.

The key/value cache and everything that a step reads or writes have fixed places on the device, so that a step of n rows
is captured once as a CUDA graph and then launched. A layer's cache is the input ``past`` and the output ``present`` of
the engine at one address: a step writes one slot of it and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import OptionError, TargetError
from ..bundle import Component, DecoderSpec
from ..inference import FloatArray
from ..rows import FilledRows
from .cuda import Device, Memory
from .library import Library
from .shapes import Limits

_PREFILL, _STEP = 0, 1
"""The decoder's optimization profiles (``shapes.profiles``)."""


class Engine:
    """A deserialized engine."""

    def __init__(self, library: Library, device: Device, plan: bytes, name: str) -> None:
        """``TargetError`` where TensorRT does not take the plan: another version, another GPU, too little memory."""
        self._module, self.device, self.name, self._heard = library.module, device, name, list[str]()
        self._runtime = self._module.Runtime(library.logger(self._heard))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error("TensorRT does not load the engine")

    def context(self, profile: int = 0) -> Context:
        """A new execution context. A captured graph is tied to the state of its context, so each needs its own."""
        # Activations for this profile only: a step's are a thousandth of a prompt's.
        strategy = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.error("the GPU has too little memory for the engine's activations")
        if self._engine.num_optimization_profiles > 1 or profile:
            if not context.set_optimization_profile_async(profile, self.device.stream):
                raise self.error(f"profile {profile} cannot be chosen")
            self.device.synchronize()
        return Context(self, context)

    def error(self, what: str) -> TargetError:
        """With TensorRT's own words, where it said any."""
        return TargetError(f"{self.name}: {what}{f' ({self._heard[0]})' if self._heard else ''}")


class Context:
    """One set of shapes and addresses to run an engine with."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self._engine, self._context = engine, context

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Tensors to their addresses, inputs to their shapes; what is not named stays."""
        for name, shape in (shapes or {}).items():
            if not self._context.set_input_shape(name, shape):
                raise self._engine.error(f"{name} cannot have the shape {list(shape)}")
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.error(f"{name} cannot be bound")

    def shape(self, name: str) -> tuple[int, ...]:
        """An output's shape, which follows from the inputs'."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self) -> None:
        """Queue one run."""
        if not self._context.execute_async_v3(self._engine.device.stream):
            raise self._engine.error("the engine did not run")


class EngineComponent:
    """An encoder with one input and one output, both float32 on the host."""

    def __init__(self, engine: Engine, component: Component) -> None:
        self._context, self._device = engine.context(), engine.device
        (given,), (made,) = component.inputs, component.outputs
        self._input, self._output = given.name, made.name
        self._held: dict[str, Memory] = {}

    def __call__(self, value: FloatArray) -> FloatArray:
        value = np.ascontiguousarray(value, np.float32)
        source = self._memory(self._input, value.nbytes)
        self._context.bind({self._input: source}, {self._input: value.shape})
        result = np.empty(self._context.shape(self._output), np.float32)
        target = self._memory(self._output, result.nbytes)
        self._context.bind({self._output: target})
        self._device.upload(source, value)
        self._context.run()
        self._device.download(result, target)
        self._device.synchronize()
        return result

    def _memory(self, name: str, size: int) -> int:
        """Memory for a tensor, kept for the next clip, which is mostly as large."""
        held = self._held.get(name)
        if held is None or held.size < size:
            self._held.pop(name, None)
            held = self._held[name] = self._device.allocate(size)
        return held.address


class EngineDecoder:
    """The decoder's engine, from which any number of caches can be opened."""

    def __init__(
        self,
        engine: Engine,
        component: Component,
        spec: DecoderSpec,
        limits: Limits,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
    ) -> None:
        self.engine, self.spec, self.limits, self.embed = engine, spec, limits, embed
        past = next(value for value in component.inputs if value.name.startswith("past."))
        self.cache_dtype = np.dtype(past.dtype)

    @property
    def longest(self) -> int:
        """Tokens that a row holds: what the engine was built for."""
        return self.limits.max_length

    def open(self, rows: int, max_length: int) -> EngineInference:
        """A fresh cache. ``OptionError`` for more than the engine was built for."""
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
        return EngineInference(self, rows)


class EngineInference:
    """``Inference`` over a cache on the device, ``[rows, kv_heads, max_length, head_dim]`` for each layer's keys and
    values. ``max_length`` is the engine's."""

    def __init__(self, decoder: EngineDecoder, rows: int) -> None:
        self._decoder, self._device = decoder, decoder.engine.device
        spec, limits, device = decoder.spec, decoder.limits, self._device
        self._token_bytes = spec.head_dim * decoder.cache_dtype.itemsize
        self._run_bytes = limits.max_length * self._token_bytes
        self._row_bytes = spec.num_kv_heads * self._run_bytes
        names = [f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
        self._cache = {name: device.allocate(rows * self._row_bytes) for name in names}
        for memory in self._cache.values():
            # What was never written is masked, but must be a number: zero times NaN is NaN.
            device.zero(memory.address, memory.size)
        most = max(limits.chunk, rows)
        self._host = {
            "inputs_embeds": device.pinned((most, spec.hidden_size), np.float32),
            "lengths": device.pinned((rows,), np.int32),
            "logits_index": device.pinned((most,), np.int64),
        }
        self._places = {name: device.allocate(array.nbytes) for name, array in self._host.items()}
        self._logits = device.pinned((rows, 1, spec.vocab_size), np.float32)
        self._logits_place = device.allocate(self._logits.nbytes)
        self._lengths = FilledRows(rows, limits.max_length)
        self._prompt_context = decoder.engine.context(_PREFILL)
        self._wide_logits: Memory | None = None
        self._steps: dict[int, Callable[[], None]] = {}

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def max_length(self) -> int:
        return self._lengths.max_length

    def prefill(
        self, row: int, embeds: FloatArray, num_logits: int = 1, progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        length, chunk, spec = len(embeds), self._decoder.limits.chunk, self._decoder.spec
        if not 1 <= num_logits <= length:
            raise ValueError(f"num_logits is {num_logits} for {length} new tokens")
        self._lengths.check_room(row, length)
        logits = np.empty((num_logits, spec.vocab_size), np.float32)
        collected = 0
        for start in range(0, length, chunk):
            part = embeds[start : start + chunk]
            # A chunk without a position whose logits were asked for projects its last one, and that is dropped.
            first = max(0, length - num_logits - start)
            asked = np.arange(first, len(part)) if first < len(part) else np.array([len(part) - 1])
            self._lengths.filled[row] += len(part)
            self._host["inputs_embeds"][: len(part)] = part
            self._host["lengths"][0] = self._lengths.filled[row] - 1
            self._host["logits_index"][: len(asked)] = asked
            place = self._prefill_logits(len(asked))
            self._bind(self._prompt_context, row, 1, len(part), len(asked), place.address)
            self._upload(1, len(part), len(asked))
            self._prompt_context.run()
            if first < len(part):
                self._device.download(logits[collected : collected + len(asked)], place.address)
                collected += len(asked)
            # The pinned arrays are written again for the next chunk.
            self._device.synchronize()
            if progress is not None:
                progress(start + len(part))
        return logits

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        count = len(token_ids)
        self._lengths.check_step(count)
        self._host["inputs_embeds"][:count] = self._decoder.embed(token_ids)
        self._host["lengths"][:count] = self._lengths.filled[:count]
        self._host["logits_index"][:count] = 0
        self._lengths.filled[:count] += 1
        launch = self._steps.get(count)
        if launch is None:
            context = self._decoder.engine.context(_STEP)
            self._bind(context, 0, count, 1, 1, self._logits_place.address)
            # The first run settles what follows from the shapes, which cannot be captured.
            self._work(count, context)
            self._device.synchronize()
            self._steps[count] = self._device.capture(lambda: self._work(count, context))
        else:
            launch()
            self._device.synchronize()
        return self._logits[:count, 0]

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        moves, longest = self._lengths.rearrange(sources, stop)
        if moves:
            self._copy_rows(moves, start, longest)

    def truncate(self, row: int, length: int) -> None:
        self._lengths.truncate(row, length)

    def _copy_rows(self, moves: Mapping[int, int], start: int, stop: int) -> None:
        if start >= stop:
            return
        heads, at, width = self._decoder.spec.num_kv_heads, start * self._token_bytes, stop - start
        width *= self._token_bytes
        # Where a row is both source and target, all sources are set aside first.
        aside = bool(set(moves) & set(moves.values()))
        spare = self._device.allocate(len(moves) * self._row_bytes) if aside else None
        for memory in self._cache.values():
            places = {target: memory.address + source * self._row_bytes + at for target, source in moves.items()}
            if spare is not None:
                for number, target in enumerate(moves):
                    kept = spare.address + number * self._row_bytes
                    self._device.copy(kept, places[target], width, heads, self._run_bytes)
                    places[target] = kept
            for target, place in places.items():
                target_place = memory.address + target * self._row_bytes + at
                self._device.copy(target_place, place, width, heads, self._run_bytes)
        if spare is not None:
            self._device.synchronize()  # before it is freed

    def _work(self, count: int, context: Context) -> None:
        self._upload(count, count, count)
        context.run()
        self._device.download(self._logits[:count], self._logits_place.address)

    def _upload(self, rows: int, embeds: int, asked: int) -> None:
        for name, count in (("inputs_embeds", embeds), ("lengths", rows), ("logits_index", asked)):
            self._device.upload(self._places[name].address, self._host[name][:count])

    def _bind(self, context: Context, row: int, rows: int, length: int, asked: int, logits: int) -> None:
        spec = self._decoder.spec
        addresses = {name: place.address for name, place in self._places.items()} | {"logits": logits}
        shapes: dict[str, tuple[int, ...]] = {
            "inputs_embeds": (rows, length, spec.hidden_size),
            "lengths": (rows,),
            "logits_index": (rows, asked),
        }
        for name, memory in self._cache.items():
            place = memory.address + row * self._row_bytes
            addresses |= {f"past.{name}": place, f"present.{name}": place}
            shapes[f"past.{name}"] = (rows, spec.num_kv_heads, self.max_length, spec.head_dim)
        context.bind(addresses, shapes)

    def _prefill_logits(self, asked: int) -> Memory:
        """Room on the device for the logits of a chunk: that of a step is enough but for forced tokens and scores."""
        if asked <= self.rows:
            return self._logits_place
        size = asked * self._decoder.spec.vocab_size * 4
        if self._wide_logits is None or self._wide_logits.size < size:
            self._wide_logits = self._device.allocate(size)
        return self._wide_logits
