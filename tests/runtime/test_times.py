"""A span shows what is shown in it: the frames of these times, whatever rate a file states."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.errors import MediaError
from intertitle.runtime.media import open_media
from intertitle.runtime.media.segments import media_spans, scene_spans
from intertitle.runtime.preprocess.frames import sample_indices, span_frames

from .field_pictures import write_field_pictures
from .test_clip import LINEAR, SPEC, pipeline, read

RATES = [Fraction(30_000, 1001), Fraction(24_000, 1001), *map(Fraction, (1, 5, 15, 24, 25, 30, 50, 60, 120))]
#: In ms: a frame a second for 30 s, then 60 a second for 2 s.
SLIDES = [1000 * second for second in range(30)] + [30_000 + round(number * 1000 / 60) for number in range(120)]
#: 30 a second for one second, then one a second: what FFmpeg guesses from the beginning is wrong.
LECTURE = [round(number * 1000 / 30) for number in range(30)] + [1000 * second for second in range(1, 41)]


def reference(total: int, fps: float, start: float, end: float) -> tuple[int, int]:
    """VideoLLaMA 2, mm_utils.py: ``s = max(int(s * fps) - 1, 0)``, ``e = min(int(e * fps) - 1, total - 1)``."""
    first = max(int(start * fps) - 1, 0)
    return first, max(first, min(int(end * fps) - 1, total - 1))


@given(st.sampled_from(RATES), st.integers(1, 3000), st.sampled_from([90_000, 1000]), st.data())
def test_constant_rates_keep_the_rule_of_the_reference(rate: Fraction, total: int, base: int, data: st.DataObject):
    """With times as precise as a container keeps them, also at a time that is a frame's own."""
    times = np.round(np.arange(total) / float(rate) * base) / base
    seconds = st.one_of(st.floats(0, total / float(rate) - 1e-6), st.sampled_from(times.tolist()))
    start, end = sorted((data.draw(seconds), data.draw(seconds)))
    if int(start * float(rate)) - 1 < total:
        wanted = reference(total, float(rate), start, end)
        assert span_frames(total, float(rate), start, end, "centered", times) == wanted
    # Where the rate that is stated is wrong, the times give the same. Halfway between frames nothing is rounded.
    start, end = (float((int(time * rate) + 0.5) / rate) for time in (start, end))
    if total > 1:
        wanted = reference(total, float(rate), start, end)
        assert span_frames(total, 3 * float(rate), start, end, "centered", times) == wanted


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_variable_rate(name: str, clips: Any) -> None:
    path = clips.encode(name, len(SLIDES), options=clips.SHORT_GROUPS, times=SLIDES)
    frames = clips.decode(path)
    # By hand: frame 10 is shown from 10 s on, frame 19 from 19 s to 20 s. AuroraCap has no frame before the start.
    for spec, first in ((SPEC, 9), (LINEAR, 10)):
        clip = read(path, spec, start=10.0, end=20.0)
        wanted = first + sample_indices(20 - first, 8, spec.sampling.rule)
        np.testing.assert_array_equal(clip.frames[clip.order], [frames[number] for number in wanted])
    with open_media(path) as media:
        assert media.duration == pytest.approx(32.0, abs=1.01)
        np.testing.assert_allclose(media.times, np.array(SLIDES) / 1000, atol=1e-3)


def test_a_prompt_speaks_of_the_times_that_a_variable_rate_has(clips: Any) -> None:
    path = clips.encode("clip.mp4", len(SLIDES), (32, 32), options={"preset": "ultrafast"}, times=SLIDES)
    plan = pipeline("rate", fps=1.0, forced=True)
    timing = read(path, plan).timing
    # By hand: of 150 frames linspace takes 0, 21, 42, 63, 85, 106, 127 and 149.
    wanted = [0, 21] + [30 + number / 60 for number in (12, 33, 55, 76, 97, 119)]
    assert timing is not None
    np.testing.assert_allclose(timing.times, wanted, atol=1.5e-3)
    with open_media(path) as media:
        assert timing.seconds == media.duration == pytest.approx(32.0, abs=1.01)
    # Frames 10 to 19 are shown first in this span, which is a clip of its own.
    timing = read(path, plan, start=9.5, end=20.0).timing
    assert timing is not None
    np.testing.assert_allclose(timing.times, np.array([0, 1, 2, 3, 5, 6, 7, 9]) + 0.5, atol=1e-3)
    assert timing.seconds == 10.5
    # Nothing begins in this one: frame 12 is there from its beginning on.
    timing = read(path, plan, start=12.25, end=12.75).timing
    assert timing is not None
    assert (timing.seconds, timing.times.tolist()) == (0.5, [0.0] * 8)


def test_a_phone_in_the_dark(clips: Any) -> None:
    """30 frames a second, from 10 s on 15: the second ten seconds are frames 300 to 449."""
    times = [round(number * 1000 / 30) for number in range(300)] + [10_000 + round(n * 1000 / 15) for n in range(150)]
    path = clips.encode("clip.mp4", 450, (32, 32), times=times, options={"preset": "ultrafast"})
    with open_media(path) as media:
        assert span_frames(450, media.fps, 10.0, 20.0, "linspace", media.times, media.duration) == (300, 449)
        assert span_frames(450, media.fps, 10.0, 20.0, "centered", media.times, media.duration) == (299, 449)


def test_a_guessed_rate(clips: Any) -> None:
    options = {"deadline": "realtime", "cpu-used": "8"}
    path = clips.encode("clip.webm", len(LECTURE), codec="libvpx", options=options, times=LECTURE)
    frames = clips.decode(path)
    # Frames 31 and 51 are shown from 2 s and 22 s on.
    for span, first, last in (({"start": 2.0, "end": 10.0}, 30, 38), ({"start": 22.0}, 50, 69)):
        clip = read(path, **span)
        wanted = first + sample_indices(last - first + 1, 8, "centered")
        np.testing.assert_array_equal(clip.frames[clip.order], [frames[number] for number in wanted])
    spans = media_spans(path, 10.0)
    assert [start for start, _ in spans] == [0, 10, 20, 30]
    # The last picture is shown up to the end, so it is one of the last segment.
    np.testing.assert_array_equal(read(path, LINEAR, start=30.0, end=spans[-1][1]).frames[-1], frames[-1])
    for start, end in spans:
        assert read(path, start=start, end=end).frames is not None


@pytest.mark.parametrize("name", ["clip.ts", "clip.mp4"])
def test_two_fields_are_one_frame(name: str, tmp_path: Path) -> None:
    path = write_field_pictures(tmp_path / name, 100)
    with open_media(path) as media:
        assert (media.num_frames, media.fps, media.duration) == (100, 25.0, 4.0)
        levels = media.read_frames(range(100))[:, 0, 0, 0]
        assert media.notes == []
    # BT.601: luma 16 is black, 235 is white.
    np.testing.assert_allclose(levels, (20 + 2.0 * np.arange(100) - 16) * 255 / 219, atol=1)
    clip = read(path, LINEAR, start=2.0, end=3.0)
    wanted = levels[50 + sample_indices(25, 8, "linspace")]
    np.testing.assert_array_equal(clip.frames[clip.order][:, 0, 0, 0], wanted)
    assert [note for note in clip.notes if "decoded" in note] == []


def test_raw_dv(clips: Any) -> None:
    """PyAV gives 60,000 frames a second as its rate."""
    path = clips.encode("clip.dv", 10, (720, 576), codec="dvvideo")
    with open_media(path) as media:
        assert (media.num_frames, media.fps, media.duration) == (10, 25.0, pytest.approx(0.4))
        frames = media.read_frames(range(10))
    clip = read(path, LINEAR, start=0.2)
    np.testing.assert_array_equal(clip.frames[clip.order], frames[5 + sample_indices(5, 8, "linspace")])


@pytest.mark.parametrize("order", [(3600, 0), (0, 3600)])
def test_joined_recordings(order: tuple[int, int], clips: Any) -> None:
    """Whose clocks jump by an hour, forward or back."""
    parts = []
    for number, offset in enumerate(order):
        plain = clips.encode(f"{number}.mp4", 50, options=clips.SHORT_GROUPS)
        parts.append(clips.remux(plain, f"{number}.ts", output_ts_offset=str(offset)))
    joined = clips.folder / "joined.ts"
    with joined.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
    frames = clips.decode(parts[0]) + clips.decode(parts[1])
    with open_media(joined) as media:
        assert (media.num_frames, media.fps) == (100, 25.0)
        assert media.duration == pytest.approx(4.0, abs=0.1)
        np.testing.assert_array_equal(media.read_frames(range(100)), frames)
    assert len(media_spans(joined, 1.0)) == 4
    clip = read(joined, LINEAR, start=3.0, end=4.0)
    np.testing.assert_array_equal(clip.frames[clip.order][0], frames[75])


def test_scenes_are_on_the_clock_of_the_frames(clips: Any) -> None:
    pytest.importorskip("scenedetect")
    halves = []
    for number, level in enumerate((20, 230)):
        plain = clips.folder / f"{number}.ts"
        with av.open(str(plain), "w", options={"output_ts_offset": str(3600 * (1 - number))}) as container:
            stream: Any = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for index in range(50):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        halves.append(plain.read_bytes())
    joined = clips.folder / "joined.ts"
    joined.write_bytes(b"".join(halves))
    (first, second) = scene_spans(joined)
    assert first == pytest.approx((0.0, 2.0), abs=0.05)
    assert second == pytest.approx((2.0, 4.0), abs=0.1)


def test_a_duration_that_cannot_be(clips: Any) -> None:
    """A last frame five years on: not millions of segments, but the file can be captioned."""
    path = clips.encode("clip.ivf", 3, codec="libvpx", options={"deadline": "realtime"})
    content = bytearray(path.read_bytes())
    place = 32  # IVF: a header of 32 bytes, then frames with their sizes and their times
    for _ in range(2):
        place += 12 + int.from_bytes(content[place : place + 4], "little")
    content[place + 4 : place + 12] = (25 * 155_189_248).to_bytes(8, "little")
    path.write_bytes(content)
    assert read(path).frames is not None
    with pytest.raises(MediaError, match=r"clip\.ivf: lasts 1\.55\d+e\+08 s with 3 frames: not cut into \d+ segments"):
        media_spans(path, 10.0)
