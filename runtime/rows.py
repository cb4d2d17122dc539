"""How full the rows of a static cache are, and at which positions: shared by every implementation of ``Inference``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..contract.records import DecoderShape
from ..errors import OptionError

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """New tokens ``start`` to ``stop`` of a prompt, and the indices among them to project to the vocabulary (int64).

    A run projects something: where nothing is ``wanted`` its last token, and the logits are dropped. ``positions``
    int64 ``[..., stop - start]``: of the new tokens.
    """

    start: int
    stop: int
    asked: npt.NDArray[np.int64]
    wanted: bool
    positions: Positions


class FilledRows:
    """``filled`` int64 ``[rows]``: tokens that each row holds, of ``max_length`` it has room for.

    The position of a token is its place in the row.
    """

    def __init__(self, rows: int, max_length: int) -> None:
        self.filled, self.max_length = np.zeros(rows, np.int64), max_length

    def __len__(self) -> int:
        return len(self.filled)

    def check_room(self, row: int, count: int) -> None:
        """``OptionError`` unless ``count`` more tokens fit into a row."""
        if self.filled[row] + count > self.max_length:
            raise OptionError(
                f"the cache holds {self.max_length} tokens a row; row {row} has {self.filled[row]}, "
                f"{count} more are asked"
            )

    def append(
        self, row: int, length: int, num_logits: int, chunk: int, positions: Positions | None = None
    ) -> Iterator[Chunk]:
        """The runs in which a row takes in ``length`` tokens, ``chunk`` at a time, of the last ``num_logits`` of which
        logits are wanted; it is as much fuller when each is given.

        ``positions`` as ``Inference.prefill`` has them. ``OptionError`` unless the tokens and their positions fit;
        ``ValueError`` for logits or positions of other than these tokens.
        """
        if not 1 <= num_logits <= length:
            raise ValueError(f"num_logits is {num_logits} for {length} new tokens")
        self.check_room(row, length)
        return self._chunks(row, num_logits, chunk, self._positions(row, length, positions))

    def _positions(self, row: int, length: int, given: Positions | None) -> Positions:
        """The positions of the next ``length`` tokens of a row."""
        if given is not None:
            raise ValueError("the positions of this decoder are places in the row")
        return self.filled[row] + np.arange(length)

    def _chunks(self, row: int, num_logits: int, chunk: int, positions: Positions) -> Iterator[Chunk]:
        length = positions.shape[-1]
        for start in range(0, length, chunk):
            size = min(chunk, length - start)
            first = max(0, length - num_logits - start)
            self.filled[row] += size
            wanted = first < size
            asked = np.arange(first, size) if wanted else np.array([size - 1])
            yield Chunk(start, start + size, asked, wanted, positions[..., start : start + size])

    def step(self, count: int) -> Positions:
        """Each of the first ``count`` rows takes one more token: their positions int64 ``[count]``.

        ``OptionError`` unless they fit; ``ValueError`` for other rows.
        """
        if not 1 <= count <= len(self.filled):
            raise ValueError(f"{count} tokens for {len(self.filled)} rows")
        for row in range(count):
            self.check_room(row, 1)
        positions = self._step_positions(count)
        self.filled[:count] += 1
        return positions

    def _step_positions(self, count: int) -> Positions:
        return self.filled[:count].copy()

    def rearrange(self, sources: Mapping[int, int], stop: int | None) -> tuple[dict[int, int], int]:
        """Rows become as full as the ones they copy (``Inference.rearrange``); the copies to make, source by target,
        and the tokens of the longest."""
        moves = {target: source for target, source in sources.items() if target != source}
        longest = 0
        if moves:
            filled = self.filled[list(moves.values())]
            filled = filled if stop is None else np.minimum(filled, stop)
            self.filled[list(moves)] = filled
            longest = int(filled.max())
        if stop is not None:
            for row in set(sources) - set(moves):
                self.filled[row] = min(self.filled[row], stop)
        return moves, longest

    def truncate(self, row: int, length: int) -> None:
        """See ``Inference.truncate``."""
        if not 0 <= length <= self.filled[row]:
            raise ValueError(f"row {row} holds {self.filled[row]} tokens, cannot keep {length}")
        self.filled[row] = length


class PositionedRows(FilledRows):
    """Rows whose tokens have positions of their own, all below ``context_length``.

    Beside its length, a row knows the position of its next token: one above its highest so far.
    """

    def __init__(self, rows: int, max_length: int, context_length: int) -> None:
        super().__init__(rows, max_length)
        self._context_length = context_length
        #: ``[row, n]``: the position of the token that follows the first n. For every n, because rows are cut.
        self._next = np.zeros((rows, max_length + 1), np.int64)

    def _positions(self, row: int, length: int, given: Positions | None) -> Positions:
        before = int(self.filled[row])
        first = self._next[row, before]
        positions = first + np.arange(length) if given is None else np.asarray(given, np.int64)
        if positions.shape[-1:] != (length,) or positions.min() < 0:
            raise ValueError(f"positions of shape {list(positions.shape)} for {length} new tokens, or below 0")
        self._check_context(positions)
        highest = np.maximum.accumulate(positions.reshape(-1, length).max(axis=0))
        self._next[row, before + 1 : before + length + 1] = np.maximum(highest + 1, first)
        return positions

    def _step_positions(self, count: int) -> Positions:
        rows, filled = np.arange(count), self.filled[:count]
        positions = self._next[rows, filled]
        self._check_context(positions)
        self._next[rows, filled + 1] = positions + 1
        return positions

    def rearrange(self, sources: Mapping[int, int], stop: int | None) -> tuple[dict[int, int], int]:
        moves, longest = super().rearrange(sources, stop)
        if moves:
            self._next[list(moves), : longest + 1] = self._next[list(moves.values()), : longest + 1]
        return moves, longest

    def _check_context(self, positions: Positions) -> None:
        if (most := int(positions.max())) >= self._context_length:
            raise OptionError(
                f"a token would have the position {most}, but the decoder's context is {self._context_length}"
            )


def open_rows(shape: DecoderShape, rows: int, max_length: int) -> FilledRows:
    """Empty rows for the cache of a decoder."""
    if shape.positions == "explicit":
        return PositionedRows(rows, max_length, shape.context_length)
    return FilledRows(rows, max_length)
