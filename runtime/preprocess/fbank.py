"""Kaldi's log mel filter bank, as the audio tower hears it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ...contract.pipeline import SoundPlan
from ...errors import MediaError
from .products import matmul_alone

FloatArray = npt.NDArray[np.float32]

SAMPLE_RATE = 16_000
NUM_MEL_BINS = 128
FRAME_LENGTH = 400
FRAME_SHIFT = 160
_FFT_SIZE = 512
_PREEMPHASIS = 0.97
_LOW_FREQUENCY = 20.0


def sound_features(samples: FloatArray, plan: SoundPlan) -> FloatArray:
    """What the audio tower takes, float32 ``[num_frames, num_mel_bins]``, of ``samples [num_samples]`` in [-1, 1]."""
    return _FEATURES[plan.feature](samples, plan.num_mel_bins)


def kaldi_fbank(samples: FloatArray, num_mel_bins: int = NUM_MEL_BINS) -> FloatArray:
    """Log mel energies float32 ``[1 + (n - 400) // 160, num_mel_bins]`` of ``samples [n]``, 16 kHz in [-1, 1].

    VideoLLaMA2 mm_utils.py: samples times 2**15 through torchaudio's ``kaldi.fbank`` with 128 bins and Kaldi's
    defaults (25 ms povey windows every 10 ms, only whole ones; mean removed, pre-emphasis 0.97; power spectrum of 512
    points; 20 Hz to 8 kHz; floor float32 epsilon; no dither), then through bfloat16, round to nearest even. 30 s give
    ``[2998, 128]``. ``MediaError`` for fewer samples than one window.
    """
    if samples.ndim != 1 or len(samples) < FRAME_LENGTH:
        raise MediaError(f"the sound is too short to hear: {samples.size} samples, at least {FRAME_LENGTH} are needed")
    scaled = samples.astype(np.float64) * 2.0**15
    frames = np.lib.stride_tricks.sliding_window_view(scaled, FRAME_LENGTH)[::FRAME_SHIFT]
    frames = frames - frames.mean(axis=1, keepdims=True)
    # The sample before the first is the first itself (torchaudio pads by replication).
    emphasized = frames.copy()
    emphasized[:, 1:] -= _PREEMPHASIS * frames[:, :-1]
    emphasized[:, 0] -= _PREEMPHASIS * frames[:, 0]
    emphasized *= _povey_window()
    spectrum = np.fft.rfft(emphasized, _FFT_SIZE)[:, : _FFT_SIZE // 2]
    power = spectrum.real**2 + spectrum.imag**2
    energies = np.empty((len(power), num_mel_bins))
    matmul_alone(power, _mel_filters(num_mel_bins), energies)
    np.maximum(energies, np.finfo(np.float32).eps, out=energies)
    return _round_to_bfloat16(np.log(energies).astype(np.float32))


_FEATURES = {"kaldi_fbank": kaldi_fbank}


@lru_cache(maxsize=1)
def _povey_window() -> npt.NDArray[np.float64]:
    """Kaldi's povey window ``[400]``: a symmetric Hann window to the power 0.85."""
    phase = 2.0 * np.pi * np.arange(FRAME_LENGTH) / (FRAME_LENGTH - 1)
    return (0.5 - 0.5 * np.cos(phase)) ** 0.85


@lru_cache(maxsize=2)
def _mel_filters(num_mel_bins: int) -> npt.NDArray[np.float64]:
    """Triangular filters ``[256, num_mel_bins]``, equally spaced on the mel scale (the Nyquist bin has no weight).

    Computed in float32 as torchaudio does: the filters are differences of close numbers, and their rounding there is
    visible after the bfloat16 step. The logarithm alone is a rounded float64, the same on every machine.
    """
    low, high = _mel(_LOW_FREQUENCY), _mel(SAMPLE_RATE / 2)
    step = (high - low) / (num_mel_bins + 1)
    bins = np.arange(num_mel_bins, dtype=np.float32)
    left = np.float32(low) + bins * np.float32(step)
    center = np.float32(low) + (bins + np.float32(1)) * np.float32(step)
    right = np.float32(low) + (bins + np.float32(2)) * np.float32(step)
    frequencies = np.arange(_FFT_SIZE // 2, dtype=np.float32) * np.float32(SAMPLE_RATE / _FFT_SIZE)
    ratio = np.float32(1) + frequencies / np.float32(700.0)
    mel = np.float32(1127.0) * np.log(ratio.astype(np.float64)).astype(np.float32)
    up = (mel[:, np.newaxis] - left) / (center - left)
    down = (right - mel[:, np.newaxis]) / (right - center)
    return np.maximum(np.float32(0), np.minimum(up, down)).astype(np.float64)


def _mel(frequency: float) -> float:
    """Kaldi's mel scale."""
    return 1127.0 * float(np.log(1.0 + frequency / 700.0))


def _round_to_bfloat16(values: FloatArray) -> FloatArray:
    """The nearest bfloat16 of each finite value, ties to even, as float32."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
