"""What of a sound reaches the audio tower: the policies of sound plans, made deterministic, and resampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import MediaError, OptionError

FloatArray = npt.NDArray[np.float32]

SAMPLE_RATE = 16_000
SECONDS = 30
NUM_SAMPLES = SECONDS * SAMPLE_RATE
#: Hz; above the first the primes of a rate matter, above the second it is too fast.
_FAST, _FASTEST = 192_000, 400_000
_NUM_CLIPS = 8
_CLIP_SAMPLES = 2 * SAMPLE_RATE
#: FFmpeg's default speaker layouts by number of channels, in which it mixes an unlabelled sound down.
_LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")


def video_policy(samples: FloatArray, divisor: Literal[7, 8] = 8, num_samples: int = NUM_SAMPLES) -> FloatArray:
    """The sound that goes with a video: float32 ``[num_samples]`` from ``samples [n]``, mono at 16 kHz.

    Eight clips of 2 s, clip i from ``i * max(D - 2, 0) / divisor`` seconds of the D that there are (bounds truncated
    to whole samples), joined and padded with silence to 30 s; less than 2 s are repeated eight times. VideoLLaMA2
    mm_utils.py ``process_audio_from_video`` over pytorchvideo's constant clips: its release 0.1.5 divides by 8, its
    main branch by 7 (docs/facts.md 1.4).
    """
    if samples.ndim != 1:
        raise MediaError(f"the sound of a video must be mono [n], not {list(samples.shape)}")
    return join_clips([samples[first:last] for first, last in clip_bounds(len(samples), divisor)], num_samples)


def clip_bounds(count: int, divisor: Literal[7, 8] = 8) -> list[tuple[int, int]]:
    """First and last of the samples in each of the eight clips of ``video_policy``, of ``count`` samples."""
    if divisor not in (7, 8):
        raise OptionError(f"clips of sound are spaced by sevenths or eighths, not by {divisor}")
    spare = max(count - _CLIP_SAMPLES, 0)
    starts = [clip * spare // divisor for clip in range(_NUM_CLIPS)]
    return [(start, min(start + _CLIP_SAMPLES, count)) for start in starts]


def join_clips(clips: Sequence[FloatArray], num_samples: int = NUM_SAMPLES) -> FloatArray:
    """The clips of ``clip_bounds`` one after the other, then silence: float32 ``[num_samples]``."""
    out = np.zeros(num_samples, np.float32)
    filled = 0
    for clip in clips:
        clip = clip[: num_samples - filled]
        out[filled : filled + len(clip)] = clip
        filled += len(clip)
    return out


def audio_policy(samples: FloatArray, sample_rate: int, num_samples: int = NUM_SAMPLES) -> FloatArray:
    """A sound on its own: float32 ``[num_samples]`` from ``samples [n]`` or the first channel of ``[channels, n]``.

    The beginning (the reference crops at random: docs/facts.md 1.4), padded with silence, then
    Fourier-resampled to 16 kHz as librosa's ``res_type="fft"`` does. VideoLLaMA2 mm_utils.py ``process_audio_file``.
    """
    _check_rate(sample_rate)
    _check_transform(sample_rate)
    channel = samples if samples.ndim == 1 else samples[0]
    padded = np.zeros(num_samples * sample_rate // SAMPLE_RATE)
    kept = channel[: len(padded)]
    padded[: len(kept)] = kept
    if sample_rate == SAMPLE_RATE:
        return padded.astype(np.float32)
    return _fourier_resample(padded, num_samples).astype(np.float32)


@dataclass(frozen=True)
class SoundPolicy:
    """What of a sound is heard (``SoundPlan.policy``), as float32 ``[num_samples]`` at the plan's rate.

    ``alone(samples, sample_rate, num_samples)``: of a sound on its own. ``of_video(samples, num_samples)``: of the
    sound of a video, mono at the plan's rate. ``bounds(count)``: the first and last of those of its ``count`` samples
    that are heard, clip by clip; joined by ``join_clips`` they are what ``of_video`` gives.
    """

    alone: Callable[[FloatArray, int, int], FloatArray]
    of_video: Callable[[FloatArray, int], FloatArray]
    bounds: Callable[[int], list[tuple[int, int]]]


POLICIES = {
    "eight_clips": SoundPolicy(
        audio_policy, lambda samples, num_samples: video_policy(samples, num_samples=num_samples), clip_bounds
    ),
}


def resample(samples: FloatArray, from_rate: int, to_rate: int) -> FloatArray:
    """Mono float32 ``[n']`` in steps of 2**-15 from ``samples [n]`` or ``[channels, n]``, as ffmpeg makes 16-bit sound.

    libswresample mixes down, resamples and rounds to int16, which is what the reference hears of a video
    (``ffmpeg -ac 1 -ar 16000 -f s16le``), so that an array and a file with the same samples give the same tokens.
    """
    import av
    from av.error import FFmpegError

    _check_rate(from_rate)
    _check_rate(to_rate)
    channels = np.atleast_2d(samples)
    if not 1 <= len(channels) <= len(_LAYOUTS):
        raise MediaError(f"cannot mix down {len(channels)} channels: 1 to {len(_LAYOUTS)} are known")
    if channels.shape[1] == 0:
        return np.zeros(0, np.float32)
    interleaved = np.ascontiguousarray(channels.T, np.float32).reshape(1, -1)
    try:
        resampler = av.AudioResampler("s16", "mono", to_rate)
        frame = av.AudioFrame.from_ndarray(interleaved, "flt", _LAYOUTS[len(channels) - 1])
        frame.sample_rate = from_rate
        parts = [part.to_ndarray()[0] for given in (frame, None) for part in resampler.resample(given)]
    except (FFmpegError, ValueError) as error:
        raise MediaError(f"cannot resample from {from_rate} to {to_rate} Hz: {error}") from error
    pcm = np.concatenate([np.zeros(0, np.int16), *parts])
    return (pcm / np.float32(1 << 15)).astype(np.float32)


def _check_transform(rate: int) -> None:
    """``MediaError`` for a rate at which the Fourier transform of 30 s takes gigabytes: fast, or with a large prime in
    it, which no sound has that is that fast (176.4, 192, 352.8 and 384 kHz have none beyond 7)."""
    left = rate
    for prime in (2, 3, 5, 7):
        while left % prime == 0:
            left //= prime
    if rate > _FAST and (left > 1 or rate > _FASTEST):
        raise MediaError(
            f"a sample rate of {rate} Hz is not read: above {_FAST} Hz only those in use, such as 384000 Hz"
        )


def _check_rate(rate: int) -> None:
    if not 0 < rate <= 1_000_000:
        raise MediaError(f"a sample rate of {rate} Hz is not possible")


def _fourier_resample(samples: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """``samples [n]`` as ``[count]`` over the same time: cut or pad the spectrum (``scipy.signal.resample``)."""
    spectrum = np.fft.rfft(samples)
    shared = min(len(samples), count)
    kept = np.zeros(count // 2 + 1, spectrum.dtype)
    kept[: shared // 2 + 1] = spectrum[: shared // 2 + 1]
    if shared % 2 == 0 and len(samples) != count:
        # The bin at the lower Nyquist frequency stands for both signs: two bins fold into it, or it splits in two.
        kept[shared // 2] *= 2.0 if count < len(samples) else 0.5
    return np.fft.irfft(kept, count) * (count / len(samples))
