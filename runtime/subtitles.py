"""SubRip and WebVTT subtitles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..plain_text import safe


@dataclass(frozen=True)
class Cue:
    """A text shown from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    text: str


def cue_of(text: str, start: float | None, seconds: float | None) -> Cue | None:
    """The cue of a caption of what lasts ``seconds`` from ``start`` (seconds) on; ``None`` for what has no time.

    ``Caption.start`` and ``Caption.seconds``, alone, of a batch or of a segment: the span that was seen, which ends
    with the clip wherever a longer one was asked for.
    """
    begin = start or 0.0
    return Cue(begin, begin + seconds, text) if seconds else None


def format_srt(cues: Iterable[Cue]) -> str:
    """The contents of a SubRip file. Cues are numbered from 1; one without text is left out.

    A cue ends at an empty line, so empty lines of its text are dropped.
    """
    blocks: list[str] = []
    for cue in cues:
        text = _text(cue)
        if text:
            blocks.append(f"{len(blocks) + 1}\n{_stamp(cue.start, ',')} --> {_stamp(cue.end, ',')}\n{text}\n")
    return "\n".join(blocks)


def format_vtt(cues: Iterable[Cue]) -> str:
    """The contents of a WebVTT file (W3C, WebVTT: The Web Video Text Tracks Format). Cues without text are left out.

    ``&``, ``<`` and ``>`` are markup there and written as references, which also keeps ``-->`` out of the text.
    """
    blocks = ["WEBVTT\n"]
    for cue in cues:
        # A NUL would be read as U+FFFD by a player; written as such it reads the same everywhere.
        text = _text(cue).replace("\0", "\ufffd")
        if text:
            for character, reference in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
                text = text.replace(character, reference)
            blocks.append(f"{_stamp(cue.start, '.')} --> {_stamp(cue.end, '.')}\n{text}\n")
    return "\n".join(blocks)


def _text(cue: Cue) -> str:
    return "\n".join(line.strip() for line in safe(cue.text).split("\n") if line.strip())


def _stamp(seconds: float, point: str) -> str:
    """``HH:MM:SS,mmm`` with either decimal sign, to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
