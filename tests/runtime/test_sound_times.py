"""When sound is heard, by its timestamps, and how long it lasts where the file does not say."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from intertitle.runtime.media import open_media
from intertitle.runtime.media.segments import media_spans
from intertitle.runtime.media.sound_index import Piece, Stretch, find_stretches

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8000, 8000, round(seconds * RATE)).astype(np.int16)


def video_with(path: Path, parts: Sequence[tuple[float, np.ndarray]], seconds: int = 10, codec: str = "flac") -> Path:
    """A video of ``seconds`` whose sound (16 kHz, mono) comes in parts, each from a time on, in packets of 20 ms."""
    with av.open(str(path), "w") as container:
        pictures: Any = container.add_stream("mpeg4", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        sound: Any = container.add_stream(codec, rate=RATE, layout="mono")
        for index in range(5 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 5)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        for start, samples in parts:
            for place in range(0, len(samples), 320):
                piece = av.AudioFrame.from_ndarray(samples[np.newaxis, place : place + 320], "s16", "mono")
                piece.sample_rate, piece.time_base = RATE, Fraction(1, RATE)
                piece.pts = round(start * RATE) + place
                container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    return path


def timed(path: Path, seconds: float, start: float) -> np.ndarray:
    """The sound of a span, in units of 2**-15."""
    with open_media(path) as media:
        return media.read_audio(RATE, seconds, start, timed=True).samples * 32768


def test_a_track_that_begins_late_is_heard_late(tmp_path: Path) -> None:
    track = noise(6)
    path = video_with(tmp_path / "late.mkv", [(4.0, track)], codec="pcm_s16le")
    # ffmpeg -ss 7 -t 2: what the track holds from 3 s to 5 s.
    np.testing.assert_array_equal(timed(path, 2, 7), track[3 * RATE : 5 * RATE])
    silence = np.zeros(RATE, np.int16)
    np.testing.assert_array_equal(timed(path, 2, 3), [*silence, *track[:RATE]])
    np.testing.assert_array_equal(timed(path, 2, 0.5), [*silence, *silence])
    with open_media(path) as media:
        # The whole is read as the reference does, end to end.
        np.testing.assert_array_equal(media.read_audio(RATE).samples * 32768, track)


def test_gaps_are_silent(tmp_path: Path) -> None:
    one, two, three = noise(2, 1), noise(2, 2), noise(2, 3)
    path = video_with(tmp_path / "gaps.mkv", [(0.0, one), (4.0, two), (8.0, three)], codec="pcm_s16le")
    whole = np.zeros(10 * RATE)
    for start, part in ((0, one), (4, two), (8, three)):
        whole[start * RATE : (start + 2) * RATE] = part
    for start, seconds in ((0, 10), (1, 2), (1, 8), (2.5, 1), (3.75, 0.5), (5.9, 2.5), (9, 1)):
        wanted = whole[round(start * RATE) : round((start + seconds) * RATE)]
        np.testing.assert_array_equal(timed(path, seconds, start), wanted)
    with open_media(path) as media:
        parts = media.read_audio_parts(RATE, lambda count: [(0, 100), (100, count)], 8, 1, timed=True)
    np.testing.assert_array_equal(np.concatenate(parts) * 32768, whole[RATE : 9 * RATE])


@pytest.mark.parametrize("off", [0.02, -0.02, 0.09])
def test_small_jitter_adds_and_drops_no_samples(off: float, tmp_path: Path) -> None:
    one, two = noise(5, 1), noise(5, 2)
    path = video_with(tmp_path / "jitter.mkv", [(0.0, one), (5.0 + off, two)], codec="pcm_s16le")
    np.testing.assert_array_equal(timed(path, 2, 4), [*one[4 * RATE :], *two[:RATE]])


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.ts", "aac"), ("a.mkv", "flac")])
def test_where_there_is_no_gap_times_change_nothing(name: str, codec: str, tmp_path: Path) -> None:
    path = video_with(tmp_path / name, [(0.0, noise(10))], codec=codec)
    with open_media(path) as media:
        plain = media.read_audio(RATE, 2, 5).samples
        np.testing.assert_array_equal(media.read_audio(RATE, 2, 5, timed=True).samples, plain)
        np.testing.assert_array_equal(media.read_audio(RATE, timed=True).samples, media.read_audio(RATE).samples)


def test_stretches_by_hand() -> None:
    def pieces(*stamps: float | None) -> list[Piece]:
        return [Piece(stamp, 100, 100) for stamp in stamps]

    def found(*stamps: float | None, jumps: bool = False, late: float = 0.0) -> list[Stretch]:
        return find_stretches(pieces(*stamps), late, 100, 0.1, jumps)

    assert found(0, 100, 200) == [(0, 0, 3)]
    assert found(7000, 7100, None, 7300) == [(0, 0, 4)]
    assert found(0, 100, 500, 600) == [(0, 0, 2), (5, 200, 7)]
    assert found(0, 100, late=4.0) == [(4, 0, 6)]
    # Put back: what follows is heard without a break.
    assert found(1000, 1100, 0, 100) == [(0, 0, 4)]
    # A jump of more than 10 s is one of the clock, where clocks jump; more than a day is damage everywhere.
    assert found(0, 100, 5000, jumps=True) == [(0, 0, 3)]
    assert found(0, 100, 5000) == [(0, 0, 2), (50, 200, 51)]
    assert found(0, 100, 10_000_000_000, 10_000_000_100) == [(0, 0, 4)]


@pytest.mark.parametrize(
    ("name", "codec", "options", "stream"),
    [
        ("sound.mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}, {"q": "4"}),
        ("sound.aac", "aac", {}, {}),
    ],
)
def test_durations_are_not_guessed_from_the_bit_rate(
    name: str, codec: str, options: dict[str, str], stream: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / name
    samples = (
        20 * np.concatenate([np.zeros(20 * 44_100), np.random.default_rng(0).normal(0, 99, 10 * 44_100)])
    ).astype(np.int16)
    with av.open(str(path), "w", options=options) as container:
        sound: Any = container.add_stream(codec, rate=44_100, layout="mono", options=stream)
        if codec == "libmp3lame":
            sound.codec_context.qscale = True
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis], "s16", "mono")
        frame.sample_rate = 44_100
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        guessed = float((container.duration or 0) / av.time_base)
        # FFmpeg's guess is worth nothing.
        assert abs(guessed - 30) > 3
    with open_media(path) as media:
        assert media.duration == pytest.approx(30, abs=0.2)
        assert len(media.read_audio(RATE).samples) / RATE == pytest.approx(media.duration, abs=0.1)
    spans = media_spans(str(path), 10.0)
    assert len(spans) in (3, 4)  # the encoder's delay may be a fourth
    assert spans[2][0] == pytest.approx(20)


def test_sound_without_a_duration(tmp_path: Path) -> None:
    path = tmp_path / "pipe.webm"
    with av.open(str(path), "w", format="webm", options={"live": "1"}) as container:
        sound: Any = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.tile(noise(8), 3)[np.newaxis], "s16", "mono")
        frame.sample_rate = 48_000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert container.duration is None
    with open_media(path) as media:
        assert media.duration == pytest.approx(8, abs=0.1)
    assert [start for start, _ in media_spans(str(path), 2.0)][:4] == pytest.approx([0, 2, 4, 6])


def test_joined_streams_last_as_long_as_their_parts(clips: Any) -> None:
    path = clips.folder / "joined.aac"
    parts = []
    for number in range(2):
        part = clips.folder / f"{number}.aac"
        with av.open(str(part), "w") as container:
            sound: Any = container.add_stream("aac", rate=RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(noise(5, number)[np.newaxis], "s16", "mono")
            frame.sample_rate = RATE
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    with open_media(path) as media:
        assert media.duration == pytest.approx(10, abs=0.3)
