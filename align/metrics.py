"""How good captions are: the field's n-gram metrics, the facts of the scene, fluency; each with an interval.

CIDEr-D, BLEU-4, ROUGE-L and METEOR are pycocoevalcap's. Its tokenizer (Java) is not used: captions are of a closed
lexicon, for which words in lower case without punctuation are the same tokens. Every figure is a quotient of sums over
clips, or BLEU, which is made of such sums; so the bootstrap resamples per-clip counts and never scores a text again.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from .scenes import Comparison, Scene, captions, compare

Statistics = npt.NDArray[np.float64]
"""Per clip ``[n, 2]`` (numerator, denominator), or ``[n, 10]`` for BLEU."""

TITLES: Mapping[str, str] = {
    "cider": "CIDEr-D",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "completeness": "facts mentioned",
    "invention": "statements invented",
    "sound_completeness": "sound facts mentioned",
    "sound_invention": "sound statements invented",
    "unread": "unread words per caption",
    "readable": "captions without unread words",
    "repetition": "repeated trigrams",
    "words": "words per caption",
}
"""Figures in the order of a table. CIDEr-D is raw (papers print it times 100); the others but two are shares."""

INTERVAL = 0.95
SAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval (percentiles of the bootstrap over clips)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Report:
    """What ``evaluate`` found. ``absent`` has the figures that could not be had, each with the reason."""

    clips: int
    figures: Mapping[str, Figure]
    absent: Mapping[str, str]
    statistics: Mapping[str, Statistics] = field(repr=False, compare=False)
    corpus: str
    """sha256 (hex) of scenes and references: reports of the same can be compared clip by clip."""

    def to_json(self) -> dict[str, Any]:
        """Value and interval of every figure, without the per-clip statistics."""
        figures = {name: {"value": f.value, "low": f.low, "high": f.high} for name, f in self.figures.items()}
        return {"clips": self.clips, "figures": figures, "absent": dict(self.absent), "corpus": self.corpus}

    def rows(self) -> list[tuple[str, str]]:
        """Title and value with interval, or the reason for its absence, of every figure in the order of ``TITLES``."""
        return [
            (title, str(self.figures[name]) if name in self.figures else f"absent: {self.absent[name]}")
            for name, title in TITLES.items()
        ]


def evaluate(
    scenes: Sequence[Scene],
    texts: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    meteor: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Report:
    """Score a caption of each scene against its references (by default ``captions(scene)``) and its facts.

    CIDEr's document frequencies are those of all the references given, so the clips of a report are scored together or
    not at all. METEOR needs Java and is reported as absent without it. Raises ``OptionError`` for fewer than two clips
    (CIDEr of one is always 0), lengths that differ, or pycocoevalcap not installed.
    """
    if references is None:
        references = [captions(scene) for scene in scenes]
    if len(scenes) < 2:
        raise OptionError(f"{len(scenes)} clips cannot be scored: CIDEr's frequencies need at least two")
    if not len(scenes) == len(texts) == len(references) or not all(references):
        raise OptionError(
            f"{len(scenes)} scenes, {len(texts)} texts and {len(references)} sets of references: one of each is needed"
        )
    spoken = [" ".join(tokenize(text)) for text in texts]
    wanted = [[" ".join(tokenize(line)) for line in lines] for lines in references]
    statistics, absent = _ngrams(spoken, wanted, meteor)
    statistics |= _facts([compare(scene, text) for scene, text in zip(scenes, texts, strict=True)])
    statistics |= _fluency(spoken)
    counts = _resample(len(scenes), samples, seed)
    figures = {
        name: _figure(_value(name, statistics[name].sum(0)), _value(name, counts @ statistics[name]))
        for name in TITLES
        if name in statistics
    }
    corpus = hashlib.sha256(repr((list(scenes), wanted)).encode()).hexdigest()
    return Report(len(scenes), figures, absent, statistics, corpus)


def difference(one: Report, other: Report, *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Figure]:
    """``one`` minus ``other`` in every figure that both have; clips are resampled in pairs.

    An interval without zero is a difference that other clips would most likely show too. Raises ``OptionError`` for
    reports of different scenes or references.
    """
    if one.corpus != other.corpus:
        raise OptionError("the two reports are of different scenes or references: they have no pairs to compare")
    counts = _resample(one.clips, samples, seed)
    found = {}
    for name in TITLES:
        if name in one.statistics and name in other.statistics:
            pair = one.statistics[name], other.statistics[name]
            whole = [_value(name, each.sum(0)) for each in pair]
            drawn = [_value(name, counts @ each) for each in pair]
            found[name] = _figure(whole[0] - whole[1], drawn[0] - drawn[1])
    return found


def tokenize(text: str) -> list[str]:
    """Words and numbers in lower case, punctuation left out."""
    return re.findall(r"[a-z0-9]+", text.lower())


# --- per clip


def _ngrams(
    spoken: Sequence[str], wanted: Sequence[Sequence[str]], meteor: bool
) -> tuple[dict[str, Statistics], dict[str, str]]:
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise OptionError(
            f"the caption metrics need pycocoevalcap ({error}): pip install 'intertitle[align]'"
        ) from None
    given = {row: list(lines) for row, lines in enumerate(wanted)}
    made = {row: [text] for row, text in enumerate(spoken)}
    found = {
        "cider": _means(Cider().compute_score(given, made)[1]),
        "rouge_l": _means(Rouge().compute_score(given, made)[1]),
    }
    bleu = BleuScorer(n=4)
    for text, lines in zip(spoken, wanted, strict=True):
        bleu += (text, list(lines))
    found["bleu4"] = np.array([_bleu_counts(clip) for clip in bleu.ctest], np.float64)
    if not meteor:
        return found, {"meteor": "not asked for"}
    if shutil.which("java") is None:
        return found, {"meteor": "java is not on the path"}
    try:
        found["meteor"] = _means(Meteor().compute_score(given, made)[1])
    except (OSError, ValueError) as error:
        return found, {"meteor": f"java failed: {error}"}
    return found, {}


def _bleu_counts(clip: Mapping[str, Any]) -> list[float]:
    """Length, the closest reference's length, n-grams made and n-grams right for n of 1 to 4."""
    length = clip["testlen"]
    closest = min((abs(each - length), each) for each in clip["reflen"])[1]
    return [length, closest, *clip["guess"], *clip["correct"]]


def _facts(found: Sequence[Comparison]) -> dict[str, Statistics]:
    rows: dict[str, list[tuple[int, int]]] = {}
    for one in found:
        mentioned, sound = len(one.mentioned), len(one.sound_mentioned)
        there = sound + sum(fact.subject == "sound" for fact in one.missed)
        wrong = sum(fact.subject == "sound" for fact in one.invented)
        for name, quotient in {
            "completeness": (mentioned, mentioned + len(one.missed)),
            "invention": (len(one.invented), len(one.invented) + mentioned),
            "sound_completeness": (sound, there),
            "sound_invention": (wrong, wrong + sound),
            "unread": (len(one.unread), 1),
            "readable": (int(not one.unread), 1),
        }.items():
            rows.setdefault(name, []).append(quotient)
    return {name: np.array(quotients, np.float64) for name, quotients in rows.items()}


def _fluency(spoken: Sequence[str]) -> dict[str, Statistics]:
    rows: list[tuple[int, int]] = []
    for text in spoken:
        words = text.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        rows.append((len(trigrams) - len(set(trigrams)), len(trigrams)))
    return {
        "repetition": np.array(rows, np.float64),
        "words": _means([len(text.split()) for text in spoken]),
    }


def _means(values: Sequence[float] | npt.NDArray[np.floating]) -> Statistics:
    column = np.asarray(values, np.float64)
    return np.stack((column, np.ones_like(column)), -1)


# --- over clips


def _resample(clips: int, samples: int, seed: int) -> Statistics:
    """How often each clip is drawn ``[samples, clips]``."""
    return np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), samples).astype(np.float64)


def _value(name: str, sums: Statistics) -> Statistics:
    """The figure of sums over clips, ``[..., 2 or 10] -> [...]``. A quotient of nothing is 0."""
    if name == "bleu4":
        return _bleu(sums)
    return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1)


def _bleu(sums: Statistics) -> Statistics:
    """BLEU-4 with the constants of pycocoevalcap's bleu_scorer.py."""
    tiny, small = 1e-15, 1e-9
    precision = ((sums[..., 6:] + tiny) / (sums[..., 2:6] + small)).prod(-1) ** 0.25
    ratio = (sums[..., 0] + tiny) / (sums[..., 1] + small)
    return precision * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1)


def _figure(value: Statistics, drawn: Statistics) -> Figure:
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Figure(float(value), float(low), float(high))
