"""What is given to a captioner: a source, what of it counts, and a clip that is encoded already."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypedDict

import numpy.typing as npt

from .clip import Clip
from .encoder import EncodedClip

Source = str | os.PathLike[str]


class MediaOptions(TypedDict, total=False):
    """What of a source is looked at and listened to, and in how many tokens.

    ``audio=False`` leaves the sound out. ``frames`` uint8 ``[T, H, W, 3]`` RGB; ``waveform`` float (in [-1, 1]) or
    int16, mono or with channels, at ``sample_rate`` Hz: in place of a file. ``frame_times``: the seconds of each frame;
    the frames are then taken as already sampled. ``seconds``: how long a clip of arrays lasts. ``start`` and
    ``end``: a span in seconds.
    ``duplicates``: drop sampled frames that differ by no more grey levels than this from the last one kept.
    ``visual_tokens``: a ratio (float up to 1) or a number (int) of visual tokens to keep of the clip.
    """

    audio: bool
    frames: npt.ArrayLike | None
    waveform: npt.ArrayLike | None
    sample_rate: int | None
    frame_times: npt.ArrayLike | None
    seconds: float | None
    start: float | None
    end: float | None
    duplicates: float | None
    visual_tokens: int | float | None


@dataclass(frozen=True, eq=False, repr=False)
class PreparedClip:
    """A clip that was read and encoded, for any number of captions with different instructions."""

    clip: Clip
    encoded: EncodedClip

    def __repr__(self) -> str:
        frames = 0 if self.clip.frames is None else len(self.clip.frames)
        parts = [self.clip.mode, f"{frames} frames", f"{sum(map(len, self.encoded.blocks))} tokens"]
        return f"PreparedClip({', '.join(parts)})"
