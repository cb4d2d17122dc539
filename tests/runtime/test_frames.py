"""Frame sampling against the fixtures' indices and the examples of docs/facts.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.contract.pipeline import Sampling
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.preprocess.frames import sample_indices, sample_places, span_frames


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral"])
def test_centered_matches_every_row_of_the_fixtures(
    expected: Callable[[str], dict[str, np.ndarray]], variant: str
) -> None:
    rows = expected(variant)["frame_sample"]
    assert len(rows) == 6
    for total, count, *indices in rows.tolist():
        sampled = sample_indices(total, count, "centered")
        assert sampled.dtype == np.int64
        assert sampled.tolist() == indices


@pytest.mark.parametrize(
    ("total", "indices"),
    [(444, [28, 83, 138, 194, 249, 305, 360, 415]), (5, [0, 1, 1, 2, 2, 3, 3, 4]), (1, [0] * 8)],
)
def test_centered_matches_the_examples_of_the_facts(total: int, indices: list[int]) -> None:
    assert sample_indices(total, 8, "centered").tolist() == indices


def test_linspace_truncates_and_reaches_both_ends() -> None:
    # 0, 14.14, 28.28, ... by hand, cut to whole numbers.
    assert sample_indices(100, 8, "linspace").tolist() == [0, 14, 28, 42, 56, 70, 84, 99]
    assert sample_indices(3, 8, "linspace").tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert sample_indices(7, 1, "linspace").tolist() == [0]


@given(st.integers(1, 10**7), st.integers(1, 64), st.sampled_from(["centered", "linspace"]))
def test_indices_ascend_within_the_clip(total: int, count: int, rule: str) -> None:
    indices = sample_indices(total, count, rule)  # type: ignore[arg-type]
    assert indices.shape == (count,)
    assert 0 <= indices[0] <= indices[-1] < total
    assert (np.diff(indices) >= 0).all()
    if count <= total:
        assert len(set(indices.tolist())) == count


def test_strided_matches_every_row_of_the_fixture(expected: Callable[[str], dict[str, np.ndarray]]) -> None:
    rows = expected("llava-next-video")["frame_sample"]
    assert len(rows) == 6
    for total, count, *indices in rows.tolist():
        places = sample_places(total, 25.0, Sampling(rule="strided", count=count))
        assert places.index.dtype == np.int64
        assert places.index.tolist() == indices


@pytest.mark.parametrize("name", ["", *(f"sample{number}." for number in range(6))])
def test_rate_matches_every_clip_of_the_fixture(name: str, expected: Callable[[str], dict[str, np.ndarray]]) -> None:
    numbers = expected("llava-video")
    total, fps, count, forced = numbers[f"{name}clip"].tolist()
    places = sample_places(int(total), fps, Sampling(rule="rate", count=int(count), fps=1.0, forced=bool(forced)))
    assert places.index.tolist() == numbers[f"{name}index" if name else "frame_index"].tolist()
    assert places.times is not None
    assert ",".join(f"{time:.2f}s" for time in places.times) == str(numbers[f"{name}frame_time"])
    assert places.seconds == numbers[f"{name}video_time"]


def test_rate_rounds_half_to_even_and_refuses_less_than_half_a_frame() -> None:
    plan = Sampling(rule="rate", count=64, fps=1.0)
    # Python's round: 2.5 is 2, 3.5 is 4; the times suppose the rounded rate.
    assert sample_places(8, 2.5, plan).index.tolist() == [0, 2, 4, 6]
    places = sample_places(8, 3.5, plan)
    assert places.times is not None
    assert (places.index.tolist(), places.times.tolist()) == ([0, 4], [0.0, 1.0])
    for fps in (0.5, 0.4):
        with pytest.raises(MediaError, match="frames a second are too few"):
            sample_places(8, fps, plan)


def test_a_forced_rate_takes_any_rate() -> None:
    """By hand: its frames are in equal steps from first to last, so no rate is too low."""
    places = sample_places(8, 0.4, Sampling(rule="rate", count=4, fps=1.0, forced=True))
    assert places.times is not None
    assert places.index.tolist() == [0, 2, 4, 7]
    np.testing.assert_allclose(places.times, [0, 5, 10, 17.5])
    assert places.seconds == pytest.approx(20.0)


def test_refusals() -> None:
    with pytest.raises(MediaError, match="no frames"):
        sample_indices(0, 8, "centered")
    with pytest.raises(OptionError, match="at least one"):
        sample_indices(8, 0, "centered")
    with pytest.raises(OptionError, match='"random"'):
        sample_indices(8, 8, "random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "fps", "start", "end", "span"),
    [
        (300, 30.0, 2.0, 5.0, (60, 150)),
        (300, 30.0, None, 5.0, (0, 150)),
        (300, 30.0, 2.0, 50.0, (60, 299)),
        (300, 29.97, 1.25, 3.75, (37, 112)),
        (100, 10.0, 0.05, 0.25, (0, 2)),
    ],
)
def test_spans_of_segments_are_internvl2_s(
    total: int, fps: float, start: float | None, end: float, span: tuple[int, int]
) -> None:
    """By hand, ``get_index``: from round(start fps) to min(round(end fps), last frame), halves to even."""
    assert span_frames(total, fps, start, end, "segments") == span


@pytest.mark.parametrize(
    ("total", "fps", "start", "end", "rule", "span"),
    [
        # Frame 2 is shown from 6.67 s to 10 s.
        (10, 0.3, 7.0, 8.0, "linspace", (2, 2)),
        (10, 0.3, 7.0, 8.0, "rate", (2, 2)),
        (10, 0.3, 7.0, 8.0, "segments", (2, 2)),
        (250, 25.0, None, 0.001, "strided", (0, 0)),
        (250, 25.0, 2.01, 2.02, "linspace", (50, 50)),
        # The last frame is shown from 3.96 s to 4 s.
        (100, 25.0, 3.98, None, "linspace", (99, 99)),
        (100, 25.0, 3.98, 9.0, "rate", (99, 99)),
        (100, 25.0, 3.99, None, "segments", (99, 99)),
    ],
)
def test_what_began_before_a_span_is_shown_in_it(
    total: int, fps: float, start: float | None, end: float | None, rule: str, span: tuple[int, int]
) -> None:
    assert span_frames(total, fps, start, end, rule) == span


@pytest.mark.parametrize("rule", ["linspace", "strided", "segments", "rate"])
def test_nothing_is_shown_behind_the_last_frame(rule: str) -> None:
    for end in (None, 5.0):
        with pytest.raises(MediaError, match="ends before 4 s"):
            span_frames(100, 25.0, 4.0, end, rule)


@given(st.floats(0.2, 60), st.integers(1, 200), st.data())
def test_a_span_shows_a_frame_that_is_on_screen(fps: float, total: int, data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.floats(0, total / fps * 0.9999)) for _ in range(2))
    first, last = span_frames(total, fps, start, end, "linspace")
    assert 0 <= first <= last < total
    # A time within a twentieth of a frame counts as that frame's own.
    assert (first + 1) / fps >= start - 0.05 / fps
    assert last / fps <= end + 0.05 / fps
