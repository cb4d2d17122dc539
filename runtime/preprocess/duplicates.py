"""Frames that look like the one before: a captioner that is spared them works less for the same sight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import OptionError

#: Cells along each side of a thumbnail.
THUMBNAIL = 16
#: ITU-R BT.601 luma.
_LUMA = np.array([0.299, 0.587, 0.114])


def thumbnail(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Mean grey level (0 to 255) of 16x16 equal areas of ``frame [H, W, 3]``; fewer where it has fewer pixels."""
    sums: npt.NDArray = frame
    counts = []
    for axis in (0, 1):
        size = frame.shape[axis]
        bounds = np.arange(min(THUMBNAIL, size)) * size // min(THUMBNAIL, size)
        sums = np.add.reduceat(sums, bounds, axis=axis, dtype=np.int64)
        counts.append(np.diff(bounds, append=size))
    return sums @ _LUMA / np.outer(*counts)


def distinct_frames(frames: npt.NDArray[np.uint8], threshold: float) -> npt.NDArray[np.int64]:
    """For each of ``frames [T, H, W, 3]`` the frame that stands for it, int64 ``[T]``: itself, or the last kept one.

    A frame goes when its thumbnail differs from the last *kept* one's by no more than ``threshold``, the mean absolute
    difference in grey levels of 0 to 255. A slow change thus adds up until a frame is kept. ``OptionError`` for a
    threshold outside 0 to 255.
    """
    check_threshold(threshold)
    stands = np.empty(len(frames), np.int64)
    kept: npt.NDArray[np.float64] | None = None
    last = 0
    for index, frame in enumerate(frames):
        small = thumbnail(frame)
        if kept is None or np.abs(small - kept).mean() > threshold:
            kept, last = small, index
        stands[index] = last
    return stands


def check_threshold(threshold: float) -> None:
    """``OptionError`` for what is no difference of grey levels."""
    if not 0 <= threshold <= 255:
        raise OptionError(f"the threshold for near-duplicate frames is 0 to 255 grey levels, not {threshold:g}")
