"""A subtitle file beside each clip of a batch, written when the last of its captions is there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import OptionError
from ..subtitles import Cue, cue_of, format_srt, format_vtt

FORMATS: Mapping[str, Callable[[Iterable[Cue]], str]] = {"srt": format_srt, "vtt": format_vtt}


class SubtitleWriter:
    """Writes ``clip.srt`` (or ``.vtt``) for ``clip.mp4``, beside it or into ``directory``.

    Two files that would have the same subtitle file keep their extension (``clip.mp4.srt``). ``OptionError`` when that
    does not tell them apart. A subtitle file that says something else already is left alone, and ``say`` is told.
    """

    def __init__(
        self,
        files: Iterable[str],
        formats: Iterable[str],
        save: Callable[[Path, str], None],
        say: Callable[[str], None],
        directory: Path | None = None,
    ) -> None:
        self._formats, self._directory = tuple(formats), directory
        self._save, self._say = save, say
        self._stems: dict[str, Path] = {}
        owners: dict[Path, str] = {}
        files = list(dict.fromkeys(map(os.path.abspath, files)))
        plain = [self._place(file).with_suffix("") for file in files]
        counts = Counter(plain)
        for file, stem in zip(files, plain, strict=True):
            unique = stem if counts[stem] == 1 else self._place(file)
            if unique in owners:
                raise OptionError(f"{owners[unique]} and {file} would have the same subtitle file in {directory}")
            owners[unique] = file
            self._stems[file] = unique

    def write(self, file: str, records: Iterable[Mapping[str, Any]]) -> None:
        """The cues of a file's captions. Failures and clips without a duration (images) give none."""
        found = (
            cue_of(record["text"], record.get("start"), record.get("seconds")) for record in records if "text" in record
        )
        cues = sorted((cue for cue in found if cue is not None), key=lambda cue: cue.start)
        if not cues:
            return
        stem = self._stems[os.path.abspath(file)]  # noqa: PTH100
        for name in self._formats:
            path, text = stem.with_name(f"{stem.name}.{name}"), FORMATS[name](cues)
            if path.exists():
                if path.read_bytes() != text.encode():
                    self._say(f"{path} says something else already and is left alone; move it away to have it written")
                continue
            self._save(path, text)

    def _place(self, file: str) -> Path:
        path = Path(file)
        return path if self._directory is None else self._directory / path.name
