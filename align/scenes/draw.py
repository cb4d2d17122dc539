"""The frames of a scene, straight to an array of any size or to an mp4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...calibration.render import COLORS as RGB
from ...calibration.render import write_mp4
from .layout import SECONDS, Layout, Track, layout
from .scene import Scene
from .sounds import render_sound

FPS = 25
NUM_FRAMES = round(SECONDS * FPS)
"""Of the clip on disk: ``SECONDS`` at ``FPS``."""

_Distance = Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]


def render_frames(scene: Scene, times: Sequence[float] | NDArray[np.floating], size: int) -> NDArray[np.uint8]:
    """RGB frames uint8 ``[T, size, size, 3]`` at the times ``[T]`` in seconds. Edges are antialiased over one pixel."""
    at = np.asarray(times, np.float64)
    plan = layout(scene)
    shift = plan.shift(at)
    # A margin as wide as the largest thing: what leaves the frame needs no case of its own.
    boxes = [_box_side(track, at, size) for track in plan.tracks]
    margin = max(boxes)
    canvas = np.empty((len(at), size + 2 * margin, size + 2 * margin, 3), np.uint8)
    canvas[:, margin : margin + size, margin : margin + size] = _draw_background(scene, plan, shift, size)
    for track, side in zip(plan.tracks, boxes, strict=True):
        centers = track.centers(at)
        centers[:, 0] += shift
        _draw_track(canvas, track, at, centers * size, side, margin)
    return np.ascontiguousarray(canvas[:, margin : margin + size, margin : margin + size])


def write_clip(scene: Scene, path: str | Path, size: int = 192, rate: int = 44100) -> None:
    """Encode the whole scene as an mp4: H.264 of ``NUM_FRAMES`` frames, AAC mono at ``rate``.

    Raises ``OptionError`` as ``calibration.render.write_mp4``.
    """
    frames = render_frames(scene, np.arange(NUM_FRAMES) / FPS, size)
    write_mp4(path, frames, FPS, render_sound(scene, rate), rate)


# --- background


def _draw_background(scene: Scene, plan: Layout, shift: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Uint8 ``[T or 1, size, size, 3]``."""
    colors = [np.array(RGB[name], np.float32) for name in scene.background.colors]
    if scene.background.kind == "plain":
        return np.rint(colors[0]).astype(np.uint8).reshape(1, 1, 1, 3)
    if not plan.pan:
        shift = shift[:1]
    cell = plan.cell * size
    pixel = np.arange(size, dtype=np.float64) + 0.5
    across = _stripes(pixel - (shift[:, None] * size + plan.offset[0] * 2 * cell), cell)[:, None, :]
    if scene.background.kind == "checkered":
        down = _stripes(pixel - plan.offset[1] * 2 * cell, cell)[None, :, None]
        across = across * down + (1 - across) * (1 - down)
    # 256 shades between the two colours are all that a byte can tell apart.
    shades = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    table = np.rint(colors[0] + shades * (colors[1] - colors[0])).astype(np.uint8)
    return table[np.broadcast_to(np.rint(across * 255).astype(np.uint8), (len(shift), size, size))]


def _stripes(x: NDArray[np.float64], cell: float) -> NDArray[np.float32]:
    """How much of the pixel around x is in a stripe; stripes and gaps are ``cell`` wide, a stripe begins at 0."""
    inside = cell / 2 - np.abs(np.mod(x + cell / 2, 2 * cell) - cell)
    return np.clip(0.5 - inside, 0, 1).astype(np.float32)


# --- things


def _box_side(track: Track, times: NDArray[np.float64], size: int) -> int:
    """Pixels of a square that holds the thing at each of the times, with a pixel for its edge on either side."""
    return math.ceil(2 * _REACH[track.thing.shape] * float(track.radii(times).max(initial=0)) * size) + 4


def _draw_track(
    canvas: NDArray[np.uint8],
    track: Track,
    times: NDArray[np.float64],
    centers: NDArray[np.float64],
    side: int,
    margin: int,
) -> None:
    """Blend a thing into all frames. A pixel is covered by its distance to the edge, half a pixel to either side."""
    size = canvas.shape[1] - 2 * margin
    radii = (track.radii(times) * size).astype(np.float32)
    corners = np.clip(np.rint(centers - side / 2).astype(int), -margin, size + margin - side)
    offsets = (corners - centers + 0.5).astype(np.float32)
    pixel = np.arange(side, dtype=np.float32)
    x, y = offsets[:, :1] + pixel, offsets[:, 1:] + pixel
    distance = _DISTANCES[track.thing.shape](x[:, None, :], y[:, :, None], radii[:, None, None])
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    color = np.array(RGB[track.thing.color], np.float32)
    turned = np.array(RGB[track.thing.to], np.float32) if track.thing.to else color
    changed = track.progress(times) > 0
    for index in np.flatnonzero(radii):
        left, top = corners[index] + margin
        box = canvas[index, top : top + side, left : left + side]
        paint = turned if changed[index] else color
        box[:] = box + cover[index] * (paint - box) + 0.5


def _circle(x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sqrt(x * x + y * y) - radius


def _square(x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.89) * radius


def _triangle(x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """Equilateral, pointing up; its centre is at half its height: as much room above as below."""
    y = y - np.float32(0.37) * radius
    sides = np.float32(math.sqrt(3) / 2) * np.abs(x) - y / 2
    return np.maximum(y, sides) - np.float32(0.74) * radius


def _cross(x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two bars, upright and level."""
    x, y = np.abs(x), np.abs(y)
    long, short = np.float32(1.15) * radius, np.float32(0.38) * radius
    return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))


#: Signed distance to the edge in pixels, negative inside, by shape.
_DISTANCES: dict[str, _Distance] = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
#: How far the shape reaches from its centre along an axis, in radii.
_REACH = {"circle": 1.0, "square": 0.89, "triangle": 1.29, "cross": 1.15}
