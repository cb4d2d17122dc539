"""Which frames of a clip a captioner looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...contract.pipeline import Sampling
from ...errors import MediaError, OptionError


@dataclass(frozen=True)
class Places:
    """The frames that a captioner looks at: ``index`` int64 ``[T]``, ascending, of the frames of a clip.

    ``times`` float64 ``[T]``: when each is shown, in seconds from the first frame on. ``seconds``: how long the frames
    last. ``None`` where nothing is known of the time.
    """

    index: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64] | None = None
    seconds: float | None = None


def sample_places(total: int, fps: float, plan: Sampling) -> Places:
    """The places of a clip of ``total`` frames at ``fps`` frames a second (0: not known); short clips repeat frames.

    Where the frame rate is not known, the rule ``rate`` takes all frames, or ``linspace``'s of too many. Raises
    ``MediaError`` without frames, and for the rule ``rate``, unless ``forced``, with too few frames in a second.
    """
    if total < 1:
        raise MediaError("the clip has no frames to choose from")
    timed = fps > 0 and math.isfinite(fps)
    if plan.rule == "rate" and timed:
        return _rate_places(total, fps, plan)
    if plan.rule == "rate":
        return Places(np.arange(total) if total <= plan.count else sample_indices(total, plan.count, "linspace"))
    index = sample_indices(total, plan.count, plan.rule)
    return Places(index, index / fps, total / fps) if timed else Places(index)


def sample_indices(total: int, count: int, rule: str) -> npt.NDArray[np.int64]:
    """Indices int64 ``[count]``, ascending, of ``total`` frames, by a rule that knows no time.

    ``MediaError`` without frames, ``OptionError`` for another rule or no places.
    """
    if total < 1:
        raise MediaError("the clip has no frames to choose from")
    if count < 1:
        raise OptionError(f"cannot sample {count} frames: ask for at least one")
    if rule not in _RULES:
        raise OptionError(f'unknown frame rule "{rule}": expected one of {", ".join(_RULES)}')
    return _RULES[rule](total, count).astype(np.int64)


def _rate_places(total: int, fps: float, plan: Sampling) -> Places:
    """LLaVA-Video's rule (playground/demo/video_demo.py ``load_video``, docs/facts.md 8.3).

    Every round(fps / plan.fps)-th frame, at times that suppose the rounded rate. Where these are more than ``count``,
    and always where ``forced``: ``count`` frames from first to last in equal steps, at their true times.
    """
    assert plan.fps is not None
    step = round(fps / plan.fps)
    if step < 1 and not plan.forced:
        raise MediaError(f"{fps:g} frames a second are too few: this captioner looks at {plan.fps:g} of each second")
    if plan.forced or len(range(0, total, step)) > plan.count:
        index = sample_indices(total, plan.count, "linspace")
        return Places(index, index / fps, total / fps)
    index = np.arange(0, total, step)
    return Places(index, index / step, total / fps)


def _centered(total: int, count: int) -> npt.NDArray[np.floating]:
    """The centres of equal segments, rounded half to even (VideoLLaMA 2, mm_utils.py ``frame_sample``)."""
    return np.round((np.arange(count) + 0.5) * (total - 1) / count + 1e-6)


def _linspace(total: int, count: int) -> npt.NDArray[np.floating]:
    """First to last frame in equal steps, truncated (AuroraCap)."""
    return np.linspace(0, total - 1, count)


def _strided(total: int, count: int) -> npt.NDArray[np.floating]:
    """From the first frame in equal steps without the last, truncated (LLaVA-NeXT-Video, docs/facts.md 9)."""
    return np.arange(0, total, total / count)[:count]


def _segments(total: int, count: int) -> npt.NDArray[np.floating]:
    """The middle of each segment (InternVL2, eval/mvbench ``get_index``, docs/facts.md 10), truncated."""
    size = (total - 1) / count
    return np.trunc(size / 2 + np.round(size * np.arange(count)))


_RULES = {"centered": _centered, "linspace": _linspace, "strided": _strided, "segments": _segments}


def span_frames(
    total: int,
    fps: float,
    start: float | None,
    end: float | None,
    rule: str,
    times: npt.NDArray[np.float64] | None = None,
    duration: float | None = None,
) -> tuple[int, int]:
    """The first and the last of ``total`` frames in the span from ``start`` to ``end`` (seconds, checked before).

    For ``"centered"`` VideoLLaMA 2's rule (mm_utils.py ``process_video``): from ``max(int(start fps) - 1, 0)`` to
    ``min(int(end fps) - 1, total - 1)``, so that a span begins with the frame before its start. For ``"segments"``
    InternVL2's (eval/mvbench ``get_index``): from ``round(start fps)`` to ``min(round(end fps), total - 1)``. Other
    families have none, and the first place of most is the first frame, so there the span holds the frames that are
    shown first at ``start`` or later and before ``end``; if none is, the one that is still shown. All suppose a
    constant rate. Where ``times`` ``[total]`` (seconds from the first frame on) are not those of the rate, the frames
    shown at these times take the place of ``int(time fps)``; a span up to ``duration`` (seconds) then has the last
    frame. Never less than one frame.
    ``MediaError`` for a clip without times and without a frame rate, or when it ends before ``start``.
    """
    if start is None and end is None:
        return 0, total - 1
    if times is not None and not is_constant(times, fps):
        whole = end is not None and duration is not None and end >= duration - 0.0005
        return _timed_span(times, start, None if whole else end, rule)
    if not fps > 0:
        raise MediaError("the video has no frame rate: no span of seconds can be taken from it")
    if rule == "centered":
        first = 0 if start is None else max(int(start * fps) - 1, 0)
        last = total - 1 if end is None else min(int(end * fps) - 1, total - 1)
    elif rule == "segments":
        first = 0 if start is None else round(start * fps)
        last = total - 1 if end is None else min(round(end * fps), total - 1)
    else:
        # A start that was written with 3 decimals is still that of its frame.
        first = 0 if start is None else math.ceil(start * fps - 0.05)
        last = total - 1 if end is None else min(math.ceil(end * fps - 0.05) - 1, total - 1)
    if rule != "centered" and start is not None and start < max(total / fps, duration or 0.0):
        # It starts inside the last frame, which may be shown longer than others.
        first = min(first, total - 1)
    if first >= total:
        raise MediaError(f"the video ends before {start:g} s")
    # Where nothing begins in the span, what is shown in it has begun before.
    last = max(last, 0)
    return min(first, last), last


def is_constant(times: npt.NDArray[np.float64], fps: float) -> bool:
    """Whether each frame is shown within half a frame of where the rate puts it."""
    return fps > 0 and bool(np.abs(times * fps - np.arange(len(times))).max() < 0.5)


def _timed_span(times: npt.NDArray[np.float64], start: float | None, end: float | None, rule: str) -> tuple[int, int]:
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
