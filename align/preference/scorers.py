"""Scores of captions on SynPO's scale, by ground truth, without any reference, or by a judging language model.

``total = 1.1 * factuality + fluency + consistency``, at most 13.5 (docs/facts.md 2.2).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ...errors import OptionError
from ..scenes import compare
from . import judge
from .candidates import Candidate, Material
from .endpoint import Asker, Endpoint

_T = TypeVar("_T")

MOST = 13.5
"""The highest total."""


@dataclass(frozen=True)
class Scores:
    """Factuality and fluency from 0 to 5, consistency from 0 to 3."""

    factuality: float
    fluency: float
    consistency: float

    @property
    def total(self) -> float:
        return 1.1 * self.factuality + self.fluency + self.consistency


class Scorer(Protocol):
    """Gives each candidate its scores. ``score`` may be called from several threads.

    ``needs_segments`` and ``needs_likelihoods`` say what of the material it reads. An ``IntertitleError`` fails the
    item, an ``OptionError`` among them ends the run.
    """

    name: str
    needs_segments: bool
    needs_likelihoods: bool

    def score(self, item: Material, candidates: Sequence[Candidate]) -> list[Scores]: ...


class GroundTruth:
    """Exact, from the facts of a scene and what ``compare`` reads in a caption.

    factuality = 5 * max(0, c - v), c the share of the scene's facts that is mentioned, v the share of the statements
    that is false: video-SALMONN 2's total error (missing and hallucination rate, docs/facts.md 5) taken from 1.
    fluency = 5 * (1 - u) * d, u the share of words that the grammar of scenes cannot place, d the share of sentences
    that are different from all before. consistency = 3 * the mean overlap (Jaccard) of its statements, true and false,
    with those of each other candidate (3 for a single one); two that state nothing agree on nothing.
    """

    name = "scenes"
    needs_segments = needs_likelihoods = False

    def score(self, item: Material, candidates: Sequence[Candidate]) -> list[Scores]:
        """``OptionError`` for an item that is no scene."""
        if item.scene is None:
            raise OptionError(f"{item.key}: only a scene has a ground truth")
        found = [compare(item.scene, candidate.text) for candidate in candidates]
        agreement = _agreement([one.mentioned | one.invented for one in found], _jaccard)
        return [
            Scores(
                5 * max(0.0, one.completeness - one.invention),
                5 * (1 - min(len(one.unread) / max(len(words(candidate.text)), 1), 1)) * _distinct(candidate.text),
                3 * agreed,
            )
            for candidate, one, agreed in zip(candidates, found, agreement, strict=True)
        ]


class ReferenceFree:
    """From the captions alone: what the captioner says often and of every part is more likely so.

    The overlap of two texts is that of their words and pairs of neighbouring words, as multisets: 2 * common / (both
    together), the F1 of ROUGE. factuality = 5 * the overlap with the captions of the segments, as one text (with the
    other candidates where there are no segments); consistency = 3 * the mean overlap with the other candidates (3 for a
    single one); fluency = 5 * exp(mean token log-likelihood), the geometric mean probability that SynPO's loss compares
    (docs/facts.md 2.1).
    """

    name = "reference-free"
    needs_segments = needs_likelihoods = True

    def score(self, item: Material, candidates: Sequence[Candidate]) -> list[Scores]:
        """``OptionError`` for candidates without their likelihood."""
        grams = [_grams(candidate.text) for candidate in candidates]
        agreement = _agreement(grams, _dice)
        segments: Counter[tuple[str, ...]] = Counter()
        for text in item.segments:
            # What several segments say is one fact of the clip.
            segments |= _grams(text)
        scores: list[Scores] = []
        for candidate, own, agreed in zip(candidates, grams, agreement, strict=True):
            if candidate.mean_logprob is None:
                raise OptionError(f"{item.key}: a candidate has no likelihood")
            support = _dice(own, segments) if item.segments else agreed
            scores.append(Scores(5 * support, 5 * min(math.exp(candidate.mean_logprob), 1.0), 3 * agreed))
        return scores


class Judge:
    """By a language model behind ``endpoint``, which reads the captions of the segments; see ``judge``.

    ``workers`` questions are asked at a time, whatever clips they are of.
    """

    name = "judge"
    needs_segments, needs_likelihoods = True, False

    def __init__(self, endpoint: Endpoint, workers: int = 8) -> None:
        self._asker = Asker(endpoint, workers)

    def score(self, item: Material, candidates: Sequence[Candidate]) -> list[Scores]:
        """``JudgeError`` where an answer is missing or makes no sense, ``OptionError`` where none can be had."""
        texts = [candidate.text for candidate in candidates]
        questions = [judge.caption_question(item.instruction, item.segments, text) for text in texts]
        questions.append(judge.consistency_question(texts))
        asked = [self._asker.submit(judge.SYSTEM, question) for question in questions]
        try:
            *answers, last = [question.result() for question in asked]
            marks = [judge.read_caption_marks(answer) for answer in answers]
            together = judge.read_consistency_marks(last, len(texts))
        finally:
            for question in asked:
                question.cancel()
        return [Scores(*mark, agreed) for mark, agreed in zip(marks, together, strict=True)]

    def close(self) -> None:
        """Give up every question that has no answer yet, and ask nothing more."""
        self._asker.close()


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def _agreement(found: Sequence[_T], overlap: Callable[[_T, _T], float]) -> list[float]:
    """The mean overlap of each with the others."""
    count = len(found)
    if count == 1:
        return [1.0]
    sums = [0.0] * count
    for one, other in itertools.combinations(range(count), 2):
        shared = overlap(found[one], found[other])
        sums[one] += shared
        sums[other] += shared
    return [total / (count - 1) for total in sums]


def _jaccard(one: frozenset[Any], other: frozenset[Any]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0


def _dice(one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    size = one.total() + other.total()
    return 2 * (one & other).total() / size if size else 0.0


def _grams(text: str) -> Counter[tuple[str, ...]]:
    found = words(text)
    return Counter([*((word,) for word in found), *itertools.pairwise(found)])


def _distinct(text: str) -> float:
    """The share of sentences that repeat none before."""
    sentences = [tuple(words(part)) for part in re.split(r"[.!?]+", text) if words(part)]
    return len(set(sentences)) / max(len(sentences), 1)
