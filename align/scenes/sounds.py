"""The sound of a scene: one of a few well-separated sounds in each half, over a floor of faint noise."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...errors import OptionError
from .layout import HALF, SECONDS, Layout, layout
from .scene import Heard, Scene, half_of

BEEP_HERTZ = 900.0
BEEP_SECONDS = 0.12
FLOOR = 0.0007
"""Peak of the noise under everything, 49 dB or more below a sound."""

_EDGE = 0.1
"""Seconds of silence at either end of a half, so that two equal sounds are two."""
_FADE = 0.01
_NOISE_LENGTH = 1 << 18


def render_sound(scene: Scene, rate: int = 16000) -> NDArray[np.float32]:
    """The sound, mono float32 ``[n]`` in [-1, 1], four seconds of it.

    Raises ``OptionError`` for a rate that cannot carry 2000 Hz.
    """
    if rate < 5000:
        raise OptionError(f"a sample rate of {rate} does not carry the high tone; 5000 is the least")
    plan = layout(scene)
    total = round(SECONDS * rate)
    track = _noise(total, plan.noise) * np.float32(FLOOR)
    tied = scene.tied_thing
    for half, heard in enumerate(scene.sounds):
        if heard.kind == "silence":
            continue
        if heard.kind == "beeps":
            moment = None
            if tied is not None and half_of(tied) == half:
                moment = plan.tracks[scene.things.index(tied)].begin
            for start in [moment] if moment is not None else _beep_times(heard, half, plan):
                _add(track, _tone(rate, BEEP_SECONDS, BEEP_HERTZ, BEEP_HERTZ), start, rate, plan.gain)
            continue
        _add(track, _lasting(heard, rate, plan), HALF * half + _EDGE, rate, plan.gain)
    return track


def _lasting(heard: Heard, rate: int, plan: Layout) -> NDArray[np.float32]:
    seconds = HALF - 2 * _EDGE
    low, high = plan.pitches
    if heard.kind == "noise":
        return _faded(_noise(round(seconds * rate), plan.noise + 77_777), rate)
    ends = {"low tone": (low, low), "high tone": (high, high), "rising tone": (low, high), "falling tone": (high, low)}
    return _tone(rate, seconds, *ends[heard.kind])


def _beep_times(heard: Heard, half: int, plan: Layout) -> list[float]:
    """Starts of beeps a good half second apart, as a row somewhere in the half."""
    gap = 0.45 + 0.1 * plan.offset[0]
    room = HALF - 2 * _EDGE - BEEP_SECONDS - gap * (heard.count - 1)
    start = HALF * half + _EDGE + room * plan.offset[1]
    return [start + gap * index for index in range(heard.count)]


def _tone(rate: int, seconds: float, start: float, end: float) -> NDArray[np.float32]:
    """A sine whose pitch goes from start to end, each octave in the same time."""
    time = np.arange(round(seconds * rate), dtype=np.float32) * np.float32(1 / rate)
    if start == end:
        cycles = np.float32(start) * time
    else:
        # The phase is the integral of start * (end / start) ** (time / seconds).
        speed = math.log(end / start) / seconds
        cycles = np.float32(start / speed) * np.expm1(np.float32(speed) * time)
    return _faded(np.sin(np.float32(2 * math.pi) * (cycles - np.floor(cycles))), rate)


def _faded(wave: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Come and go softly, so that it does not click."""
    count = round(_FADE * rate)
    ramp = np.sin(np.linspace(0, math.pi / 2, count, dtype=np.float32)) ** 2
    wave[:count] *= ramp
    wave[-count:] *= ramp[::-1]
    return wave


def _add(track: NDArray[np.float32], wave: NDArray[np.float32], start: float, rate: int, gain: float) -> None:
    first = round(start * rate)
    track[first : first + len(wave)] += wave * np.float32(gain)


@lru_cache(maxsize=1)
def _noise_table() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, _NOISE_LENGTH).astype(np.float32)


def _noise(count: int, seed: int) -> NDArray[np.float32]:
    """White noise ``[count]``: a stretch of one long table, which is much quicker than new numbers."""
    table = _noise_table()
    start = seed % len(table)
    return np.resize(np.concatenate([table[start : start + count], table[:start]]), count)
