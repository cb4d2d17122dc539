"""How full the rows of a static cache are: the bookkeeping that every implementation of ``Inference`` shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import OptionError


@dataclass(frozen=True)
class Chunk:
    """New tokens ``start`` to ``stop`` of a prompt, and the positions among them to project to the vocabulary (int64).

    A run projects something: where nothing is ``wanted`` its last position, and the logits are dropped.
    """

    start: int
    stop: int
    asked: npt.NDArray[np.int64]
    wanted: bool


class FilledRows:
    """``filled`` int64 ``[rows]``: tokens that each row holds, of ``max_length`` it has room for."""

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

    def append(self, row: int, length: int, num_logits: int, chunk: int) -> Iterator[Chunk]:
        """The runs in which a row takes in ``length`` tokens, ``chunk`` at a time, of the last ``num_logits`` of which
        logits are wanted; it is as much fuller when each is given.

        ``OptionError`` unless they fit; ``ValueError`` for logits of other than these tokens.
        """
        if not 1 <= num_logits <= length:
            raise ValueError(f"num_logits is {num_logits} for {length} new tokens")
        self.check_room(row, length)
        return self._chunks(row, length, num_logits, chunk)

    def _chunks(self, row: int, length: int, num_logits: int, chunk: int) -> Iterator[Chunk]:
        for start in range(0, length, chunk):
            size = min(chunk, length - start)
            first = max(0, length - num_logits - start)
            self.filled[row] += size
            wanted = first < size
            yield Chunk(start, start + size, np.arange(first, size) if wanted else np.array([size - 1]), wanted)

    def check_step(self, count: int) -> None:
        """``OptionError`` unless each of the first ``count`` rows takes one more token; ``ValueError`` without such."""
        if not 1 <= count <= len(self.filled):
            raise ValueError(f"{count} tokens for {len(self.filled)} rows")
        for row in range(count):
            self.check_room(row, 1)

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
