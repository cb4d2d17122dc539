"""The decoder on a GPU with the interface ``Inference``, for every runtime that can run its graph.

The key/value cache and all inputs and outputs of a step have fixed addresses on the device, so that a step of n rows
can be captured once and then launched. The input ``past`` and the output ``present`` of a layer share one address: a
step writes one slot of the cache and copies nothing. If the bundle has a selection graph, it runs right after the step.
Then a shortlist of each row crosses the bus instead of its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..contract.records import DecoderShape
from .cuda import Array, Device, Memory
from .inference import Choice, FloatArray, Shortlist
from .rows import open_rows

Shape = tuple[int, ...]


class Context(Protocol):
    """One set of addresses and shapes to run a graph with."""

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        """Bind tensors, by name, to their addresses. ``shapes`` has the shapes of all of them."""
        ...

    def run(self) -> None:
        """Queue one run on the device's stream."""
        ...

    def repeatable(self, work: Callable[[], None]) -> Callable[[], None]:
        """A form of ``work`` that can be launched many times while only the contents of the addresses change.

        ``work`` runs this context and has run once before.
        """
        ...


class Program(Protocol):
    """A graph that is loaded on a device. ``inputs`` has the names of its input tensors."""

    @property
    def device(self) -> Device: ...

    @property
    def inputs(self) -> Collection[str]: ...

    def context(self, phase: int) -> Context:
        """A new context for ``PREFILL`` or ``STEP``."""
        ...


PREFILL, STEP = 0, 1


class DeviceInference:
    """``Inference`` over a cache on the device, ``[rows, kv_heads, max_length, head_dim]`` for each layer's keys and
    values. ``chunk``: prompt tokens of one run; ``shortlist``: how many candidates the selection gives."""

    def __init__(
        self,
        decoder: Program,
        selection: Program | None,
        spec: DecoderShape,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        *,
        rows: int,
        max_length: int,
        chunk: int,
        cache_dtype: npt.DTypeLike,
        shortlist: int = 0,
    ) -> None:
        self._decoder, self._spec, self._embed, self._chunk = decoder, spec, embed, chunk
        self._device = device = decoder.device
        self._token_bytes = spec.head_dim * np.dtype(cache_dtype).itemsize
        self._run_bytes = max_length * self._token_bytes
        self._row_bytes = spec.num_kv_heads * self._run_bytes
        names = [f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
        self._cache = {name: device.allocate(rows * self._row_bytes) for name in names}
        for memory in self._cache.values():
            # Slots that were never written are masked, but must hold numbers: zero times NaN is NaN.
            device.zero(memory.address, memory.size)
        most = max(chunk, rows)
        given = {
            "inputs_embeds": device.pinned((most, spec.hidden_size), np.float32),
            "lengths": device.pinned((rows,), np.int32),
            "logits_index": device.pinned((most,), np.int64),
        }
        if spec.positions == "explicit":
            given["position_ids"] = device.pinned((most,), np.int64)
        self._given = _Uploads(device, **given)
        #: Some programs read this on the host when a run is queued. A captured step keeps the value of its capture, so
        #: for steps it is always the largest possible value.
        self._total_length = {phase: np.full((), max_length, np.int32) for phase in (PREFILL, STEP)}
        self._logits = device.pinned((rows, 1, spec.vocab_size), np.float32)
        self._logits_place = device.allocate(self._logits.nbytes)
        self._lengths = open_rows(spec, rows, max_length)
        self._prompt_context = decoder.context(PREFILL)
        self._wide_logits: Memory | None = None
        self._steps: dict[tuple[int, bool], Callable[[], None]] = {}
        self._runs = 0
        self._selection = None if selection is None else Selection(selection, rows, spec.vocab_size, shortlist)

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def max_length(self) -> int:
        return self._lengths.max_length

    @property
    def shortlist_size(self) -> int:
        return 0 if self._selection is None else self._selection.size

    def prefill(
        self,
        row: int,
        embeds: FloatArray,
        num_logits: int = 1,
        progress: Callable[[int], None] | None = None,
        positions: npt.NDArray[np.int64] | None = None,
    ) -> FloatArray:
        chunks = self._lengths.append(row, len(embeds), num_logits, self._chunk, positions)
        self._runs += 1
        logits = np.empty((num_logits, self._spec.vocab_size), np.float32)
        collected, arrays = 0, self._given.arrays
        for chunk in chunks:
            size, asked = chunk.stop - chunk.start, len(chunk.asked)
            arrays["inputs_embeds"][:size] = embeds[chunk.start : chunk.stop]
            arrays["lengths"][0] = self._lengths.filled[row] - 1
            arrays["logits_index"][:asked] = chunk.asked
            self._set_positions(chunk.positions)
            self._total_length[PREFILL][...] = self._lengths.filled[row]
            place = self._prefill_logits(asked)
            self._bind(self._prompt_context, PREFILL, row, 1, size, asked, place.address)
            self._given.queue(**self._counts(1, size, asked))
            self._prompt_context.run()
            if chunk.wanted:
                self._device.download(logits[collected : collected + asked], place.address)
                collected += asked
            # The pinned arrays are written again for the next chunk.
            self._device.synchronize()
            if progress is not None:
                progress(chunk.stop)
        return logits

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        self._run_step(token_ids, select=False)
        return self._logits[: len(token_ids), 0]

    def step_shortlist(self, token_ids: npt.NDArray[np.int64], choices: Sequence[Choice]) -> list[Shortlist]:
        assert self._selection is not None, "the bundle has no selection"
        count = len(token_ids)
        self._selection.ask(choices, count)
        self._run_step(token_ids, select=True)
        run = self._runs

        def fetch() -> FloatArray:
            if self._runs != run:
                raise RuntimeError("the logits of an earlier step are gone")
            self._device.download(self._logits[:count], self._logits_place.address)
            self._device.synchronize()
            return self._logits[:count, 0]

        return self._selection.shortlists(choices, fetch)

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        moves, longest = self._lengths.rearrange(sources, stop)
        if moves:
            self._copy_rows(moves, start, longest)

    def truncate(self, row: int, length: int) -> None:
        self._lengths.truncate(row, length)

    def _run_step(self, token_ids: npt.NDArray[np.int64], select: bool) -> None:
        count, arrays = len(token_ids), self._given.arrays
        positions = self._lengths.step(count)
        self._runs += 1
        arrays["inputs_embeds"][:count] = self._embed(token_ids)
        arrays["lengths"][:count] = self._lengths.filled[:count] - 1
        arrays["logits_index"][:count] = 0
        self._set_positions(positions)
        launch = self._steps.get((count, select))
        if launch is None:
            launch = self._steps[count, select] = self._first_step(count, select)
        else:
            launch()
        self._device.synchronize()

    def _first_step(self, count: int, select: bool) -> Callable[[], None]:
        """Run a step of ``count`` rows and return the function that runs the next ones."""
        context = self._decoder.context(STEP)
        self._bind(context, STEP, 0, count, 1, 1, self._logits_place.address)
        chosen = self._selection.bind(count, self._logits_place.address) if select and self._selection else None
        # No reference to ``self``: it keeps this function, and a cycle would delay the release of the cache.
        given, device, logits, place = self._given, self._device, self._logits[:count], self._logits_place
        counts = self._counts(count, count, count)

        def work() -> None:
            given.queue(**counts)
            context.run()
            if chosen is None:
                device.download(logits, place.address)
            else:
                chosen()

        # The first run sets up what depends on the shapes. That cannot be captured.
        work()
        device.synchronize()
        return context.repeatable(work)

    def _copy_rows(self, moves: Mapping[int, int], start: int, stop: int) -> None:
        if start >= stop:
            return
        heads, at, width = self._spec.num_kv_heads, start * self._token_bytes, stop - start
        width *= self._token_bytes
        # If a row is both source and target, all sources are copied aside first.
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

    def _bind(self, context: Context, phase: int, row: int, rows: int, length: int, asked: int, logits: int) -> None:
        spec = self._spec
        addresses = self._given.addresses | {"logits": logits}
        shapes: dict[str, Shape] = {
            "inputs_embeds": (rows, length, spec.hidden_size),
            "lengths": (rows,),
            "logits_index": (rows, asked),
            "logits": (rows, asked, spec.vocab_size),
        }
        if "position_ids" in self._given.arrays:
            shapes["position_ids"] = (rows, length)
        if "total_length" in self._decoder.inputs:
            addresses["total_length"], shapes["total_length"] = self._total_length[phase].ctypes.data, ()
        for name, memory in self._cache.items():
            for end in (f"past.{name}", f"present.{name}"):
                addresses[end] = memory.address + row * self._row_bytes
                shapes[end] = (rows, spec.num_kv_heads, self.max_length, spec.head_dim)
        context.bind(addresses, shapes)

    def _set_positions(self, positions: npt.NDArray[np.int64]) -> None:
        """Hand over the positions of new tokens, where the decoder takes them."""
        if "position_ids" in self._given.arrays:
            self._given.arrays["position_ids"][: len(positions)] = positions

    def _counts(self, rows: int, tokens: int, asked: int) -> dict[str, int]:
        """The entries of each input that a run uses."""
        counts = {"lengths": rows, "inputs_embeds": tokens, "position_ids": tokens, "logits_index": asked}
        return {name: counts[name] for name in self._given.arrays}

    def _prefill_logits(self, asked: int) -> Memory:
        """Memory on the device for the logits of a chunk. Only forced tokens and scores need more than a step does."""
        if asked <= self.rows:
            return self._logits_place
        size = asked * self._spec.vocab_size * 4
        if self._wide_logits is None or self._wide_logits.size < size:
            self._wide_logits = self._device.allocate(size)
        return self._wide_logits


class Selection:
    """The selection graph (``export/selection.py``), which runs after a step.

    For every row it gives the ``count`` tokens with the best scores. The scores are the logits of the row or their
    contrast with the logits of another row.
    """

    def __init__(self, program: Program, rows: int, vocab_size: int, count: int) -> None:
        self._program, self._device, self._vocab_size, self.size = program, program.device, vocab_size, count
        device = self._device
        self._given = _Uploads(
            device,
            other=device.pinned((rows,), np.int64),
            alpha=device.pinned((rows,), np.float32),
            log_beta=device.pinned((rows,), np.float32),
        )
        self._made: dict[str, Array] = {
            "ids": device.pinned((rows, count), np.int64),
            "scores": device.pinned((rows, count), np.float32),
            "values": device.pinned((rows, count), np.float32),
            "normalizers": device.pinned((rows, 2), np.float32),
        }
        self._places = {name: device.allocate(array.nbytes) for name, array in self._made.items()}

    def ask(self, choices: Sequence[Choice], count: int) -> None:
        """Set how the scores of the first ``count`` rows are computed."""
        arrays = self._given.arrays
        arrays["other"][:count], arrays["alpha"][:count], arrays["log_beta"][:count] = np.arange(count), 0, -np.inf
        for choice in choices:
            if choice.other is not None:
                arrays["other"][choice.row], arrays["alpha"][choice.row] = choice.other, choice.alpha
                arrays["log_beta"][choice.row] = choice.log_beta

    def bind(self, count: int, logits: int) -> Callable[[], None]:
        """The function that queues the selection of the first ``count`` rows.

        ``logits`` is the address of their logits.
        """
        context = self._program.context(STEP)
        addresses = self._given.addresses | {"logits": logits}
        addresses |= {name: place.address for name, place in self._places.items()}
        shapes: dict[str, Shape] = {name: (count,) for name in self._given.arrays}
        shapes |= {name: (count, *array.shape[1:]) for name, array in self._made.items()}
        context.bind(addresses, shapes | {"logits": (count, 1, self._vocab_size)})
        device, given, counts = self._device, self._given, dict.fromkeys(self._given.arrays, count)
        made = [(array[:count], self._places[name]) for name, array in self._made.items()]

        def work() -> None:
            given.queue(**counts)
            context.run()
            for array, place in made:
                device.download(array, place.address)

        return work

    def shortlists(self, choices: Sequence[Choice], fetch: Callable[[], FloatArray]) -> list[Shortlist]:
        """The shortlists of the rows that were asked for. ``fetch`` gets the logits of all rows."""
        return [
            Shortlist(
                ids=self._made["ids"][row],
                scores=self._made["scores"][row],
                logits=self._made["values"][row],
                normalizer=float(self._made["normalizers"][row, 0]),
                score_normalizer=float(self._made["normalizers"][row, 1]),
                fetch=lambda rows=rows: [logits[each] for logits in [fetch()] for each in rows],
            )
            for row, rows in ((choice.row, choice.rows) for choice in choices)
        ]


class _Uploads:
    """Arrays in pinned memory and their addresses on the device."""

    def __init__(self, device: Device, **arrays: Array) -> None:
        self._device, self.arrays = device, arrays
        self._places = {name: device.allocate(array.nbytes) for name, array in arrays.items()}

    @property
    def addresses(self) -> dict[str, int]:
        return {name: place.address for name, place in self._places.items()}

    def queue(self, **counts: int) -> None:
        """Queue the upload of the first entries of each array."""
        for name, count in counts.items():
            self._device.upload(self._places[name].address, self.arrays[name][:count])
