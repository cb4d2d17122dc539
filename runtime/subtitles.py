"""SubRip subtitles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError


@dataclass(frozen=True)
class Cue:
    """A text shown from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    text: str


def write_srt(path: str | os.PathLike[str], cues: Sequence[Cue]) -> None:
    """Write cues as a SubRip file (UTF-8). ``OptionError`` when the file cannot be written."""
    blocks = [
        # An empty line would end the cue.
        f"{number}\n{_stamp(cue.start)} --> {_stamp(cue.end)}\n" + "\n".join(cue.text.split("\n\n")).strip() + "\n"
        for number, cue in enumerate(cues, 1)
    ]
    try:
        Path(path).write_text("\n".join(blocks), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from None


def _stamp(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
