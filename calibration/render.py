"""Short synthetic clips whose content is known: moving shapes over a background, tones and noise on a timeline.

A ``Scene`` says what there is; ``render_frames`` and ``render_sound`` draw it with numpy, ``write_clip`` encodes it as
H.264 and AAC. ``python -m intertitle.calibration.render -o clip.mp4`` writes the clip of a seed.
Lengths are pixels, times seconds, frequencies hertz; x goes right and y down from the top left corner.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar, get_args

import av
import click
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from ..errors import IntertitleError, OptionError
from ..whole_files import whole

BackgroundKind = Literal["plain", "gradient", "checker"]
ShapeKind = Literal["circle", "square", "triangle"]
Motion = Literal["linear", "bounce"]
SoundKind = Literal["tone", "sweep", "noise", "silence"]
_T = TypeVar("_T")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 128, 24),
    "yellow": (244, 208, 36),
    "green": (46, 158, 68),
    "cyan": (40, 190, 200),
    "blue": (36, 84, 200),
    "purple": (128, 52, 168),
    "pink": (240, 130, 180),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
}
"""RGB by name."""

FADE = 0.01
"""Seconds over which a sound comes and goes, so that it does not click."""


@dataclass(frozen=True)
class Background:
    """``plain`` is the first colour; ``gradient`` goes to the second from top to bottom; ``checker`` alternates.

    ``cell`` is the side of a checker's square.
    """

    kind: BackgroundKind = "plain"
    colors: tuple[str, str] = ("grey", "white")
    cell: int = 40

    def __post_init__(self) -> None:
        _check_choice("background", self.kind, get_args(BackgroundKind))
        for color in self.colors:
            _check_choice("color", color, tuple(COLORS))
        _check_positive("cell", self.cell)


@dataclass(frozen=True)
class Shape:
    """A filled shape around a moving centre.

    ``size`` is a circle's radius, half the side of a square, the distance from the centre to a corner of a triangle
    (which is equilateral and points up). ``position`` is the centre at the start, ``velocity`` pixels a second;
    ``bounce`` turns back where the shape would leave the frame, ``linear`` goes on.
    """

    kind: ShapeKind
    color: str
    size: float
    position: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    motion: Motion = "linear"

    def __post_init__(self) -> None:
        _check_choice("shape", self.kind, get_args(ShapeKind))
        _check_choice("color", self.color, tuple(COLORS))
        _check_choice("motion", self.motion, get_args(Motion))
        _check_positive("size", self.size)


@dataclass(frozen=True)
class Sound:
    """A stretch of the sound timeline. Sounds that overlap are added.

    ``frequency`` is a tone's pitch and where a sweep starts, ``end_frequency`` where the sweep ends. ``level`` is the
    peak amplitude, 1 full scale. ``seed`` chooses the noise.
    """

    kind: SoundKind
    start: float
    seconds: float
    frequency: float = 440.0
    end_frequency: float = 440.0
    level: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("sound", self.kind, get_args(SoundKind))
        _check_positive("seconds", self.seconds)
        _check_positive("frequency", min(self.frequency, self.end_frequency))
        if self.start < 0 or not 0 <= self.level <= 1:
            raise OptionError(f"a sound starts at 0 or later at a level from 0 to 1, not at {self.start}, {self.level}")


@dataclass(frozen=True)
class Scene:
    """All of a clip. ``size`` is (width, height). Later shapes cover earlier ones; no sounds mean no audio track."""

    size: tuple[int, int]
    fps: int
    seconds: float
    background: Background
    shapes: Sequence[Shape] = ()
    sounds: Sequence[Sound] = ()

    def __post_init__(self) -> None:
        for name, value in (("width", self.size[0]), ("height", self.size[1]), ("fps", self.fps)):
            _check_positive(name, value)
        _check_positive("seconds", self.seconds)
        if self.num_frames < 1:
            raise OptionError(f"{self.seconds} s at {self.fps} frames a second is less than one frame")

    @property
    def num_frames(self) -> int:
        return round(self.seconds * self.fps)


def random_scene(seed: int, size: tuple[int, int] = (320, 240), fps: int = 25, seconds: float = 5.0) -> Scene:
    """A scene of one to three shapes of different colours and a sound timeline that fills the clip."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(list(COLORS))]
    kinds: tuple[BackgroundKind, ...] = get_args(BackgroundKind)
    background = Background(_choose(rng, kinds), (names[0], names[1]), cell=int(rng.integers(16, 64)))
    shapes = [_random_shape(rng, color, size) for color in names[2 : 2 + int(rng.integers(1, 4))]]
    return Scene(size, fps, seconds, background, tuple(shapes), tuple(_random_sounds(rng, seconds)))


def center(shape: Shape, size: tuple[int, int], time: float) -> tuple[float, float]:
    """Where the shape's centre is at a time, in a frame of ``size``."""
    x, y = (start + speed * time for start, speed in zip(shape.position, shape.velocity, strict=True))
    if shape.motion == "linear":
        return x, y
    return _fold(x, shape.size, size[0] - shape.size), _fold(y, shape.size, size[1] - shape.size)


def render_frames(scene: Scene) -> NDArray[np.uint8]:
    """The frames, RGB uint8 ``[T, H, W, 3]``; frame i shows time i / fps. Edges are antialiased over one pixel."""
    background = _draw_background(scene)
    frames = np.empty((scene.num_frames, *background.shape), np.uint8)
    for index in range(len(frames)):
        canvas = background.copy()
        for shape in scene.shapes:
            _draw_shape(canvas, shape, center(shape, scene.size, index / scene.fps))
        frames[index] = np.rint(canvas)
    return frames


def render_sound(scene: Scene, rate: int = 16000) -> NDArray[np.float32]:
    """The sound, mono float32 ``[n]`` in [-1, 1], as long as the frames last.

    Raises ``OptionError`` for a frequency that the rate cannot carry.
    """
    total = round(scene.num_frames / scene.fps * rate)
    track = np.zeros(total, np.float64)
    for sound in scene.sounds:
        if sound.kind in ("tone", "sweep") and max(sound.frequency, sound.end_frequency) >= rate / 2:
            raise OptionError(f"a sample rate of {rate} carries less than {rate / 2:g} Hz")
        start = round(sound.start * rate)
        wave = _render_wave(sound, rate)[: max(total - start, 0)]
        track[start : start + len(wave)] += wave
    return np.clip(track, -1, 1).astype(np.float32)


def write_clip(scene: Scene, path: str | Path, rate: int = 44100) -> None:
    """Encode the scene as an mp4: H.264 (yuv420p, crf 23) and, if it has sounds, AAC mono at ``rate``.

    The file is whole or absent. Raises ``OptionError`` for an odd width or height, which yuv420p cannot hold, for a
    path that cannot be written, and as ``render_sound``.
    """
    _check_even(scene.size)
    write_mp4(path, render_frames(scene), scene.fps, render_sound(scene, rate) if scene.sounds else None, rate)


def write_mp4(
    path: str | Path, frames: NDArray[np.uint8], fps: int, sound: NDArray[np.float32] | None = None, rate: int = 44100
) -> None:
    """Encode frames uint8 ``[T, H, W, 3]`` and mono sound float32 ``[n]`` as ``write_clip`` does, with its errors."""
    path = Path(path)
    _check_even((frames.shape[2], frames.shape[1]))
    try:
        with whole(path) as partial:
            _encode(frames, fps, sound, partial, rate)
    except (OSError, FFmpegError) as error:
        raise OptionError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


# --- frames


def _draw_background(scene: Scene) -> NDArray[np.float32]:
    """Float32 ``[H, W, 3]``, 0 to 255."""
    width, height = scene.size
    first, second = (np.array(COLORS[name], np.float32) for name in scene.background.colors)
    canvas = np.empty((height, width, 3), np.float32)
    if scene.background.kind == "plain":
        canvas[:] = first
    elif scene.background.kind == "gradient":
        share = (np.arange(height, dtype=np.float32) + 0.5) / height
        canvas[:] = (first + share[:, None] * (second - first))[:, None]
    else:
        rows, columns = np.arange(height) // scene.background.cell, np.arange(width) // scene.background.cell
        canvas[:] = np.where(((rows[:, None] + columns) % 2 == 0)[..., None], first, second)
    return canvas


def _draw_shape(canvas: NDArray[np.float32], shape: Shape, middle: tuple[float, float]) -> None:
    """Blend the shape into the canvas. A pixel is covered by its distance to the edge, half a pixel to either side."""
    reach = shape.size * math.sqrt(2) + 1
    spans = [
        slice(max(math.floor(at - reach), 0), max(min(math.ceil(at + reach), limit), 0))
        for at, limit in zip(middle, (canvas.shape[1], canvas.shape[0]), strict=True)
    ]
    x = np.arange(spans[0].start, spans[0].stop, dtype=np.float32) + np.float32(0.5 - middle[0])
    y = np.arange(spans[1].start, spans[1].stop, dtype=np.float32) + np.float32(0.5 - middle[1])
    cover = np.clip(0.5 - _DISTANCES[shape.kind](x[None, :], y[:, None], shape.size), 0, 1)[..., None]
    box = canvas[spans[1], spans[0]]
    box += cover * (np.array(COLORS[shape.color], np.float32) - box)


def _circle(x: NDArray[np.float32], y: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    return np.hypot(x, y) - np.float32(size)


def _square(x: NDArray[np.float32], y: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(size)


def _triangle(x: NDArray[np.float32], y: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    """The base is half the size below the centre, and so are the other two sides, 120 degrees on."""
    sides = np.float32(math.sqrt(3) / 2) * np.abs(x) - y / 2
    return np.maximum(y, sides) - np.float32(size / 2)


#: Signed distance to the edge, negative inside, by shape.
_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle}


def _fold(value: float, low: float, high: float) -> float:
    """A straight line folded between two walls; the middle where there is no room between them."""
    if high <= low:
        return (low + high) / 2
    offset = (value - low) % (2 * (high - low))
    return low + min(offset, 2 * (high - low) - offset)


# --- sound


def _render_wave(sound: Sound, rate: int) -> NDArray[np.float64]:
    count = round(sound.seconds * rate)
    time = np.arange(count) / rate
    if sound.kind == "silence":
        return np.zeros(count)
    if sound.kind == "noise":
        wave = np.random.default_rng(sound.seed).uniform(-1, 1, count)
    else:
        rise = sound.end_frequency - sound.frequency if sound.kind == "sweep" else 0.0
        # The phase is the integral of a frequency that goes up in a straight line.
        wave = np.sin(2 * math.pi * (sound.frequency * time + rise * time**2 / (2 * sound.seconds)))
    fade = np.minimum(np.minimum(time, time[::-1]) / FADE, 1)
    return sound.level * wave * np.sin(fade * math.pi / 2) ** 2


# --- chance


def _choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _random_shape(rng: np.random.Generator, color: str, size: tuple[int, int]) -> Shape:
    kinds: tuple[ShapeKind, ...] = get_args(ShapeKind)
    motions: tuple[Motion, ...] = ("linear", "bounce", "bounce")
    radius = round(float(rng.uniform(0.08, 0.18)) * min(size), 1)
    angle = rng.uniform(0, 2 * math.pi)
    speed = float(rng.uniform(0.15, 0.5)) * min(size)
    return Shape(
        kind=_choose(rng, kinds),
        color=color,
        size=radius,
        position=(round(float(rng.uniform(0.2, 0.8)) * size[0], 1), round(float(rng.uniform(0.2, 0.8)) * size[1], 1)),
        velocity=(round(speed * math.cos(angle), 1), round(speed * math.sin(angle), 1)),
        motion=_choose(rng, motions),
    )


def _random_sounds(rng: np.random.Generator, seconds: float) -> list[Sound]:
    """Stretches of half a second to a second and a half, one after the other, the first of them heard."""
    kinds: tuple[SoundKind, ...] = ("tone", "tone", "sweep", "noise", "silence")
    sounds: list[Sound] = []
    start = 0.0
    while start < seconds:
        length = round(float(rng.uniform(0.5, 1.5)), 3)
        if seconds - start - length < 0.5:
            length = seconds - start
        low, high = (round(float(value), 1) for value in 2.0 ** rng.uniform(np.log2(150), np.log2(4000), 2))
        sound = Sound(
            kind=_choose(rng, kinds if sounds else kinds[:-1]),
            start=start,
            seconds=length,
            frequency=low,
            end_frequency=high,
            level=round(float(rng.uniform(0.2, 0.6)), 2),
            seed=int(rng.integers(1 << 31)),
        )
        sounds.append(sound)
        start += length
    return sounds


# --- encoding


def _encode(frames: NDArray[np.uint8], fps: int, sound: NDArray[np.float32] | None, path: Path, rate: int) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: x264 splits its work by threads, and the file is to be the same everywhere.
        video = container.add_stream("libx264", rate=fps, options={"crf": "23", "threads": "1"})
        video.width, video.height = frames.shape[2], frames.shape[1]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=rate, layout="mono") if sound is not None else None
        for array in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))


# --- checks and the command


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"{name} {value!r} is not one of {', '.join(choices)}")


def _check_even(size: tuple[int, int]) -> None:
    """yuv420p halves both sides for its colours."""
    if size[0] % 2 or size[1] % 2:
        raise OptionError(f"a clip's width and height are even numbers, not {size[0]} x {size[1]}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise OptionError(f"{name} is greater than 0, not {value}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The mp4 to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which scene.")
@click.option("--width", default=320, show_default=True)
@click.option("--height", default=240, show_default=True)
@click.option("--fps", default=25, show_default=True)
@click.option("--seconds", default=5.0, show_default=True)
@click.option("--silent", is_flag=True, help="No audio track.")
def main(output: Path, seed: int, width: int, height: int, fps: int, seconds: float, silent: bool) -> None:
    """Render the synthetic clip of a seed."""
    try:
        scene = random_scene(seed, (width, height), fps, seconds)
        write_clip(replace(scene, sounds=()) if silent else scene, output)
    except IntertitleError as error:
        click.echo(f"intertitle: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
