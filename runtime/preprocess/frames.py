"""Which frames of a clip a captioner looks at."""

from __future__ import annotations

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
