"""What a scene says is heard in its sound: by spectra, envelopes and counts."""

from __future__ import annotations

import numpy as np
import pytest
from intertitle.align.scenes import Background, Heard, Scene, Thing, render_frames, render_sound
from numpy.typing import NDArray

RATE = 16000
STILL = Thing("circle", "red", "small", "stays still")
GREY = Background("plain", ("grey",))
SEEDS = range(8)
ALL = [Heard(kind) for kind in ("silence", "low tone", "high tone", "rising tone", "falling tone", "noise")]  # type: ignore[arg-type]
ALL += [Heard("beeps", count) for count in (1, 2, 3)]


def peak(sound: NDArray[np.float32]) -> float:
    """The strongest frequency in hertz."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(np.argmax(power)) * RATE / len(sound)


def flatness(sound: NDArray[np.float32]) -> float:
    """Geometric by arithmetic mean of the power: about 0.56 for white noise, near 0 for a tone."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))[1:-1] ** 2 + 1e-20
    return float(np.exp(np.log(power).mean()) / power.mean())


def events(sound: NDArray[np.float32], gap: float = 0.05) -> list[tuple[float, float]]:
    """Stretches above a tenth of the peak, as (start, end) in seconds; shorter pauses than the gap do not count."""
    loud = np.flatnonzero(np.abs(sound) > 0.1 * np.abs(sound).max())
    breaks = np.flatnonzero(np.diff(loud) > gap * RATE)
    starts, ends = np.r_[loud[0], loud[breaks + 1]], np.r_[loud[breaks], loud[-1]]
    return [(start / RATE, end / RATE) for start, end in zip(starts, ends, strict=True)]


def check(heard: Heard, half: NDArray[np.float32]) -> None:
    """Whether half a clip, 2 s, sounds as it should."""
    level = float(np.sqrt((half**2).mean()))
    if heard.kind == "silence":
        assert level < 0.001
        return
    assert np.abs(half).max() > 0.15
    assert np.abs(half).max() < 0.75
    start, early, late, end = (
        half[: RATE // 20],
        half[RATE // 4 : RATE // 2],
        half[-RATE // 2 : -RATE // 4],
        half[-200:],
    )
    assert np.abs(start).max() < 0.001
    assert np.abs(end).max() < 0.001
    if heard.kind == "beeps":
        found = events(half)
        assert len(found) == heard.count
        for begin, stop in found:
            assert stop - begin == pytest.approx(0.12, abs=0.02)
            assert peak(half[round(begin * RATE) : round(stop * RATE)]) == pytest.approx(900, abs=20)
    elif heard.kind == "noise":
        assert flatness(half[RATE // 4 : -RATE // 4]) > 0.4
    else:
        assert flatness(half[RATE // 4 : -RATE // 4]) < 0.1
        first, last = peak(early), peak(late)
        if heard.kind == "low tone":
            assert 215 < first < 335
            assert first == pytest.approx(last, abs=5)
        elif heard.kind == "high tone":
            assert 1190 < first < 2010
            assert first == pytest.approx(last, abs=5)
        else:
            ratio = last / first if heard.kind == "rising tone" else first / last
            assert ratio > 2
            assert 220 < min(first, last) < 700
            assert 700 < max(first, last) < 2000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("heard", ALL, ids=lambda heard: heard.name)
def test_each_half_is_heard(heard: Heard, seed: int):
    other = ALL[(ALL.index(heard) + seed) % len(ALL)]
    sound = render_sound(Scene(GREY, "still", (STILL,), (heard, other), seed=seed), RATE)
    assert (sound.dtype, sound.shape) == (np.float32, (4 * RATE,))
    check(heard, sound[: 2 * RATE])
    check(other, sound[2 * RATE :])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("when", ["first", "then"])
@pytest.mark.parametrize("action", ["appears", "disappears", "turns"])
def test_a_tied_beep_is_at_the_very_moment(action: str, when, seed: int):
    """The moment as it is seen, the beep as it is heard."""
    thing = Thing("circle", "red", "large", action, when, "blue" if action == "turns" else "")
    sounds = [Heard("noise"), Heard("noise")]
    half = int(when == "then")
    sounds[half] = Heard("beeps", 1)
    scene = Scene(GREY, "still", (thing,), (sounds[0], sounds[1]), tied=True, seed=seed)
    times = np.arange(2 * half, 2 * half + 2, 0.01)
    frames = render_frames(scene, times, 32)
    changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3)))
    assert len(changes) == 1
    begin = events(render_sound(scene, RATE)[2 * half * RATE : (2 * half + 2) * RATE])[0][0]
    assert 2 * half + begin == pytest.approx(times[changes[0] + 1], abs=0.015)


def test_another_rate_sounds_the_same():
    scene = Scene(GREY, "still", (STILL,), (Heard("rising tone"), Heard("high tone")), seed=5)
    slow, fast = render_sound(scene, 16000), render_sound(scene, 48000)[::3]
    assert np.abs(slow - fast).max() < 0.01
