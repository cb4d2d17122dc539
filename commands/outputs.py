"""What an output may replace: never an input, and only what a command of ours has written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..console import check_savable
from ..errors import OptionError

#: Endings that say that a file is not what ``batch`` and ``pairs`` write.
_OTHERS = frozenset(
    [
        ".arrow",
        ".avi",
        ".csv",
        ".feather",
        ".gz",
        ".html",
        ".json5",
        ".md",
        ".mkv",
        ".mov",
        ".mp3",
        ".mp4",
        ".parquet",
        ".srt",
        ".tar",
        ".tsv",
        ".vtt",
        ".wav",
        ".webm",
        ".xlsx",
        ".xml",
        ".yaml",
        ".yml",
        ".zip",
    ]
)


def check_output(output: Path, inputs: Iterable[str | Path]) -> None:
    """``OptionError`` for an output that cannot be written or that is one of the ``inputs``, under whatever name."""
    check_savable(output)
    try:
        there = output.stat()
    except OSError:
        return
    for given in inputs:
        try:
            same = Path(given).stat()
        except (OSError, ValueError):
            continue
        if (same.st_dev, same.st_ino) == (there.st_dev, there.st_ino):
            raise OptionError(f"{output}: is an input ({given}): choose another name for the output")


def check_record_name(output: Path) -> None:
    """``OptionError`` for a name that promises another format than JSON lines."""
    if output.suffix.lower() in _OTHERS:
        raise OptionError(f"{output}: records are written as JSON lines: choose a name that ends in .jsonl")


def check_subtitles(output: Path) -> None:
    """``OptionError`` for a file that is there and holds something else than SubRip subtitles."""
    if not output.is_file():
        return
    with output.open("rb") as file:
        head = file.read(4096)
    if head.strip() and re.match(rb"\xef?\xbb?\xbf?\s*\d+\r?\n[\d:,. ]+-->", head) is None:
        raise OptionError(f"{output}: is there and holds no subtitles: choose another name")
