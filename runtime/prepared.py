"""What is given to a captioner: a source, how it is viewed, and a clip that is encoded already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy.typing as npt

from ..errors import OptionError
from .clip import Clip
from .encoder import EncodedClip
from .viewing import TokenBudget, Viewing

Source = str | os.PathLike[str]


class ViewingOptions(TypedDict, total=False):
    """A ``Viewing``, and its fields by name, which take the place of those of ``viewing``."""

    viewing: Viewing | None
    audio: bool
    start: float | None
    end: float | None
    duplicates: float | None
    visual_tokens: TokenBudget | None


class Arrays(TypedDict, total=False):
    """Frames and sound in place of a file.

    ``frames`` uint8 ``[T, H, W, 3]`` RGB. ``frame_times`` [T]: the second at which each of them is seen; they are then
    taken as already sampled. ``waveform`` float (in [-1, 1]) or int16, mono or with channels, at ``sample_rate`` Hz.
    ``seconds``: how long the clip lasts.
    """

    frames: npt.ArrayLike | None
    frame_times: npt.ArrayLike | None
    waveform: npt.ArrayLike | None
    sample_rate: int | None
    seconds: float | None


class MediaOptions(ViewingOptions, Arrays, total=False):
    """What of a source is looked at and listened to, as in ``Viewing``, or arrays in place of a file, as in
    ``Arrays``."""


def viewing_of(options: Mapping[str, Any]) -> Viewing:
    """The ``Viewing`` that ``ViewingOptions`` stand for. ``TypeError`` for a name that is none of theirs,
    ``OptionError`` for values that cannot be."""
    fields = {name: value for name, value in options.items() if name != "viewing"}
    viewing = options.get("viewing")
    if not isinstance(viewing, Viewing | None):
        raise OptionError(f"viewing is a Viewing, such as Viewing(start=1.0), not {viewing!r}")
    return replace(viewing or Viewing(), **fields)


def viewing_and_arrays(media: MediaOptions) -> tuple[Viewing, Arrays]:
    """The two parts of ``MediaOptions``."""
    arrays: Any = {name: value for name, value in media.items() if name in Arrays.__annotations__}
    return viewing_of({name: value for name, value in media.items() if name not in arrays}), arrays


@dataclass(frozen=True, eq=False, repr=False)
class PreparedClip:
    """A clip that was read and encoded, for any number of captions with different instructions.

    ``bundle``: sha256 of the bundle that encoded it. Only captioners of this bundle take it.
    """

    clip: Clip
    encoded: EncodedClip
    bundle: str

    def __repr__(self) -> str:
        frames = 0 if self.clip.frames is None else len(self.clip.frames)
        parts = [self.clip.mode, f"{frames} frames", f"{sum(map(len, self.encoded.blocks))} tokens"]
        return f"PreparedClip({', '.join(parts)})"
