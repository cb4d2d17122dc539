"""What captions leave out: exact places, speeds, moments and pitches, drawn from the seed of a scene.

Lengths are parts of the frame's side, times seconds; x goes right and y down from the top left corner.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .scene import Scene, Thing, half_of

SECONDS = 4.0
HALF = SECONDS / 2
RADIUS = {"small": 0.09, "large": 0.17}
"""Radii of the circle. The other shapes cover about the same area."""

BOUNCE = 1.5
"""Seconds of a bounce. Frames half a second apart see three phases of it."""

#: Factors on the radius: a thing keeps its size until it grows or shrinks.
_GROWTH = {"small": 1.75, "large": 1.45}
_SHRINKAGE = 0.5
_PAN = (0.22, 0.3)
_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
#: Where in its half a moment may be: before and after it is a frame of eight that shows the difference.
_MOMENTS = {"appears": (0.4, 1.1), "disappears": (0.85, 1.6), "turns": (0.8, 1.2)}
#: Placements that are tried before the best of them is taken.
_TRIES = 64


@dataclass(frozen=True)
class Track:
    """A thing's way: rest at ``start``, an action from ``begin`` to ``end``, rest where it has led.

    ``begin`` equals ``end`` for what takes a moment. ``travel`` is the way of a move, ``hop`` a bounce's height.
    """

    thing: Thing
    start: tuple[float, float]
    begin: float
    end: float
    travel: tuple[float, float]
    hop: float

    def progress(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much of the action is done, 0 to 1, ``[T]``."""
        if self.begin == self.end:
            return (times >= self.begin).astype(np.float64)
        return np.clip((times - self.begin) / (self.end - self.begin), 0, 1)

    def centers(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Centres ``[T, 2]`` as (x, y) before the camera's pan."""
        way = np.array(self.start) + self.progress(times)[:, None] * np.array(self.travel)
        if self.hop:
            phase = np.clip(times, self.begin, self.end) - self.begin
            way[:, 1] -= self.hop * np.abs(np.sin(math.pi * phase / BOUNCE))
        return way

    def radii(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Radii ``[T]``; 0 while the thing is not there."""
        radius, done = RADIUS[self.thing.size], self.progress(times)
        if self.thing.action in ("grows", "shrinks"):
            factor = _SHRINKAGE if self.thing.action == "shrinks" else _GROWTH[self.thing.size]
            return radius * (1 + done * (factor - 1))
        if self.thing.action in ("appears", "disappears"):
            return radius * ((done > 0) == (self.thing.action == "appears"))
        return np.full(len(times), radius)


@dataclass(frozen=True)
class Layout:
    """``pan`` is how far the view's content moves right in the whole clip, ``cell`` a check's or stripe's width,
    ``offset`` where the first one begins; ``gain`` the sound's peak, ``pitches`` (low, high) hertz, ``noise`` its seed.
    """

    tracks: tuple[Track, ...]
    pan: float
    cell: float
    offset: tuple[float, float]
    gain: float
    pitches: tuple[float, float]
    noise: int

    def shift(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far everything is moved to the right by the camera, ``[T]``."""
        return self.pan * (times / SECONDS - 0.5)


@lru_cache(maxsize=64)
def layout(scene: Scene) -> Layout:
    """The layout of a scene, the same on every machine."""
    rng = random.Random(f"intertitle layout {scene.seed}")
    side = {"still": 0, "pans left": 1, "pans right": -1}[scene.camera]
    pan = side * rng.uniform(*_PAN)
    tracks = _place(rng, [_track(rng, thing) for thing in scene.things], pan)
    return Layout(
        tracks=tracks,
        pan=pan,
        cell=rng.uniform(0.11, 0.15),
        offset=(rng.random(), rng.random()),
        gain=math.exp(rng.uniform(math.log(0.2), math.log(0.7))),
        pitches=(rng.uniform(220, 330), rng.uniform(1200, 2000)),
        noise=rng.getrandbits(32),
    )


def _track(rng: random.Random, thing: Thing) -> Track:
    """A track that starts at (0, 0)."""
    begin, end = (0.0, SECONDS) if thing.when == "throughout" else (HALF * half_of(thing), HALF * (half_of(thing) + 1))
    if thing.momentary:
        begin = end = begin + rng.uniform(*_MOMENTS[thing.action])
    far = rng.uniform(0.44, 0.54) if thing.when == "throughout" else rng.uniform(0.36, 0.46)
    x, y = _DIRECTIONS.get(thing.action, (0, 0))
    hop = rng.uniform(0.28, 0.38) if thing.action == "bounces" else 0.0
    return Track(thing, (0.0, 0.0), begin, end, (far * x, far * y), hop)


def _place(rng: random.Random, tracks: list[Track], pan: float) -> tuple[Track, ...]:
    """Start each track where it stays in the frame, and all of them where they keep apart."""
    times = np.linspace(0.0, SECONDS, 17)
    shift = pan * (times / SECONDS - 0.5)
    ways = np.stack([track.centers(times) for track in tracks])
    radii = np.stack([track.radii(times) for track in tracks])
    seen = ways + np.stack([shift, np.zeros_like(shift)], axis=-1)
    # Corners reach beyond the radius, the lower ones of a triangle farthest.
    corners = np.array([(1.28 if track.thing.shape == "triangle" else 1.15, 1.15) for track in tracks])
    reach = corners * radii.max(axis=1)[:, None]
    if pan:
        # A pan may begin and end with a part of a thing outside, or two large things would not fit beside each other.
        reach[:, 0] *= 0.6
    low, high = reach - seen.min(axis=1), 1 - reach - seen.max(axis=1)
    # If there is no room, the way is centred and its ends lie partly outside.
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    chance = np.array([rng.random() for _ in range(_TRIES * len(tracks) * 2)]).reshape(_TRIES, len(tracks), 2)
    starts = low + chance * (high - low)
    best = 0
    if len(tracks) > 1:
        centers = starts[:, :, None] + ways
        gaps = np.full(_TRIES, np.inf)
        for i in range(len(tracks)):
            for j in range(i):
                apart = np.hypot(*np.moveaxis(centers[:, i] - centers[:, j], -1, 0)) - 1.1 * (radii[i] + radii[j])
                apart[:, (radii[i] == 0) | (radii[j] == 0)] = np.inf
                gaps = np.minimum(gaps, apart.min(axis=1))
        best = int(np.argmax(np.minimum(gaps, 0.02)))
    return tuple(
        Track(track.thing, (float(start[0]), float(start[1])), track.begin, track.end, track.travel, track.hop)
        for track, start in zip(tracks, starts[best], strict=True)
    )
