"""Spans of a long video: by length against their rule, by scene against clips whose cuts are known."""

from __future__ import annotations

import itertools
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.media.segments import fixed_spans, scene_spans

COLOURS = [(200, 30, 30), (30, 60, 200), (240, 240, 240), (20, 120, 20)]


def scenes(path: Path, lengths: list[int], fps: int = 25, times: list[int] | None = None) -> Path:
    """Plain scenes of so many frames with a square that moves through them; ``times``: a pts in ms for each frame."""
    index = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for scene, length in enumerate(lengths):
            for _ in range(length):
                picture = np.full((96, 128, 3), COLOURS[scene % len(COLOURS)], np.uint8)
                picture[30:50, index % 100 :][:, :20] = 128
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, fps)
                if times is not None:
                    frame.pts, frame.time_base = times[index], Fraction(1, 1000)
                container.mux(stream.encode(frame))
                index += 1
        container.mux(stream.encode(None))
    return path


def test_pieces_of_a_length_by_hand() -> None:
    assert fixed_spans(60, 30) == [(0, 30), (30, 60)]
    assert fixed_spans(67, 30) == [(0, 30), (30, 67)]  # 7 s are less than a quarter of 30
    assert fixed_spans(68, 30) == [(0, 30), (30, 60), (60, 68)]
    assert fixed_spans(5, 30) == [(0, 5)]
    assert len(fixed_spans(1.0, 0.1)) == 10


@given(st.floats(0.01, 1e5), st.floats(0.1, 1e4))
def test_pieces_cover_the_source_without_gaps(duration: float, seconds: float) -> None:
    if duration / seconds > 1e4:
        return
    spans = fixed_spans(duration, seconds)
    assert (spans[0][0], spans[-1][1]) == (0, duration)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [end - start for start, end in spans]
    slack = 1e-9 * duration
    assert all(abs(length - seconds) <= slack for length in lengths[:-1])
    assert lengths[-1] < seconds * 1.25 + slack
    assert len(spans) == 1 or lengths[-1] >= seconds / 4 - slack


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.05, float("nan"), float("inf")])
def test_lengths_that_are_refused(seconds: float) -> None:
    with pytest.raises(OptionError, match="segments are"):
        fixed_spans(10, seconds)


@pytest.mark.parametrize("duration", [0.0, float("nan"), float("inf")])
def test_without_a_duration(duration: float) -> None:
    with pytest.raises(MediaError, match="duration"):
        fixed_spans(duration, 10)


def test_hard_cuts_are_found(tmp_path: Path) -> None:
    path = scenes(tmp_path / "clip.mp4", [50, 40, 60, 30])
    assert scene_spans(path) == [
        (pytest.approx(a), pytest.approx(b)) for a, b in [(0, 2), (2, 3.6), (3.6, 6), (6, 7.2)]
    ]


def test_cuts_of_a_variable_rate_are_at_the_time_of_their_frame(tmp_path: Path) -> None:
    # The first scene is shown at 10 frames a second, the second at 50.
    times = [100 * n for n in range(20)] + [2000 + 20 * n for n in range(100)]
    spans = scene_spans(scenes(tmp_path / "clip.mp4", [20, 100], times=times))
    assert [start for start, _ in spans] == [0, pytest.approx(2.0)]
    assert spans[-1][1] == pytest.approx(4.0, abs=0.1)


def test_without_a_cut_there_is_one_span(tmp_path: Path) -> None:
    assert scene_spans(scenes(tmp_path / "clip.mp4", [60])) == [(0, pytest.approx(2.4))]


def test_short_scenes_are_joined(tmp_path: Path) -> None:
    path = scenes(tmp_path / "clip.mp4", [50, 5, 50])
    assert len(scene_spans(path, min_seconds=0)) == 3
    assert all(end - start >= 1 for start, end in scene_spans(path, min_seconds=1.0))
    assert scene_spans(path, threshold=255) == [(0, pytest.approx(4.2))]


def test_scenes_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scenes(tmp_path / "clip.mp4", [5])
    for threshold, least in ((0, 1), (-1, 1), (float("nan"), 1), (300, 1), (27, -1), (27, float("nan"))):
        with pytest.raises(OptionError):
            scene_spans(path, threshold, least)
    text = tmp_path / "notes.txt"
    text.write_text("no video")
    for wrong in (text, tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(MediaError, match=str(wrong)):
            scene_spans(wrong)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(OptionError, match=r"intertitle\[scenes\]"):
        scene_spans(path)
