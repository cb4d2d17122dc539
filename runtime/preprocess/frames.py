"""Which frames of a clip a captioner looks at."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import MediaError, OptionError

FrameRule = Literal["centered", "linspace"]


def sample_indices(total: int, count: int, rule: FrameRule) -> npt.NDArray[np.int64]:
    """Indices ``[count]`` int64, ascending, into the ``total`` frames of a clip; short clips repeat frames.

    ``"centered"`` is VideoLLaMA 2's rule (mm_utils.py ``frame_sample``): the centres of ``count`` equal segments,
    rounded half to even. ``"linspace"`` is AuroraCap's: first to last frame in equal steps, truncated. Raises
    ``MediaError`` without frames, ``OptionError`` for an unknown rule or no places.
    """
    if total < 1:
        raise MediaError("the clip has no frames to choose from")
    if count < 1:
        raise OptionError(f"cannot sample {count} frames: ask for at least one")
    if rule == "centered":
        return np.round((np.arange(count) + 0.5) * (total - 1) / count + 1e-6).astype(np.int64)
    if rule == "linspace":
        return np.linspace(0, total - 1, count, dtype=np.int64)
    raise OptionError(f'unknown frame rule "{rule}": expected "centered" or "linspace"')


def span_frames(
    total: int,
    fps: float,
    start: float | None,
    end: float | None,
    rule: FrameRule,
    times: npt.NDArray[np.float64] | None = None,
    duration: float | None = None,
) -> tuple[int, int]:
    """The first and the last of ``total`` frames in the span from ``start`` to ``end`` (seconds, checked before).

    For ``"centered"`` VideoLLaMA 2's rule (mm_utils.py ``process_video``): from ``max(int(start fps) - 1, 0)`` to
    ``min(int(end fps) - 1, total - 1)``, so that a span begins with the frame before its start. AuroraCap has none; the
    first place of its ``"linspace"`` is always the first frame, so there the span holds the frames that are shown first
    at ``start`` or later and before ``end``. Both suppose a constant rate. Where ``times`` ``[total]`` (seconds from
    the first frame on) are not those of the rate, the frames shown at these times take the place of ``int(time fps)``;
    a span up to ``duration`` (seconds) then has the last frame. Never less than one frame. ``MediaError`` for a clip
    without times and without a frame rate, or when it ends before ``start``.
    """
    if start is None and end is None:
        return 0, total - 1
    if times is not None and not _is_constant(times, fps):
        whole = end is not None and duration is not None and end >= duration - 0.0005
        return _timed_span(times, start, None if whole else end, rule)
    if not fps > 0:
        raise MediaError("the video has no frame rate: no span of seconds can be taken from it")
    if rule == "centered":
        first = 0 if start is None else max(int(start * fps) - 1, 0)
        last = total - 1 if end is None else min(int(end * fps) - 1, total - 1)
    else:
        # A start that was written with 3 decimals is still that of its frame.
        first = 0 if start is None else math.ceil(start * fps - 0.05)
        last = total - 1 if end is None else min(math.ceil(end * fps - 0.05) - 1, total - 1)
    if first >= total:
        raise MediaError(f"the video ends before {start:g} s")
    return first, max(first, last)


def _is_constant(times: npt.NDArray[np.float64], fps: float) -> bool:
    """Whether each frame is shown within half a frame of where the rate puts it."""
    return fps > 0 and bool(np.abs(times * fps - np.arange(len(times))).max() < 0.5)


def _timed_span(
    times: npt.NDArray[np.float64], start: float | None, end: float | None, rule: FrameRule
) -> tuple[int, int]:
    # A time that was written with 3 decimals is still that of its frame.
    if rule == "centered":
        shown = [
            None if time is None else int(np.searchsorted(times, time + 0.0005, "right")) - 1 for time in (start, end)
        ]
        first = 0 if shown[0] is None else max(shown[0] - 1, 0)
        last = len(times) - 1 if shown[1] is None else shown[1] - 1
    else:
        first = 0 if start is None else int(np.searchsorted(times, start - 0.0005))
        last = len(times) - 1 if end is None else int(np.searchsorted(times, end - 0.0005)) - 1
        if last < first:
            # Nothing begins in the span: what is shown in it has begun before.
            first = last
    return max(first, 0), max(first, last, 0)
