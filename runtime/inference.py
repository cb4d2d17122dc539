"""The seam between decoding strategies and whatever runs the decoder.

A strategy sees a few methods over a static key/value cache of some rows; ONNX Runtime, TensorRT and PyTorch are
implementations of it, so that every strategy is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """What a shortlist is made of: the logits of ``row``, or its contrast with the row ``other``,
    ``(1 + alpha) * row - alpha * other``, of tokens whose logit is no more than ``-log_beta`` below the row's highest.
    """

    row: int
    other: int | None = None
    alpha: float = 0.0
    log_beta: float = -np.inf

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.row,) if self.other is None else (self.row, self.other)


@dataclass(frozen=True, eq=False)
class Shortlist:
    """The tokens of the highest scores, ``ids`` int64 ``[K]`` by falling score.

    ``scores`` float32 ``[K]`` as its ``Choice`` says, ``logits`` float32 ``[K]`` those of the row itself; the
    normalizers are log sum exp of both over the whole vocabulary. ``fetch`` gets the logits of all its rows, each
    ``[V]``, until the next call. The arrays are only lent.
    """

    ids: npt.NDArray[np.int64]
    scores: FloatArray
    logits: FloatArray
    normalizer: float
    score_normalizer: float
    fetch: Callable[[], list[FloatArray]]


class FullLogits:
    """What an ``Inference`` without shortlists has of them."""

    shortlist_size = 0

    def step_shortlist(self, token_ids: npt.NDArray[np.int64], choices: Sequence[Choice]) -> list[Shortlist]:
        raise NotImplementedError("there are no shortlists here")


class Inference(Protocol):
    """A decoder with its cache: ``rows`` sequences of at most ``max_length`` tokens each, of different lengths.

    What a row computes does not depend on the other rows: on the processor not even in the last bit, so that a caption
    is the same alone and in a batch. On a GPU the number of rows decides which kernels run, and so the last bits.
    """

    @property
    def rows(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def prefill(
        self,
        row: int,
        embeds: FloatArray,
        num_logits: int = 1,
        progress: Callable[[int], None] | None = None,
        positions: npt.NDArray[np.int64] | None = None,
    ) -> FloatArray:
        """Append tokens, given as embeddings ``[S, H]``, to one row; ``progress`` hears how many are in.

        ``positions`` int64 ``[S]``: of the tokens, for a decoder whose positions are explicit. If ``None`` they count
        on from the row's highest position, as those of ``step`` always do.

        Returns float32 logits ``[num_logits, V]`` of the last ``num_logits`` tokens. ``OptionError`` when the row would
        outgrow ``max_length``, or a position the decoder's context. ``ValueError`` for positions of other tokens, or
        for a decoder that counts places.
        """
        ...

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        """Append one token to each of the first n rows (``[n]``) and return their logits ``[n, V]``.

        The returned array is a view that the next call overwrites.
        """
        ...

    @property
    def shortlist_size(self) -> int:
        """How many tokens ``step_shortlist`` gives of each choice; 0 where there is no such thing."""
        ...

    def step_shortlist(self, token_ids: npt.NDArray[np.int64], choices: Sequence[Choice]) -> list[Shortlist]:
        """``step`` that leaves the logits on the device: of each choice its shortlist."""
        ...

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        """Row ``t`` continues as a copy of row ``sources[t]``, all at once (beams, shared prefixes, moved rows).

        Their first ``start`` tokens are equal already and stay; ``stop`` keeps no more than the first ``stop`` tokens.
        """
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a row."""
        ...
