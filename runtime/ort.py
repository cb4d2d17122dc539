"""ONNX Runtime sessions: the encoders as plain functions, the decoder behind the ``Inference`` seam."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.records import DecoderShape
from ..errors import BundleError, OptionError, TargetError
from .guard import leave_to_parent
from .huge_pages import huge_pages
from .inference import FloatArray, FullLogits
from .rows import open_rows

#: Prompt tokens per decoder run. The attention kernel holds one row of scores per head, new token and cached token;
#: 512 keeps that at 170 MB for 28 heads over 3000 tokens, where one run over all of them would take 940 MB.
PREFILL_CHUNK = 512

#: Rows are made a multiple of so many tokens long, so that the next clip, a little longer, finds them long enough, and
#: that there are few sizes: on a GPU cuDNN plans its attention for each.
_LENGTH_STEP = 256

Provider = str | tuple[str, dict[str, str]]
"""An execution provider by name, or with options."""
CPU: tuple[Provider, ...] = ("CPUExecutionProvider",)


def load_onnxruntime() -> Any:
    """The module ``onnxruntime``, without telemetry. ``TargetError`` where it is not installed."""
    # The Linux builds send telemetry unless told not to (ONNX Runtime 1.29); read at import time.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise TargetError(
            "ONNX Runtime is not installed; install one of the extras: pip install 'intertitle[cpu]'"
        ) from None
    return onnxruntime


def open_session(graph: Path, threads: int | None = None, providers: Sequence[Provider] = CPU) -> Any:
    """An ``onnxruntime.InferenceSession`` on the given providers. ``BundleError`` when the graph cannot be loaded."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # The fallback prints to stdout, and would only try the same again.
        session = ort.InferenceSession(os.fspath(graph), options, providers=list(providers), enable_fallback=0)
        return leave_to_parent(session)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        reason = " ".join(str(error).split())
        raise BundleError(f"{graph.name}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from error


def cannot_run(graph: str, error: Exception) -> BundleError:
    """What ONNX Runtime's error for a graph that fails on its inputs becomes."""
    return BundleError(f"{graph}: ONNX Runtime cannot run it: {' '.join(str(error).split())}")


class OrtComponent:
    """A stage's graph: one or several inputs, one output."""

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        self._session, self._name = open_session(graph, threads), graph.name
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._run_options = load_onnxruntime().RunOptions()
        # Activations of the encoders are large and needed once a clip: hand them back after each run.
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def __call__(self, *values: FloatArray) -> FloatArray:
        """Run on one float32 array for each input; shapes are those of the bundle's component."""
        given = {name: np.ascontiguousarray(value) for name, value in zip(self._inputs, values, strict=True)}
        try:
            return self._session.run(None, given, self._run_options)[0]
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise cannot_run(self._name, error) from error


class OrtDecoder:
    """The decoder graph, from which any number of caches can be opened."""

    def __init__(
        self,
        graph: Path,
        spec: DecoderShape,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        threads: int | None = None,
        cache_dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.spec, self.embed, self._cache_dtype = spec, embed, cache_dtype
        with huge_pages():
            self.session = open_session(graph, threads)

    @property
    def most_rows(self) -> int | None:
        """Any number."""
        return None

    def row_length(self, wanted: int) -> int:
        """``wanted`` tokens rounded up."""
        return rounded_length(wanted, self.spec)

    def open(self, rows: int, max_length: int) -> OrtInference:
        """A fresh cache. ``OptionError`` when ``max_length`` exceeds what the decoder was trained for."""
        check_context(max_length, self.spec)
        return OrtInference(self.session, self.spec, self.embed, rows, max_length, self._cache_dtype)


def rounded_length(wanted: int, spec: DecoderShape) -> int:
    """``wanted`` tokens of a row rounded up, at most to the decoder's context."""
    return min(-(-wanted // _LENGTH_STEP) * _LENGTH_STEP, max(spec.context_length, wanted))


def check_context(max_length: int, spec: DecoderShape) -> None:
    """``OptionError`` for rows longer than what a decoder was trained for."""
    if max_length > spec.context_length:
        raise OptionError(
            f"prompt and caption may take {max_length} tokens, but the decoder's context is {spec.context_length}; ask "
            "for fewer new tokens or a shorter prompt"
        )


class OrtInference(FullLogits):
    """``Inference`` over one shared past/present buffer, all inputs and outputs bound once.

    The cache is one array ``[rows, kv_heads, max_length, head_dim]`` for each layer's keys and values, bound as past
    and present at once, so that a step writes one slot of it and copies nothing.
    """

    def __init__(
        self,
        session: Any,
        spec: DecoderShape,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        rows: int,
        max_length: int,
        cache_dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._session, self._spec, self._embed = session, spec, embed
        shape = (rows, spec.num_kv_heads, max_length, spec.head_dim)
        names = [f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
        self._cache = {name: np.zeros(shape, cache_dtype) for name in names}
        self._lengths = open_rows(spec, rows, max_length)
        self._steps: dict[int, _Bound] = {}

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def max_length(self) -> int:
        return self._lengths.max_length

    def prefill(
        self,
        row: int,
        embeds: FloatArray,
        num_logits: int = 1,
        progress: Callable[[int], None] | None = None,
        positions: npt.NDArray[np.int64] | None = None,
    ) -> FloatArray:
        collected = []
        for chunk in self._lengths.append(row, len(embeds), num_logits, PREFILL_CHUNK, positions):
            bound = self._bind(slice(row, row + 1), chunk.stop - chunk.start, len(chunk.asked))
            bound.embeds[0], bound.logits_index[0] = embeds[chunk.start : chunk.stop], chunk.asked
            bound.position_ids[0] = chunk.positions
            bound.lengths[0], bound.total_length[...] = self._lengths.filled[row] - 1, self._lengths.filled[row]
            self._session.run_with_iobinding(bound.binding)
            if progress is not None:
                progress(chunk.stop)
            if chunk.wanted:
                collected.append(bound.logits[0])
        return collected[0] if len(collected) == 1 else np.concatenate(collected)

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        count = len(token_ids)
        positions = self._lengths.step(count)
        if count not in self._steps:
            self._steps[count] = self._bind(slice(0, count), length=1, asked=1)
        bound, filled = self._steps[count], self._lengths.filled[:count]
        bound.embeds[:, 0] = self._embed(token_ids)
        bound.lengths[:] = filled - 1
        bound.total_length[...] = filled.max()
        bound.position_ids[:, 0] = positions
        self._session.run_with_iobinding(bound.binding)
        return bound.logits[:, 0]

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        moves, longest = self._lengths.rearrange(sources, stop)
        targets, origins = list(moves), list(moves.values())
        for buffer in self._cache.values() if moves else ():
            if len(targets) == 1:
                buffer[targets[0], :, start:longest] = buffer[origins[0], :, start:longest]
            else:
                # The right side is copied out whole before anything is overwritten.
                buffer[targets, :, start:longest] = buffer[origins, :, start:longest]

    def truncate(self, row: int, length: int) -> None:
        self._lengths.truncate(row, length)

    def _bind(self, rows: slice, length: int, asked: int) -> _Bound:
        return _Bound(
            self._session, {name: buffer[rows] for name, buffer in self._cache.items()}, self._spec, length, asked
        )


class _Bound:
    """One set of input and output arrays and the binding that points at them.

    On the CPU an OrtValue made of a NumPy array is the array itself, so writing into the arrays is all that a run
    needs; the arrays are kept alive here as long as the binding.
    """

    def __init__(
        self, session: Any, cache: dict[str, npt.NDArray[Any]], spec: DecoderShape, length: int, asked: int
    ) -> None:
        rows = next(iter(cache.values())).shape[0]
        self.embeds: FloatArray = np.zeros((rows, length, spec.hidden_size), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.total_length = np.zeros((), np.int32)
        self.logits_index = np.zeros((rows, asked), np.int64)
        self.position_ids = np.zeros((rows, length), np.int64)
        self.logits: FloatArray = np.zeros((rows, asked, spec.vocab_size), np.float32)
        self.binding = session.io_binding()
        value_of = load_onnxruntime().OrtValue.ortvalue_from_numpy
        inputs = {
            "inputs_embeds": self.embeds,
            "lengths": self.lengths,
            "total_length": self.total_length,
            "logits_index": self.logits_index,
            **({"position_ids": self.position_ids} if spec.positions == "explicit" else {}),
        }
        self._values = []
        for name, array in inputs.items():
            value = value_of(array)
            self._values.append(value)
            self.binding.bind_ortvalue_input(name, value)
        value = value_of(self.logits)
        self._values.append(value)
        self.binding.bind_ortvalue_output("logits", value)
        for name, buffer in cache.items():
            value = value_of(buffer)
            self._values.append(value)
            self.binding.bind_ortvalue_input(f"past.{name}", value)
            self.binding.bind_ortvalue_output(f"present.{name}", value)
        self._cache = cache
