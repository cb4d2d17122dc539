"""From a row of logits to scores and to a token. Logits and scores are float32 ``[V]``.

At 152k entries a pass over a row costs 20 to 200 us and a fresh copy as much again, so everything here works in place
or in scratch buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..inference import FloatArray, Shortlist
from .options import Settings

#: To find the few highest scores, the highest score of each block of this size is found first.
_BLOCK = 256


@dataclass(frozen=True)
class Token:
    """One generated token. ``logprob`` is its log-likelihood under the model's own distribution (natural log), before
    contrast, penalty, temperature and cuts; ``contrast_logprob`` the one under the combined distribution of a
    contrast, ``None`` without one."""

    id: int
    logprob: float
    is_eos: bool
    contrast_logprob: float | None = None


class LogNormalizer:
    """log sum exp of a row of logits, with one scratch buffer."""

    def __init__(self) -> None:
        self._scratch: FloatArray = np.empty(0, np.float32)

    def __call__(self, logits: FloatArray) -> float:
        if len(self._scratch) != len(logits):
            self._scratch = np.empty(len(logits), np.float32)
        peak = logits.max()
        np.subtract(logits, peak, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        return float(peak) + float(np.log(self._scratch.sum()))


def log_likelihoods(logits: FloatArray, token_ids: Sequence[int]) -> list[float]:
    """Log-likelihood of ``token_ids[i]`` under row i of ``logits`` ``[N, V]``."""
    normalize = LogNormalizer()
    return [float(row[token]) - normalize(row) for row, token in zip(logits, token_ids, strict=True)]


def log_beta(beta: float | None) -> float:
    """How far below the highest logit of the full stream a token may be: -inf without a cutoff."""
    return float(np.log(beta)) if beta else -np.inf


class Combination:
    """``(1 + alpha) * full - alpha * other``; with ``beta``, only of tokens at least beta times as likely as the
    likeliest one of the full stream (the others become -inf). SynPO ``generate_cd``, VCD ``vcd_sample`` (docs/facts.md
    2.3, 4)."""

    def __init__(self, alpha: float, beta: float | None) -> None:
        self._alpha, self._log_beta = np.float32(alpha), log_beta(beta)
        self._scores: FloatArray = np.empty(0, np.float32)
        self._scaled: FloatArray = np.empty(0, np.float32)

    def __call__(self, full: FloatArray, other: FloatArray) -> FloatArray:
        """A buffer that the next call overwrites."""
        if len(self._scores) != len(full):
            self._scores, self._scaled = np.empty_like(full), np.empty_like(full)
        np.multiply(full, 1 + self._alpha, out=self._scores)
        np.multiply(other, self._alpha, out=self._scaled)
        self._scores -= self._scaled
        if self._log_beta > -np.inf:
            np.copyto(self._scores, -np.inf, where=full < full.max() + np.float32(self._log_beta))
        return self._scores


@contextmanager
def penalty_applied(logits: FloatArray, seen: Sequence[int], penalty: float) -> Iterator[None]:
    """The repetition penalty on the tokens ``seen``, in place, for the length of a ``with`` block."""
    if penalty == 1.0 or not seen:
        yield
        return
    index = np.unique(seen)
    values = logits[index]
    logits[index] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    try:
        yield
    finally:
        logits[index] = values


def repeated_ngram_tokens(seen: Sequence[int], size: int) -> list[int]:
    """The tokens that would complete an n-gram of ``size`` tokens that ``seen`` holds already."""
    if size == 0 or len(seen) < size:
        return []
    ending = tuple(seen[len(seen) - size + 1 :])
    return sorted({seen[i + size - 1] for i in range(len(seen) - size + 1) if tuple(seen[i : i + size - 1]) == ending})


@contextmanager
def processed(scores: FloatArray, seen: Sequence[int], settings: Settings) -> Iterator[None]:
    """Repetition penalty and n-gram ban on ``scores``, in place, for the length of a ``with`` block.

    If the n-gram ban would remove every remaining token, it is ignored.
    """
    with penalty_applied(scores, seen, settings.repetition_penalty):
        banned = repeated_ngram_tokens(seen, settings.no_repeat_ngram)
        kept = scores[banned]
        scores[banned] = -np.inf
        if banned and scores.max() == -np.inf:
            scores[banned] = kept
        try:
            yield
        finally:
            scores[banned] = kept


def shortlisted(
    shortlist: Shortlist, seen: Sequence[int], settings: Settings, wanted: int, normalizer: float = 0.0
) -> tuple[npt.NDArray[np.intp], FloatArray] | None:
    """Places in a shortlist in the order of their tokens' ids, and the scores of those, less ``normalizer``, after
    penalty and ban.

    ``None`` where a token that is not on the list could be among the ``wanted`` best: penalties only lower a score, so
    those must be above the lowest of the list, which nothing outside exceeds.
    """
    order = np.argsort(shortlist.ids)
    ids, scores = shortlist.ids[order], shortlist.scores[order] - np.float32(normalizer)
    lowest = scores.min()
    repeated = np.isin(ids, seen)
    values, penalty = scores[repeated], np.float32(settings.repetition_penalty)
    scores[repeated] = np.where(values < 0, values * penalty, values / penalty)
    scores[np.isin(ids, repeated_ngram_tokens(seen, settings.no_repeat_ngram))] = -np.inf
    last = np.partition(scores, len(scores) - wanted)[len(scores) - wanted]
    return (order, scores) if last > lowest else None


def chooser(settings: Settings) -> Callable[[FloatArray], int]:
    """A function that picks the next token from scores: the likeliest, or one drawn with the settings' seed."""
    if settings.strategy != "sample":
        return lambda scores: int(scores.argmax())
    random = np.random.default_rng(settings.seed)

    def sample(scores: FloatArray) -> int:
        index, probabilities = cut(scores, settings)
        cumulative = probabilities.cumsum()
        drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
        return int(index[min(drawn, len(index) - 1)])

    return sample


def _candidates(scores: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Indices, in order, of at least the ``count`` highest scores and of few others: one pass instead of a partition.

    The ``count``-th highest of the blocks' maxima is reached by ``count`` scores or more, one a block.
    """
    blocks = len(scores) // _BLOCK
    if blocks < 2 * count:
        return np.arange(len(scores))
    peaks = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    return np.flatnonzero(scores >= np.partition(peaks, blocks - count)[blocks - count])


def cut(scores: FloatArray, settings: Settings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that sampling may draw, likeliest first, and their (unnormalized) probabilities.

    The order of transformers' warpers: temperature, top-k, top-p, min-p; the likeliest token always stays.
    """
    index = np.arange(len(scores)) if settings.top_k == 0 else _candidates(scores, settings.top_k)
    index = index[np.argsort(-scores[index], kind="stable")]
    if settings.top_k:
        index = index[: settings.top_k]
    wide = scores[index].astype(np.float64) / settings.temperature
    probabilities = np.exp(wide - wide[0])
    probabilities /= probabilities.sum()
    if settings.top_p < 1:
        keep = int(np.searchsorted(probabilities.cumsum(), settings.top_p)) + 1
        index, probabilities = index[:keep], probabilities[:keep]
    if settings.min_p > 0:
        keep = int(np.count_nonzero(probabilities >= settings.min_p * probabilities[0]))
        index, probabilities = index[:keep], probabilities[:keep]
    return index, probabilities
