"""Rendered clips against geometry, Fourier transforms and their own decoding."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import intertitle.calibration.render as render
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.calibration.render import (
    COLORS,
    Background,
    Scene,
    Shape,
    Sound,
    center,
    main,
    random_scene,
    render_frames,
    render_sound,
    write_clip,
)
from intertitle.errors import OptionError

DEMO = Path(render.__file__).parent / "clips" / "demo.mp4"
BLACK = Background("plain", ("black", "black"))


def decode(path: Path) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Frames, sound (of the first channel) and its rate."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return frames, None, 0
        track = container.streams.audio[0]
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(track)])
        return frames, sound, track.rate


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


def near(frame: np.ndarray, color: str, tolerance: int) -> np.ndarray:
    return np.abs(frame.astype(int) - COLORS[color]).max(axis=-1) <= tolerance


def centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5, rows.mean() + 0.5


def dominating_frequency(sound: np.ndarray, rate: int, start: float, stop: float) -> float:
    piece = sound[round(start * rate) : round(stop * rate)]
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 8 * len(piece)))
    return float(np.argmax(spectrum) * rate / (8 * len(piece)))


def lag(late: np.ndarray, early: np.ndarray) -> int:
    """Samples by which one signal trails another, where their cross-correlation is largest."""
    size = len(late) + len(early)
    product = np.fft.rfft(late, size) * np.conj(np.fft.rfft(early, size))
    found = int(np.argmax(np.fft.irfft(product, size)))
    return found if found < len(late) else found - size


# --- frames


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("circle", lambda r: math.pi * r**2),
        ("square", lambda r: 4 * r**2),
        ("triangle", lambda r: 3 * math.sqrt(3) / 4 * r**2),
    ],
)
@pytest.mark.parametrize("size", [7.3, 20.0])
@pytest.mark.parametrize("middle", [(48.0, 40.0), (47.6, 41.3)])
def test_a_shape_covers_its_area_around_its_centre(kind: str, area, size: float, middle: tuple[float, float]) -> None:
    shape = Shape(kind, "white", size, middle)  # type: ignore[arg-type]
    frame = render_frames(Scene((96, 80), 25, 0.04, BLACK, [shape]))[0]
    cover = (frame.astype(float).mean(axis=-1) - 16) / (245 - 16)
    # Corners of a polygon are rounded by about a pixel each.
    assert cover.sum() == pytest.approx(area(size), abs=0.01 * area(size) + (0 if kind == "circle" else 1.5))
    weights = cover / cover.sum()
    found = (weights.sum(0) @ (np.arange(96) + 0.5), weights.sum(1) @ (np.arange(80) + 0.5))
    assert found == pytest.approx(middle, abs=0.1)
    aligned = kind == "square" and size == 20 and middle == (48, 40)
    assert ((cover > 0.05) & (cover < 0.95)).any() != aligned, "edges are antialiased"


def test_a_triangle_points_up() -> None:
    frame = render_frames(Scene((64, 64), 25, 0.04, BLACK, [Shape("triangle", "white", 20, (32, 32))]))[0]
    widths = near(frame, "white", 100).sum(axis=1)
    rows = np.nonzero(widths)[0]
    assert rows[0] == pytest.approx(32 - 20, abs=1.5)
    assert rows[-1] == pytest.approx(32 + 10, abs=1.5)
    assert (np.diff(widths[rows]) >= 0).all()


def test_backgrounds() -> None:
    colors = ("red", "blue")
    plain, gradient, checker = (
        render_frames(Scene((40, 30), 10, 0.1, Background(kind, colors, cell=10)))[0]  # type: ignore[arg-type]
        for kind in ("plain", "gradient", "checker")
    )
    assert (plain == COLORS["red"]).all()
    assert (gradient[:, 0] == gradient[:, -1]).all()
    assert np.abs(gradient[0, 0].astype(int) - COLORS["red"]).max() <= 4
    assert np.abs(gradient[-1, 0].astype(int) - COLORS["blue"]).max() <= 4
    assert np.abs(gradient[15, 0] - (np.array(COLORS["red"]) + COLORS["blue"]) / 2).max() <= 4
    assert (checker[:10, :10] == COLORS["red"]).all()
    assert (checker[:10, 10:20] == COLORS["blue"]).all()
    assert (checker[10:20, 10:20] == COLORS["red"]).all()


def test_later_shapes_cover_earlier_ones_and_may_be_cut_off() -> None:
    shapes = [
        Shape("square", "red", 10, (0, 0)),
        Shape("circle", "blue", 5, (5, 5)),
        Shape("circle", "red", 5, (99, 9)),
    ]
    frame = render_frames(Scene((20, 20), 25, 0.04, BLACK, shapes))[0]
    assert (frame[5, 5] == COLORS["blue"]).all()
    assert (frame[0, 0] == COLORS["red"]).all()
    assert (frame[15, 15] == COLORS["black"]).all()


def test_linear_motion_leaves_the_frame() -> None:
    shape = Shape("square", "red", 4, (10, 10), velocity=(20, 0))
    frames = render_frames(Scene((32, 20), 10, 2, BLACK, [shape]))
    assert centroid(near(frames[5], "red", 60)) == pytest.approx((20, 10), abs=0.6)
    assert not near(frames[-1], "red", 100).any()


@settings(max_examples=200, deadline=None)
@given(
    position=st.tuples(st.floats(0, 320), st.floats(0, 240)),
    velocity=st.tuples(st.floats(-400, 400), st.floats(-400, 400)),
    time=st.floats(0, 60),
)
def test_a_bouncing_shape_stays_inside_and_keeps_its_speed(position, velocity, time: float) -> None:
    shape = Shape("circle", "red", 25, position, velocity, motion="bounce")
    size = (320, 240)
    here, soon = center(shape, size, time), center(shape, size, time + 1e-3)
    for axis in (0, 1):
        assert 25 - 1e-6 <= here[axis] <= size[axis] - 25 + 1e-6
        assert abs(soon[axis] - here[axis]) <= abs(velocity[axis]) * 1e-3 + 1e-6
    # After there and back the shape is where it was.
    period = [2 * (length - 50) / abs(speed) if abs(speed) > 1 else None for length, speed in zip(size, velocity)]  # noqa: B905
    for axis, turn in enumerate(period):
        if turn is not None:
            assert center(shape, size, time + turn)[axis] == pytest.approx(here[axis], abs=1e-6)


def test_a_bounce_turns_at_the_wall() -> None:
    shape = Shape("square", "red", 10, (50, 50), (100, 0), motion="bounce")
    places = [center(shape, (100, 100), time)[0] for time in (0, 0.4, 0.5, 1.2, 1.6)]
    assert places == pytest.approx([50, 90, 80, 10, 50])


# --- sound


def test_tones_are_where_and_what_the_timeline_says() -> None:
    sounds = [
        Sound("tone", 0.5, 1.0, frequency=440, level=0.5),
        Sound("silence", 1.5, 1.0),
        Sound("tone", 2.5, 1.5, frequency=1234.5, level=0.25),
    ]
    sound = render_sound(Scene((16, 16), 25, 4, BLACK, sounds=sounds))
    assert (sound.dtype, sound.shape) == (np.float32, (64000,))
    assert not sound[:8000].any()
    assert not sound[24000:40000].any()
    assert dominating_frequency(sound, 16000, 0.6, 1.4) == pytest.approx(440, abs=0.5)
    assert dominating_frequency(sound, 16000, 2.6, 3.9) == pytest.approx(1234.5, abs=0.5)
    assert np.abs(sound[9000:23000]).max() == pytest.approx(0.5, rel=1e-3)
    assert np.abs(sound[41000:63000]).max() == pytest.approx(0.25, rel=1e-3)
    assert np.abs(np.diff(sound)).max() < 2 * math.pi * 1234.5 / 16000 * 0.26, "no clicks where sounds begin and end"


def test_a_sweep_rises_evenly() -> None:
    sound = render_sound(Scene((16, 16), 25, 2, BLACK, sounds=[Sound("sweep", 0, 2, 500, 3500, 0.9)]))
    for time in (0.2, 0.7, 1.0, 1.5, 1.8):
        wanted = 500 + (3500 - 500) * time / 2
        assert dominating_frequency(sound, 16000, time - 0.02, time + 0.02) == pytest.approx(wanted, rel=0.03)


def test_noise_is_white_and_its_seed_counts() -> None:
    scene = Scene((16, 16), 25, 4, BLACK, sounds=[Sound("noise", 0, 4, level=0.6, seed=3)])
    sound = render_sound(scene)
    power = (np.abs(np.fft.rfft(sound.reshape(-1, 1000) * np.hanning(1000), axis=1)) ** 2).mean(axis=0)[5:-5]
    bands = power[: len(power) // 10 * 10].reshape(10, -1).mean(axis=1)
    assert bands.max() / bands.min() < 1.5
    assert sound.std() == pytest.approx(0.6 / math.sqrt(3), rel=0.03)
    assert (render_sound(scene) == sound).all()
    other = replace(scene, sounds=[replace(scene.sounds[0], seed=4)])
    assert np.corrcoef(render_sound(other), sound)[0, 1] == pytest.approx(0, abs=0.05)


def test_sounds_add_up_and_end_with_the_frames() -> None:
    both = [Sound("tone", 0, 9, 300, level=0.8), Sound("tone", 0, 9, 700, level=0.8), Sound("tone", 5, 1)]
    sound = render_sound(Scene((16, 16), 25, 1, BLACK, sounds=both), rate=8000)
    assert len(sound) == 8000
    assert np.abs(sound).max() == 1
    spectrum = np.abs(np.fft.rfft(sound))
    assert {300, 700} == set(np.argsort(spectrum)[-2:])


# --- clips


def test_decoding_gives_the_frames_and_the_sound_back(tmp_path: Path) -> None:
    sounds = [Sound("tone", 0, 1, 600), Sound("noise", 1, 0.5, seed=1), Sound("sweep", 1.5, 0.5, 400, 1200)]
    shapes = [
        Shape("circle", "yellow", 14, (30, 60), (40, -10)),
        Shape("square", "red", 10, (100, 60), (-30, 60), motion="bounce"),
    ]
    scene = Scene((160, 120), 20, 2, Background("gradient", ("blue", "black")), shapes, sounds)
    write_clip(scene, tmp_path / "clip.mp4")
    frames, sound, rate = decode(tmp_path / "clip.mp4")
    wanted = render_frames(scene)
    assert frames.shape == wanted.shape == (40, 120, 160, 3)
    assert min(psnr(ours, theirs) for ours, theirs in zip(wanted, frames, strict=True)) > 30
    for index in (0, 13, 39):
        for shape, tolerance in zip(shapes, (70, 70), strict=True):
            place = centroid(near(frames[index], shape.color, tolerance))
            assert place == pytest.approx(center(shape, scene.size, index / 20), abs=1.0)
    assert sound is not None
    assert rate == 44100
    assert len(sound) / rate == pytest.approx(2, abs=0.05)
    assert dominating_frequency(sound, rate, 0.2, 0.8) == pytest.approx(600, abs=2)
    ours = render_sound(scene, rate)
    assert lag(sound, ours) == 0, "the encoder's delay is in the file's edit list"
    with av.open(str(tmp_path / "clip.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.pix_fmt, video.average_rate) == ("yuv420p", Fraction(20))


def test_a_scene_without_sounds_has_no_track(tmp_path: Path) -> None:
    write_clip(Scene((32, 32), 10, 0.5, BLACK), tmp_path / "mute.mp4")
    frames, sound, _ = decode(tmp_path / "mute.mp4")
    assert len(frames) == 5
    assert sound is None


def test_one_seed_one_clip(tmp_path: Path) -> None:
    scene = random_scene(7, (96, 64), 10, 1.0)
    assert scene == random_scene(7, (96, 64), 10, 1.0)
    assert (render_frames(scene) == render_frames(random_scene(7, (96, 64), 10, 1.0))).all()
    for name in "ab":
        write_clip(scene, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    scenes = [random_scene(seed) for seed in range(40)]
    assert len({repr(scene) for scene in scenes}) == 40
    assert {shape.kind for scene in scenes for shape in scene.shapes} == {"circle", "square", "triangle"}
    assert {sound.kind for scene in scenes for sound in scene.sounds} == {"tone", "sweep", "noise", "silence"}
    assert {scene.background.kind for scene in scenes} == {"plain", "gradient", "checker"}


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), seconds=st.floats(0.1, 12))
def test_a_random_timeline_fills_the_clip(seed: int, seconds: float) -> None:
    scene = random_scene(seed, seconds=seconds)
    ends = [0.0]
    for sound in scene.sounds:
        assert sound.start == pytest.approx(ends[-1])
        ends.append(sound.start + sound.seconds)
    assert ends[-1] == pytest.approx(seconds)
    assert scene.sounds[0].kind != "silence"
    colors = [shape.color for shape in scene.shapes] + list(scene.background.colors)
    assert len(set(colors)) == len(colors)


def test_the_shipped_clip_is_that_of_seed_0() -> None:
    assert DEMO.stat().st_size < 150_000
    frames, sound, rate = decode(DEMO)
    scene = random_scene(0)
    assert frames.shape == (125, 240, 320, 3)
    assert psnr(render_frames(scene), frames) > 30
    assert sound is not None
    assert lag(sound, render_sound(scene, rate)) == 0
    tone = next(event for event in scene.sounds if event.kind == "tone")
    heard = dominating_frequency(sound, rate, tone.start + 0.1, tone.start + tone.seconds - 0.1)
    assert heard == pytest.approx(tone.frequency, abs=2)


def test_command(tmp_path: Path) -> None:
    small = ["--width", "64", "--height", "48", "--fps", "10", "--seconds", "1"]
    ran = CliRunner().invoke(main, ["-o", str(tmp_path / "a.mp4"), "--seed", "3", *small])
    assert (ran.exit_code, ran.output) == (0, "")
    frames, sound, _ = decode(tmp_path / "a.mp4")
    assert frames.shape == (10, 48, 64, 3)
    assert sound is not None
    ran = CliRunner().invoke(main, ["-o", str(tmp_path / "b.mp4"), "--silent", *small])
    assert ran.exit_code == 0
    assert decode(tmp_path / "b.mp4")[1] is None


# --- bad input


@pytest.mark.parametrize("size", [(33, 32), (32, 33)])
def test_odd_sizes_are_refused_for_a_clip_but_not_for_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    scene = Scene(size, 10, 0.2, BLACK)
    assert render_frames(scene).shape == (2, size[1], size[0], 3)
    with pytest.raises(OptionError, match=f"even numbers, not {size[0]} x {size[1]}"):
        write_clip(scene, tmp_path / "odd.mp4")
    ran = CliRunner().invoke(main, ["-o", str(tmp_path / "odd.mp4"), "--width", str(size[0]), "--height", str(size[1])])
    assert ran.exit_code == 2
    assert ran.output.startswith("intertitle: a clip's width and height")
    assert ran.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written: No such file or directory"):
        write_clip(Scene((32, 32), 10, 0.2, BLACK), tmp_path / "nowhere" / "a.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptionError, match="cannot be written: Is a directory"):
        write_clip(Scene((32, 32), 10, 0.2, BLACK), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shape("star", "red", 5, (0, 0)), "shape 'star' is not one of circle, square, triangle"),  # type: ignore[arg-type]
        (lambda: Shape("circle", "mauve", 5, (0, 0)), "color 'mauve' is not one of red"),
        (lambda: Shape("circle", "red", 0, (0, 0)), "size is greater than 0, not 0"),
        (lambda: Shape("circle", "red", 5, (0, 0), motion="spin"), "motion 'spin'"),  # type: ignore[arg-type]
        (lambda: Background("stripes"), "background 'stripes'"),  # type: ignore[arg-type]
        (lambda: Background(colors=("red", "mauve")), "color 'mauve'"),
        (lambda: Sound("hum", 0, 1), "sound 'hum'"),  # type: ignore[arg-type]
        (lambda: Sound("tone", -1, 1), "a sound starts at 0 or later"),
        (lambda: Sound("tone", 0, 1, level=2), "level from 0 to 1"),
        (lambda: Sound("tone", 0, float("nan")), "seconds is greater than 0, not nan"),
        (lambda: Scene((0, 10), 25, 1, BLACK), "width is greater than 0"),
        (lambda: Scene((10, 10), 0, 1, BLACK), "fps is greater than 0"),
        (lambda: Scene((10, 10), 1, 0.4, BLACK), "less than one frame"),
        (lambda: render_sound(Scene((10, 10), 1, 1, BLACK, sounds=[Sound("tone", 0, 1, 8000)])), "less than 8000 Hz"),
    ],
)
def test_impossible_scenes(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
