"""The two audio policies and resampling: hand-computed clips, exact sines, scipy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.preprocess.audio import audio_policy, resample, video_policy


def ramp(count: int) -> np.ndarray:
    """Samples that say where they come from."""
    return np.arange(1, count + 1, dtype=np.float32)


def sine(hertz: float, rate: int, seconds: float, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def test_clips_of_a_long_sound_by_hand() -> None:
    # 10.0001 s: spare 128001.6 samples' worth of start positions, in eighths 0, 16000.2, 32000.4, ... truncated.
    out = video_policy(ramp(160_001))
    assert out.shape == (480_000,)
    assert out.dtype == np.float32
    starts = [0, 16000, 32000, 48000, 64000, 80000, 96000, 112000]
    assert out[:256_000:32_000].tolist() == [start + 1 for start in starts]
    for clip, start in enumerate(starts):
        np.testing.assert_array_equal(out[clip * 32_000 : (clip + 1) * 32_000], ramp(160_001)[start : start + 32_000])
    assert not out[256_000:].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(32_000, 3_000_000), st.sampled_from([7, 8]))
def test_clip_bounds_are_exact_rationals(count: int, divisor: int) -> None:
    out = video_policy(ramp(count), divisor)  # type: ignore[arg-type]
    seconds = Fraction(count, 16_000)
    for clip in range(8):
        start = Fraction(clip) * (seconds - 2) / divisor
        first, last = int(start * 16_000), int((start + 2) * 16_000)
        assert last - first == 32_000
        assert out[clip * 32_000] == np.float32(first + 1)
        assert out[clip * 32_000 + 31_999] == np.float32(last)


@pytest.mark.parametrize("count", [0, 1, 15_999, 31_999])
def test_less_than_two_seconds_is_heard_eight_times(count: int) -> None:
    out = video_policy(ramp(count))
    np.testing.assert_array_equal(out[: 8 * count], np.tile(ramp(count), 8))
    assert not out[8 * count :].any()


def test_audio_policy_keeps_the_first_thirty_seconds_of_the_first_channel() -> None:
    out = audio_policy(np.stack([ramp(500_000), -ramp(500_000)]), 16_000)
    np.testing.assert_array_equal(out, ramp(480_000))
    short = audio_policy(ramp(1000), 16_000)
    np.testing.assert_array_equal(short[:1000], ramp(1000))
    assert short.shape == (480_000,)
    assert not short[1000:].any()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_fourier_resampling_of_a_periodic_sine_is_exact(rate: int) -> None:
    # 440 Hz and 3 kHz end on a whole period after 30 s, so their spectrum is two lines and survives a change of rate.
    for hertz in (440, 3000):
        out = audio_policy(sine(hertz, rate, 30), rate)
        np.testing.assert_allclose(out, sine(hertz, 16_000, 30), atol=2e-6)


def test_what_the_new_rate_cannot_hold_is_cut() -> None:
    assert np.abs(audio_policy(sine(9000, 44_100, 30), 44_100)).max() < 1e-6


@pytest.mark.parametrize(("count", "rate"), [(44_100 * 3 + 1, 44_100), (48_000 * 31, 48_000), (11_025 * 2, 11_025)])
def test_audio_policy_is_scipy(count: int, rate: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    samples = np.random.default_rng(0).standard_normal(count).astype(np.float32) * 0.1
    padded = np.zeros(30 * rate)
    padded[: min(count, len(padded))] = samples[: len(padded)]
    np.testing.assert_allclose(audio_policy(samples, rate), signal.resample(padded, 480_000), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_resample_keeps_a_tone(rate: int) -> None:
    out = resample(sine(440, rate, 1), rate, 16_000)
    assert out.dtype == np.float32
    assert abs(len(out) - 16_000) <= 20
    inner = slice(200, 15_800)  # away from the filter's edges
    np.testing.assert_allclose(out[inner], sine(440, 16_000, 1)[inner], atol=1e-3)
    steps = out * 32768
    np.testing.assert_array_equal(steps, np.rint(steps))


def test_resample_mixes_channels_down_to_their_mean() -> None:
    left, right = sine(440, 16_000, 1, 0.9), sine(440, 16_000, 1, 0.3)
    np.testing.assert_allclose(resample(np.stack([left, right]), 16_000, 16_000), (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("channels", range(1, 9))
def test_resample_takes_up_to_eight_channels(channels: int) -> None:
    out = resample(np.full((channels, 4410), 0.25, np.float32), 44_100, 16_000)
    assert abs(len(out) - 1600) <= 20
    assert 0.1 < out[800] <= 0.25


def test_nothing_resampled_is_nothing() -> None:
    assert resample(np.zeros(0, np.float32), 44_100, 16_000).shape == (0,)


def test_refusals() -> None:
    with pytest.raises(MediaError, match="mono"):
        video_policy(np.zeros((2, 10), np.float32))
    with pytest.raises(OptionError, match="sevenths or eighths"):
        video_policy(np.zeros(10, np.float32), 9)  # type: ignore[arg-type]
    for rate in (0, -1, 10**9):
        with pytest.raises(MediaError, match="not possible"):
            audio_policy(np.zeros(10, np.float32), rate)
    with pytest.raises(MediaError, match="9 channels"):
        resample(np.zeros((9, 10), np.float32), 44_100, 16_000)


@pytest.mark.parametrize("rate", [47_999, 192_000, 352_800, 384_000])
def test_rates_of_real_sounds_are_read(rate: int) -> None:
    assert audio_policy(np.zeros(rate, np.float32), rate).shape == (480_000,)


@pytest.mark.parametrize("rate", [192_001, 532_288, 800_000])
def test_rates_whose_transform_takes_gigabytes_are_told(rate: int) -> None:
    """532,288 = 2**6 * 8317: its transform took 2.4 GB."""
    with pytest.raises(MediaError, match=f"a sample rate of {rate} Hz is not read"):
        audio_policy(np.zeros(1000, np.float32), rate)
