"""The clips that preferences are made of: files as ``intertitle batch`` finds them, or scenes drawn in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...contract.pipeline import Pipeline
from ...errors import OptionError
from ...runtime.batch import Entry
from ...runtime.batch.content import Identity
from ...runtime.captioner import MediaOptions
from ...runtime.media.segments import Span
from ...runtime.preprocess.frames import sample_places
from ..scenes import FPS, NUM_FRAMES, SECONDS, SPLITS, Scene, draw_scene, render_frames, render_sound

_SCENES = re.compile(r"([a-z]+):(\d+):(\d+)")


@dataclass(frozen=True)
class Item:
    """One clip. ``key`` names its record; either ``entry`` (a file) or ``scene`` is there.

    The key of a scene is ``SPLIT:INDEX``, that of a file its entry's ``id``.
    """

    key: str
    source: str
    entry: Entry | None = None
    scene: Scene | None = None

    @property
    def id(self) -> str:
        return self.key

    @property
    def file(self) -> str:
        return self.source

    @property
    def prompt(self) -> str | None:
        """The item's own instruction."""
        return None if self.entry is None else self.entry.prompt

    @property
    def start(self) -> float | None:
        return None if self.entry is None else self.entry.start

    @property
    def end(self) -> float | None:
        return None if self.entry is None else self.entry.end

    @property
    def manifest(self) -> str:
        return "" if self.entry is None else self.entry.manifest

    @property
    def about(self) -> dict[str, Any]:
        """What its record says of it beside its key and its source."""
        return {} if self.entry is None else self.entry.about

    def identify(self) -> Identity | None:
        """Size and time of the file; ``None`` for a scene, which its key says all of."""
        return None if self.entry is None else self.entry.identify()


def file_item(entry: Entry) -> Item:
    """A file that ``read_inputs`` found."""
    return Item(entry.id, entry.file, entry=entry)


def scene_items(span: str) -> list[Item]:
    """The scenes of ``SPLIT:FIRST:STOP`` (``train:0:500``), the last excluded. ``OptionError`` for any other text."""
    found = _SCENES.fullmatch(span)
    if found is None or found[1] not in SPLITS:
        raise OptionError(f"scenes are SPLIT:FIRST:STOP with a split of {', '.join(SPLITS)}, not '{span}'")
    first, stop = int(found[2]), int(found[3])
    if first >= stop:
        raise OptionError(f"scenes {span} is an empty range: the last number is the first scene that is not taken")
    keys = [(index, f"{found[1]}:{index}") for index in range(first, stop)]
    return [Item(key, f"scene {key}", scene=draw_scene(found[1], index)) for index, key in keys]


def scene_media(scene: Scene, pipeline: Pipeline, *, audio: bool = True, span: Span = (0.0, SECONDS)) -> MediaOptions:
    """What the captioner of ``pipeline`` would sample and hear of the scene's clip, or of a span of it in seconds.

    Frames are drawn at the size that the captioner works at, so that nothing is resized; the sound is 16 bit PCM, as in
    a file.
    """
    start, end = span
    first, stop = round(start * FPS), min(max(round(end * FPS), round(start * FPS) + 1), NUM_FRAMES)
    places = sample_places(stop - first, FPS, pipeline.sampling)
    frames = render_frames(scene, (first + places.index) / FPS, pipeline.image.size)
    media = MediaOptions(frames=frames, frame_times=places.times, seconds=places.seconds)
    if audio and pipeline.sound is not None:
        rate = pipeline.sound.sample_rate
        sound = render_sound(scene, rate)[round(start * rate) : round(end * rate)]
        media["waveform"] = np.rint(np.clip(sound, -1, 1) * 32767).astype(np.int16)
        media["sample_rate"] = rate
    return media


def equal_spans(start: float, end: float, least: float) -> list[Span]:
    """SynPO's segments: clamp(int(duration // 10) + 1, 2, 16) equal parts (docs/facts.md 2.2), fewer where they would
    be shorter than ``least`` seconds."""
    duration = end - start
    count = min(max(int(duration // 10) + 1, 2), 16)
    count = max(min(count, int(duration / least)), 1)
    bounds: Sequence[float] = [start + duration * part / count for part in range(count)] + [end]
    return [(bounds[part], bounds[part + 1]) for part in range(count)]
