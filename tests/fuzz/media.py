"""Mutants of media files through the runtime, from opening to the arrays that a captioner takes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from intertitle.contract.pipeline import (
    EachUnit,
    ImagePlan,
    Pipeline,
    Sampling,
    SoundPlan,
    Stage,
    StageInput,
    Window,
)
from intertitle.runtime.clip import Clip, read_clip
from intertitle.runtime.media.segments import media_spans
from intertitle.runtime.preprocess.audio import NUM_SAMPLES, SAMPLE_RATE
from intertitle.runtime.preprocess.fbank import kaldi_fbank
from intertitle.runtime.preprocess.image import preprocess_frames
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Viewing

from .corpus import make_corpus
from .mutate import mutate

_HALF = (0.5, 0.5, 0.5)
_IMAGES = (ImagePlan("exact", 28, 28, _HALF, _HALF), ImagePlan("shortest_edge", 32, 28, _HALF, _HALF))
_SOUND = SoundPlan(sample_rate=SAMPLE_RATE, num_samples=NUM_SAMPLES, num_mel_bins=128, num_frames=2998)
#: Of the one stage: frame by frame, or frames together.
_UNITS = (EachUnit(), Window(2, 2))
_RULES = ("centered", "linspace", "strided", "segments", "rate")


class MediaTarget:
    """What the media fuzzer does with a seed. ``folder`` holds the originals and takes the mutant of the moment.

    ``expected``: what may lie behind an error of ours. Others were foreseen as a class, and may be faults of ours.
    """

    expected = (OSError, FFmpegError)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._originals = [(path.name, path.read_bytes()) for path in make_corpus(folder / "originals")]
        self._contents = [content for _, content in self._originals]

    @property
    def formats(self) -> list[str]:
        return [name for name, _ in self._originals]

    def make(self, seed: int) -> tuple[str, bytes]:
        """Name and content of the mutant of ``seed``."""
        name, content = self._originals[seed % len(self._originals)]
        return name, mutate(content, self._contents, random.Random(f"media {seed}"))

    def run(self, seed: int, name: str, content: bytes) -> None:
        """Read the mutant in one of the ways that the commands do. Raises what the runtime raises."""
        path = self._folder / f"{os.getpid()}-{name}"
        path.write_bytes(content)
        try:
            read(path, random.Random(f"read {seed}"))
        finally:
            path.unlink()


def way_of(rng: random.Random) -> str:
    """How a mutant is read, by the next number of ``rng``. Scenes are the slowest."""
    return rng.choices(("whole", "span", "segments", "scenes"), (45, 25, 23, 7))[0]


def read(path: Path, rng: random.Random) -> None:
    """Whole, a span of it, or its segments."""
    way = way_of(rng)
    if way == "whole":
        _take(path, rng, None, None)
    elif way == "span":
        start = rng.choice((0.0, 0.04, 0.3, 0.5, 0.9, 2.0, 1e6))
        end = rng.choice((None, start + 0.05, start + 0.4, start + 1e9))
        _take(path, rng, start, end)
    else:
        spans = media_spans(path, None if way == "scenes" else rng.choice((0.1, 0.25, 5.0)))
        _check_spans(spans)
        for start, end in rng.sample(spans, min(len(spans), 2)):
            _take(path, rng, start, end)


def _check_spans(spans: list[tuple[float, float]]) -> None:
    for start, end in spans:
        if not (np.isfinite(start) and np.isfinite(end) and 0 <= start < end):
            raise WrongValueError(f"a segment from {start} to {end}")


def _take(path: Path, rng: random.Random, start: float | None, end: float | None) -> None:
    rule = rng.choice(_RULES)
    stage = Stage(name="vision", unit=rng.choice(_UNITS), inputs=(StageInput("x", "pixels"),), output="y", tokens=1)
    pipeline = Pipeline(
        sampling=Sampling(rule=rule, count=rng.choice((4, 8)), fps=1.0 if rule == "rate" else None),
        image=rng.choice(_IMAGES),
        sound=rng.choice((_SOUND, _SOUND, None)),
        stages=(stage,),
        prompts={},
    )
    duplicates = rng.choice((None, None, None, 2.0))
    clip = read_clip(path, pipeline, Viewing(start=start, end=end, duplicates=duplicates), Stages())
    _check(clip)
    if clip.frames is not None:
        pixels = preprocess_frames(clip.frames, pipeline.image)
        if not np.isfinite(pixels).all():
            raise WrongValueError("pixels that are no numbers")
    if clip.sound is not None and rng.random() < 0.1 and not np.isfinite(kaldi_fbank(clip.sound)).all():
        raise WrongValueError("a filter bank that is no numbers")


def _check(clip: Clip) -> None:
    """What ``Clip`` promises."""
    if clip.frames is None and clip.sound is None:
        raise WrongValueError("a clip of nothing")
    if clip.frames is not None:
        assert clip.order is not None
        if clip.frames.ndim != 4 or clip.frames.dtype != np.uint8 or not 0 <= clip.order.max() < len(clip.frames):
            raise WrongValueError(f"frames {clip.frames.dtype} {clip.frames.shape}, places {clip.order}")
    if clip.sound is not None and not (clip.sound.dtype == np.float32 and np.isfinite(clip.sound).all()):
        raise WrongValueError("sound that is no numbers")
    if clip.seconds is not None and not (np.isfinite(clip.seconds) and clip.seconds > 0):
        raise WrongValueError(f"lasts {clip.seconds} s")
    for note in clip.notes:
        if "\n" in note:
            raise WrongValueError(f"a note of several lines: {note!r}")


class WrongValueError(Exception):
    """The runtime gave something that it promises never to give."""
