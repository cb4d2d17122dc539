"""Frames and sound given as arrays: checked once at the door."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import MediaError
from .doors import reason
from .source import FrameArray, Waveform, check_size

#: Float sound may overshoot full scale a little; much more is integers that were not divided by their range.
_LOUDEST = 8.0
#: Samples of all channels: 3 hours of stereo at 48 kHz, 4 GiB of float32.
_MOST_SAMPLES = 1 << 30


def as_frames(array: npt.ArrayLike) -> FrameArray:
    """``array`` as uint8 ``[T, H, W, 3]``, or ``MediaError``: other dtypes and shapes are refused, not converted."""
    frames = _as_array(array, "frames")
    if frames.dtype != np.uint8:
        raise MediaError(f"frames must be uint8 RGB from 0 to 255, not {frames.dtype}")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise MediaError(f"frames must have shape [T, H, W, 3], not {list(frames.shape)}")
    if len(frames) == 0:
        raise MediaError("frames are empty: at least one is needed")
    check_size("frames", frames.shape[2], frames.shape[1])
    return frames


def as_waveform(array: npt.ArrayLike, rate: int) -> Waveform:
    """Mono ``[n]`` or ``[n, c]`` / ``[c, n]`` (the shorter side is channels) as float32 ``[n]`` or ``[c, n]``.

    Floats are taken as they are in [-1, 1], int16 is divided by 2**15. ``MediaError`` for another dtype or shape, no
    samples, NaN or infinity, floats far outside [-1, 1], or a sample rate that is not a whole positive number.
    """
    samples = _as_array(array, "sound samples")
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or not 0 < rate <= 1_000_000:
        raise MediaError(f"the sample rate must be a whole number of Hz from 1 to 1000000, not {rate!r}")
    if samples.ndim not in (1, 2):
        raise MediaError(f"sound must have shape [n], [n, channels] or [channels, n], not {list(samples.shape)}")
    if samples.size > _MOST_SAMPLES:
        raise MediaError(f"sound of {samples.size} samples is too long: up to {_MOST_SAMPLES} are taken")
    if samples.size == 0:
        raise MediaError("sound is empty: it holds no samples")
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / np.float32(1 << 15)
    elif samples.dtype.kind != "f":
        raise MediaError(f"sound must be float in [-1, 1] or int16, not {samples.dtype}")
    if not np.isfinite(samples).all():
        raise MediaError("sound holds NaN or infinite samples")
    loudest = float(np.abs(samples).max())
    if loudest > _LOUDEST:
        raise MediaError(f"float sound must lie in [-1, 1], not reach {loudest:.4g}: divide it by its full scale")
    if samples.ndim == 2:
        if samples.shape[1] < samples.shape[0]:
            samples = samples.T
        samples = samples[0] if len(samples) == 1 else samples
    return Waveform(np.ascontiguousarray(samples, np.float32), int(rate))


def _as_array(array: npt.ArrayLike, what: str) -> np.ndarray:
    try:
        return np.asarray(array)
    except ValueError:
        raise MediaError(f"{what} do not form one array: the parts differ in shape") from None
    except Exception as error:
        # Tensors on a GPU, or whatever else says that it is an array and then is none.
        raise MediaError(f"{what} cannot be read as an array ({reason(error)})") from error
