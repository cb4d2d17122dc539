"""What a scene says is seen in its frames: by colours, centroids and areas, which know nothing of the renderer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.align.scenes import Background, Heard, Scene, Thing, draw_scene, render_frames, write_clip
from intertitle.align.scenes.layout import BOUNCE
from intertitle.errors import OptionError
from numpy.typing import NDArray

RGB = {"red": (214, 40, 40), "blue": (36, 84, 200), "green": (46, 158, 68), "yellow": (244, 208, 36)}
QUIET = (Heard("silence"), Heard("silence"))
SIZE = 96
#: The times of the eight frames that a captioner sees of a clip: indices round((i + 0.5) * 99 / 8) at 25 a second.
EIGHT = [round((i + 0.5) * 99 / 8) / 25 for i in range(8)]
SEEDS = range(6)


def scene_of(*things: Thing, seed: int = 0, kind: str = "plain", colors: Sequence[str] = ("grey",), **more) -> Scene:
    return Scene(Background(kind, tuple(colors)), more.pop("camera", "still"), things, QUIET, seed=seed, **more)  # type: ignore[arg-type]


def mask(frames: NDArray[np.uint8], color: str) -> NDArray[np.bool_]:
    return np.abs(frames.astype(int) - RGB[color]).sum(axis=-1) < 60


def areas(frames: NDArray[np.uint8], color: str) -> NDArray[np.float64]:
    """In parts of the frame."""
    return mask(frames, color).mean(axis=(1, 2))


def centroids(frames: NDArray[np.uint8], color: str) -> NDArray[np.float64]:
    """``[T, 2]`` as (x, y) in parts of the side."""
    found = []
    for shown in mask(frames, color):
        rows, columns = np.nonzero(shown)
        found.append(((columns.mean() + 0.5) / len(shown), (rows.mean() + 0.5) / len(shown)))
    return np.array(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("when", ["first", "then", "throughout"])
@pytest.mark.parametrize(
    ("action", "axis", "sign"),
    [("moves left", 0, -1), ("moves right", 0, 1), ("moves up", 1, -1), ("moves down", 1, 1)],
)
def test_moves(action: str, axis: int, sign: int, when, seed: int):
    scene = scene_of(Thing("circle", "red", "small", action, when), seed=seed)
    way = centroids(render_frames(scene, [0, 2, 4], SIZE), "red")
    first, second = (way[1:] - way[:-1])[:, axis] * sign
    other = np.abs(way - way[0])[:, 1 - axis].max()
    assert other < 0.01
    assert first + second > 0.35
    assert (first < 0.01) == (when == "then")
    assert (second < 0.01) == (when == "first")


@pytest.mark.parametrize("seed", SEEDS)
def test_bounces(seed: int):
    """Up and down again, to be seen in as few as the four frames of a half."""
    for when, times in (("throughout", EIGHT), ("first", EIGHT[:4]), ("then", EIGHT[4:])):
        scene = scene_of(Thing("square", "red", "large", "bounces", when), seed=seed)
        way = centroids(render_frames(scene, times, SIZE), "red")
        assert np.ptp(way[:, 0]) < 0.01
        assert np.ptp(way[:, 1]) > 0.15
        assert (np.diff(way[:, 1]) > 0.02).any()
        assert (np.diff(way[:, 1]) < -0.02).any()
    scene = scene_of(Thing("square", "red", "large", "bounces"), seed=seed)
    ground = centroids(render_frames(scene, [0, BOUNCE, 2 * BOUNCE], SIZE), "red")
    assert np.ptp(ground[:, 1]) < 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_stays_still(seed: int):
    frames = render_frames(scene_of(Thing("cross", "red", "small", "stays still"), seed=seed), EIGHT, SIZE)
    assert (frames == frames[0]).all()
    assert areas(frames, "red")[0] > 0.01


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("when", ["first", "then", "throughout"])
def test_grows_and_shrinks(size, when):
    for action, low, high in (("grows", 1.9, 3.3), ("shrinks", 0.15, 0.35)):
        frames = render_frames(scene_of(Thing("circle", "red", size, action, when)), [0, 2, 4], SIZE)
        start, middle, end = areas(frames, "red")
        assert low < end / start < high
        assert (abs(middle / start - 1) < 0.02) == (when == "then")
        assert (abs(middle / end - 1) < 0.02) == (when == "first")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("when", ["first", "then"])
def test_moments_are_in_their_half_and_seen_in_eight_frames(when, seed: int):
    half = slice(0, 4) if when == "first" else slice(4, 8)
    appearing = (
        areas(render_frames(scene_of(Thing("circle", "red", "large", "appears", when), seed=seed), EIGHT, SIZE), "red")
        > 0
    )
    leaving = (
        areas(
            render_frames(scene_of(Thing("circle", "red", "large", "disappears", when), seed=seed), EIGHT, SIZE), "red"
        )
        > 0
    )
    frames = render_frames(scene_of(Thing("circle", "red", "large", "turns", when, "blue"), seed=seed), EIGHT, SIZE)
    turning = areas(frames, "blue") > 0
    assert ((areas(frames, "red") > 0) != turning).all()
    for after in (appearing, ~leaving, turning):
        assert (np.diff(after.astype(int)) >= 0).all()
        assert 1 <= after[half].sum() <= 3
        assert after.any()
        assert not after.all()


def test_things_do_not_hide_each_other():
    """What keeps its size and stays keeps its area in the picture too, but for a few that another passes over."""
    hidden = []
    for index in range(250):
        scene = draw_scene("train", index)
        for thing in scene.things:
            if thing.color in RGB and thing.action.partition(" ")[0] in ("moves", "bounces", "stays"):
                shown = areas(render_frames(scene, EIGHT, SIZE), thing.color)
                hidden += list(shown < 0.85 * shown.max())
    assert len(hidden) > 800
    assert np.mean(hidden) < 0.02


def test_sizes_and_shapes():
    """Areas by geometry; a shape by how much of its bounding box it fills."""
    fills = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 1 - (1 - 0.38 / 1.15) ** 2}
    for shape, fill in fills.items():
        for size, radius in (("small", 0.09), ("large", 0.17)):
            for seed in range(3):
                frames = render_frames(scene_of(Thing(shape, "red", size, "stays still"), seed=seed), [0], 384)  # type: ignore[arg-type]
                shown = mask(frames, "red")[0]
                assert shown.mean() == pytest.approx(math.pi * radius**2, rel=0.12)
                rows, columns = np.nonzero(shown)
                box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
                assert len(rows) / box == pytest.approx(fill, abs=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_backgrounds(seed: int):
    thing = Thing("circle", "red", "small", "stays still")
    plain = render_frames(scene_of(thing, seed=seed, colors=["white"]), [0], SIZE)[0]
    assert (plain == 245).all(axis=-1).mean() > 0.95
    for kind in ("checkered", "striped"):
        frame = render_frames(scene_of(thing, seed=seed, kind=kind, colors=["black", "white"]), [0], SIZE)[0]
        black, white = ((frame == level).all(axis=-1) for level in (16, 245))
        assert 0.3 < black.mean() < 0.6
        assert 0.3 < white.mean() < 0.6
        mixed_columns = (black.any(axis=0) & white.any(axis=0)).mean()
        assert mixed_columns == (0 if kind == "striped" else pytest.approx(1, abs=0.25))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("camera", "sign"), [("still", 0), ("pans left", 1), ("pans right", -1)])
@pytest.mark.parametrize("kind", ["checkered", "striped"])
def test_a_pan_shifts_everything_the_other_way(kind: str, camera, sign: int, seed: int):
    thing = Thing("circle", "red", "small", "stays still")
    scene = scene_of(thing, seed=seed, kind=kind, colors=["black", "white"], camera=camera)
    frames = render_frames(scene, EIGHT, SIZE)
    moved = centroids(frames, "red")[-1] - centroids(frames, "red")[0]
    assert moved[0] * sign > 0.15 if sign else moved[0] == 0
    assert abs(moved[1]) < 0.01
    # The shift of the background from frame to frame that fits best, where no thing is.
    grey = np.where(mask(frames, "red"), 128, frames[..., 1]).astype(float)
    for one, two in pairwise(grey):
        errors = {by: np.abs(np.roll(one, by, 1) - two)[:, 8:-8].mean() for by in range(-6, 7)}
        best = min(errors, key=lambda by: errors[by])
        assert np.sign(best) == sign


@pytest.mark.parametrize("index", range(4))
def test_the_clip_on_disk_shows_and_sounds_the_same(tmp_path: Path, index: int):
    scene = draw_scene("test", index)
    write_clip(scene, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 25
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(tmp_path / "a.mp4")) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert decoded.shape == (100, 192, 192, 3)
    assert len(sound) / 44100 == pytest.approx(4, abs=0.1)
    indices = [round(time * 25) for time in EIGHT]
    halved = decoded[indices].astype(float).reshape(8, 96, 2, 96, 2, 3).mean(axis=(2, 4))
    direct = render_frames(scene, EIGHT, 96)
    assert np.abs(halved - direct).mean() < 3
    assert np.abs(halved - direct[::-1]).mean() > 1.2 * np.abs(halved - direct).mean()


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 10**6),
    times=st.lists(st.floats(0, 4), min_size=1, max_size=4),
    size=st.sampled_from([16, 33, 96]),
)
def test_a_frame_does_not_depend_on_the_others(index: int, times: list[float], size: int):
    scene = draw_scene("train", index)
    frames = render_frames(scene, times, size)
    assert frames.shape == (len(times), size, size, 3)
    assert frames.dtype == np.uint8
    for time, frame in zip(times, frames, strict=True):
        alone = render_frames(scene, [time], size)[0]
        assert np.abs(alone.astype(int) - frame).max() <= 1


def test_an_odd_size_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match="even numbers"):
        write_clip(draw_scene("train", 0), tmp_path / "a.mp4", 95)
    assert not list(tmp_path.iterdir())
