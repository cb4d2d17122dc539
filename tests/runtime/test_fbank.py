"""The filter bank against the fixtures, and against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from intertitle.errors import MediaError
from intertitle.runtime.preprocess.audio import audio_policy, video_policy
from intertitle.runtime.preprocess.fbank import kaldi_fbank


def step(values: np.ndarray) -> np.ndarray:
    """The distance between neighbouring bfloat16 numbers at ``values``."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2.0**-120))) - 7)


@pytest.mark.parametrize("policy", ["video", "audio"])
def test_fixtures(expected: Callable[[str], dict[str, np.ndarray]], policy: str) -> None:
    numbers = expected("av-qwen2")
    samples = numbers["audio_int16"].astype(np.float32) / 32768
    sound = video_policy(samples) if policy == "video" else audio_policy(samples, 16_000)
    fbank, reference = kaldi_fbank(sound), numbers[f"fbank_{policy}_policy"]
    assert fbank.shape == (2998, 128)
    assert fbank.dtype == np.float32
    # float32 sums in another order can move a number over the edge to its bfloat16 neighbour, no further.
    assert (np.abs(fbank - reference) <= step(reference)).all()
    assert (fbank == reference).mean() > 0.9999


def test_definition_for_one_window() -> None:
    """Kaldi's definition, sum by sum, for one window of noise."""
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal(400) * 0.1).astype(np.float32)
    x = [float(s) * 32768 for s in samples]
    mean = sum(x) / 400
    x = [value - mean for value in x]
    emphasized = [x[max(i, 0)] - 0.97 * x[max(i - 1, 0)] for i in range(400)]
    windowed = [v * (0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i, v in enumerate(emphasized)]
    phases = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    power = np.abs(phases @ np.array(windowed)) ** 2

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    edges = [mel(20) + (mel(8000) - mel(20)) * i / 129 for i in range(130)]
    energies = np.zeros(128)
    for b in range(128):
        for k in range(257):
            m = mel(k * 31.25)
            if edges[b] < m < edges[b + 2]:
                up, down = (
                    (m - edges[b]) / (edges[b + 1] - edges[b]),
                    (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1]),
                )
                energies[b] += power[k] * min(up, down)
    reference = np.log(np.maximum(energies, np.finfo(np.float32).eps))
    fbank = kaldi_fbank(samples)
    assert fbank.shape == (1, 128)
    # Half a step of the rounding, and float32 in the filters of the lowest bins.
    assert (np.abs(fbank[0] - reference) <= 0.5 * step(reference) + 2e-3).all()


def test_values_are_bfloat16_rounded_to_even() -> None:
    fbank = kaldi_fbank(np.random.default_rng(1).standard_normal(16_000).astype(np.float32) * 0.1)
    assert not (fbank.view(np.uint32) & 0xFFFF).any()


def test_silence_is_the_floor() -> None:
    # log of float32 epsilon is -15.9424 (docs/facts.md 1.4), between -16 and -15.9375 in bfloat16.
    fbank = kaldi_fbank(np.zeros(480_000, np.float32))
    assert fbank.shape == (2998, 128)
    assert (fbank == np.float32(-15.9375)).all()


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_only_whole_windows_count(samples: int, frames: int) -> None:
    assert kaldi_fbank(np.zeros(samples, np.float32)).shape == (frames, 128)


def test_less_than_a_window_is_refused() -> None:
    with pytest.raises(MediaError, match="399 samples"):
        kaldi_fbank(np.zeros(399, np.float32))
