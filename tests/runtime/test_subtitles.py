"""SubRip and WebVTT files against FFmpeg's readers of them."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.plain_text import safe
from intertitle.runtime.subtitles import Cue, format_srt, format_vtt


def read(path: Path, text: str, kind: str = "srt") -> list[tuple[int, int, str]]:
    """Start and end in milliseconds, and the text, of each cue that FFmpeg finds."""
    path.write_text(text, encoding="utf-8")
    with av.open(str(path), format=kind) as container:
        packets = [packet for packet in container.demux() if packet.size]
        assert all(packet.time_base is not None and packet.time_base.denominator == 1000 for packet in packets)
        return [(packet.pts, packet.pts + packet.duration, bytes(packet).decode()) for packet in packets]  # type: ignore[operator]


def test_a_file_by_hand():
    cues = [Cue(0, 2.6665, " Two dogs\nrun."), Cue(3661.0014, 359_999.9996, "Ende: Ünïcödé 犬")]
    assert format_srt(cues) == (
        "1\n00:00:00,000 --> 00:00:02,666\nTwo dogs\nrun.\n\n2\n01:01:01,001 --> 100:00:00,000\nEnde: Ünïcödé 犬\n"
    )


def test_webvtt_by_hand(tmp_path: Path):
    cues = [Cue(0, 1.5, "a < b & c --> d\n\n e"), Cue(2, 3, " "), Cue(3600, 3601, "犬")]
    text = format_vtt(cues)
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt; b &amp; c --&gt; d\ne\n\n01:00:00.000 --> 01:00:01.000\n犬\n"
    )
    assert read(tmp_path / "a.vtt", text, "webvtt") == [
        (0, 1500, "a &lt; b &amp; c --&gt; d\ne"),
        (3_600_000, 3_601_000, "犬"),
    ]
    assert format_vtt([]) == "WEBVTT\n"


def test_empty_lines_would_end_a_cue(tmp_path: Path):
    cues = [Cue(0, 1, "a\n\n\nb\r\n \r\nc\n"), Cue(1, 2, " \n"), Cue(2, 3, "d")]
    # FFmpeg reads on after an empty line, players stop there.
    assert format_srt(cues) == "1\n00:00:00,000 --> 00:00:01,000\na\nb\nc\n\n2\n00:00:02,000 --> 00:00:03,000\nd\n"
    assert read(tmp_path / "a.srt", format_srt(cues)) == [(0, 1000, "a\nb\nc"), (2000, 3000, "d")]
    assert format_srt([Cue(0, 1, "")]) == ""


def test_players_get_no_control_characters(tmp_path: Path):
    """A caption with an escape sequence, an override of direction, and line breaks that only some readers know."""
    cues = [Cue(0, 1, "a\x1b[2J\x9b\u202eb\u2028\x0b\nc\x85d")]
    said = "a\\x1b[2J\\x9b\\u202eb\nc\nd"
    assert format_srt(cues) == f"1\n00:00:00,000 --> 00:00:01,000\n{said}\n"
    assert format_vtt(cues) == f"WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{said}\n"
    assert read(tmp_path / "a.srt", format_srt(cues)) == [(0, 1000, said)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**7),
            st.integers(1, 10**6),
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
        ),
        max_size=4,
    )
)
def test_ffmpeg_reads_every_cue_back(tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int, str]]):
    """Whatever a captioner says: line breaks of every kind, control characters, digits that look like a number."""
    start, cues = 0, []
    for gap, length, text in spans:
        # A word keeps the text from being taken for the number or the times of a cue, which no SubRip can escape.
        cues.append(Cue((start + gap) / 1000, (start + gap + length) / 1000, f"said: {text}"))
        start += gap + length
    found = read(tmp_path_factory.mktemp("srt") / "a.srt", format_srt(cues))
    assert [(begin, end) for begin, end, _ in found] == [
        (round(cue.start * 1000), round(cue.end * 1000)) for cue in cues
    ]
    for cue, (_, _, text) in zip(cues, found, strict=True):
        assert text.split() == safe(cue.text).split()
