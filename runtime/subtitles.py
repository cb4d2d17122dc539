"""SubRip subtitles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cue:
    """A text shown from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    text: str


def format_srt(cues: Iterable[Cue]) -> str:
    """The contents of a SubRip file. Cues are numbered from 1; one without text is left out.

    A cue ends at an empty line, so empty lines of its text are dropped.
    """
    blocks: list[str] = []
    for cue in cues:
        lines = [line.strip() for line in cue.text.splitlines() if line.strip()]
        if lines:
            text = "\n".join(lines)
            blocks.append(f"{len(blocks) + 1}\n{_stamp(cue.start)} --> {_stamp(cue.end)}\n{text}\n")
    return "\n".join(blocks)


def _stamp(seconds: float) -> str:
    """``HH:MM:SS,mmm``, to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
