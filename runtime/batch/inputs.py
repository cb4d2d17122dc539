"""What a batch captions: files, folders, globs and manifests as one list without repetitions."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...errors import OptionError
from ..viewing import LATEST
from .content import Identity, identify

#: What a folder or a glob is searched for. What a file is, its content says once it is opened.
VIDEO = "mp4 m4v mov mkv webm avi mpg mpeg m2ts mts ts wmv flv ogv 3gp y4m gif"
SOUND = "wav mp3 m4a aac flac ogg oga opus wma aif aiff"
IMAGE = "jpg jpeg png bmp tif tiff webp avif"
EXTENSIONS = frozenset(f".{name}" for name in f"{VIDEO} {SOUND} {IMAGE}".split())
MANIFESTS = frozenset({".jsonl", ".csv"})
#: What the column of the files may be called.
FILE_COLUMNS = ("file", "video", "path")
COLUMNS = ("prompt", "start", "end", "id")
#: Bytes of a manifest and of a line of it, and lines, that are read.
MOST_BYTES, MOST_LINE_BYTES, MOST_LINES = 1 << 30, 1 << 20, 5_000_000
#: Objects and lists within each other, in a column that is not ours.
MOST_DEPTH = 100
#: What a job puts behind the id of an input for each of its segments, and behind a manifest for a bad line of it.
_OF_SEGMENT, _OF_LINE = re.compile(r"(?s)(.*)/(?:[0-9]{4}|[1-9][0-9]{4,})"), re.compile(r"(?s)(.*):[0-9]+")


@dataclass(frozen=True)
class Entry:
    """A file to caption, with its own instruction (``None``: the run's) and span in seconds (``None``: all of it).

    ``id`` names its record: a manifest's own, or one that follows from the path, the instruction and the span.
    ``manifest`` and ``line`` say where it was listed, ``meta`` holds the columns there that are not ours.
    """

    file: str
    prompt: str | None = None
    start: float | None = None
    end: float | None = None
    own_id: str | None = None
    manifest: str = ""
    line: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def path(self) -> str:
        """Absolute; symlinks are kept."""
        return os.path.abspath(self.file)  # noqa: PTH100 (Path.absolute keeps '..')

    @property
    def id(self) -> str:
        if self.own_id is not None:
            return self.own_id
        named = json.dumps([os.path.normpath(self.file), self.prompt, self.start, self.end])
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    @property
    def about(self) -> dict[str, Any]:
        """What its record says of it beside its id and its file."""
        found: dict[str, Any] = {"start": self.start, "end": self.end}
        if self.prompt is not None:
            found["prompt"] = self.prompt
        if self.meta:
            found["meta"] = self.meta
        return found

    def identify(self) -> Identity | None:
        """See ``content.identify``."""
        return identify(self.file)


@dataclass(frozen=True)
class BadLine:
    """A line of a manifest that says nothing usable, and why."""

    manifest: str
    line: int
    reason: str

    @property
    def id(self) -> str:
        return f"{self.manifest}:{self.line}"


class _Row(msgspec.Struct):
    """What a line of a manifest says that is ours."""

    file: str
    prompt: str | None = None
    start: float | None = None
    end: float | None = None
    id: str | int | None = None


def read_inputs(inputs: Sequence[str | os.PathLike[str]], *, segmented: bool = False) -> list[Entry | BadLine]:
    """Everything that ``inputs`` stand for, in their order, each once.

    A folder stands for the media files below it (by extension; hidden ones are passed over) in sorted order, a pattern
    with ``*``, ``?`` or ``[`` for what it matches, a ``.jsonl`` or ``.csv`` file for its lines, whose paths are
    relative to it and whose other columns go into the records. A line that cannot be used becomes a ``BadLine``, and so
    does one whose own id is the name of another record; ``segmented``: files are cut into segments, with records of
    their own.
    ``OptionError`` for an input that does not exist, a folder or pattern without media files and a manifest without a
    usable line.
    """
    found: list[Entry | BadLine] = []
    seen: dict[tuple[object, ...], Entry] = {}
    for given in inputs:
        for entry in _expand(os.fspath(given)):
            if isinstance(entry, Entry):
                key = (entry.path, entry.prompt, entry.start, entry.end, entry.own_id)
                first = seen.setdefault(key, entry)
                if first is not entry:
                    if entry.meta and entry.meta != first.meta:
                        where = f"line {first.line}" if first.manifest == entry.manifest else "an earlier input"
                        reason = f"asks the same of {entry.file} as {where}, with other columns: add an id"
                        found.append(BadLine(entry.manifest, entry.line, reason))
                    continue
            found.append(entry)
    ids: dict[str, Entry] = {}
    # Ids that follow from the input come before those that somebody chose.
    for entry in sorted(seen.values(), key=lambda entry: entry.own_id is not None):
        ids.setdefault(entry.id, entry)
    manifests = {entry.manifest for entry in found if entry.manifest}
    return [_unless_taken(entry, ids, manifests, segmented) for entry in found]


def _unless_taken(
    entry: Entry | BadLine, ids: Mapping[str, Entry], manifests: Collection[str], segmented: bool
) -> Entry | BadLine:
    """Two records under one name could not be told apart."""
    if isinstance(entry, BadLine):
        return entry
    reason, own = None, entry.own_id or ""
    part, line = _OF_SEGMENT.fullmatch(own), _OF_LINE.fullmatch(own)
    whole = ids.get(part[1]) if part is not None and segmented else None
    if ids[entry.id] is not entry:
        reason = f"is already that of {ids[entry.id].file}"
    elif whole is not None and whole.start is None and whole.end is None:
        reason = f"is that of a segment of {whole.file}"
    elif line is not None and line[1] in manifests:
        reason = f"is that of a line of {line[1]}"
    return entry if reason is None else BadLine(entry.manifest, entry.line, f"the id '{entry.id}' {reason}")


def _expand(given: str) -> Iterator[Entry | BadLine]:
    path = Path(given)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        mode = None
    except OSError as error:
        raise OptionError(f"{given}: cannot be read: {error.strerror}") from error
    if mode is not None and stat.S_ISDIR(mode):
        files = list(_walk(given))
        if not files:
            raise OptionError(f"{given}: the folder holds no video, sound or image files")
    elif mode is not None:
        if path.suffix.lower() in MANIFESTS:
            yield from _read_manifest(path)
            return
        files = [given]
    elif glob.has_magic(given):
        files = sorted(_matches(given))
        if not files:
            raise OptionError(f"{given}: matches no video, sound or image files")
    else:
        raise OptionError(f"{given}: no such file or folder")
    yield from map(Entry, files)


def _walk(folder: str) -> Iterator[str]:
    """Media files below ``folder``. A folder that links lead to twice is entered once."""
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise OptionError(f"{error.filename}: cannot be read: {error.strerror}")

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 (as the user wrote it)
            if _is_media(path):
                yield path


def _matches(pattern: str) -> Iterator[str]:
    """Files that a pattern names, and media files of folders that it names. ``**`` goes through folders."""
    for name in glob.iglob(pattern, recursive=True):  # noqa: PTH207 (as the user wrote it)
        # A pattern that spells the extension out means it, whatever it is.
        if Path(name).is_file() and (_is_media(name) or Path(pattern).suffix == Path(name).suffix):
            yield name


def _is_media(path: str) -> bool:
    name = Path(path)
    return not name.name.startswith(".") and name.suffix.lower() in EXTENSIONS and name.is_file()


def _read_manifest(path: Path) -> Iterator[Entry | BadLine]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise OptionError(f"{path}: is larger than {MOST_BYTES >> 30} GiB: split the manifest")
        content = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from error
    if content.count(b"\n") > MOST_LINES:
        raise OptionError(f"{path}: has more than {MOST_LINES:,} lines: split the manifest")
    entries = list((_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(path, content))
    if not any(isinstance(entry, Entry) for entry in entries):
        reason = f": line {entries[0].line}: {entries[0].reason}" if entries else ""  # type: ignore[union-attr]
        raise OptionError(f"{path}: the manifest holds no usable line{reason}")
    yield from entries


def _json_rows(path: Path, content: bytes) -> Iterator[Entry | BadLine]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        if len(line) > MOST_LINE_BYTES:
            yield BadLine(str(path), number, f"is longer than {MOST_LINE_BYTES >> 20} MiB")
            continue
        try:
            yield _entry(path, number, msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            yield BadLine(str(path), number, str(error))


def _csv_rows(path: Path, content: bytes) -> Iterator[Entry | BadLine]:
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"{path}: is not a CSV file in UTF-8 ({error})") from error
    if len(set(FILE_COLUMNS).intersection(header)) != 1 or len(set(header)) < len(header):
        names = f"{' or '.join(FILE_COLUMNS)}, {', '.join(COLUMNS)} and others, no name twice"
        raise OptionError(f"{path}: the first line names the columns: {names}")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield BadLine(str(path), number, str(error))
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            yield BadLine(str(path), number, f"{len(cells)} cells under {len(header)} columns")
            continue
        values: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
        try:
            for name in ("start", "end"):
                if name in values:
                    values[name] = float(values[name])
            yield _entry(path, number, values)
        except ValueError as error:  # msgspec's is one
            yield BadLine(str(path), number, str(error))


def _entry(manifest: Path, line: int, values: dict[str, Any]) -> Entry | BadLine:
    """A row as an entry, its file looked for beside the manifest. ``ValidationError`` for values of a wrong type."""
    names = [name for name in FILE_COLUMNS if name in values]
    if len(names) > 1:
        return BadLine(str(manifest), line, f"names its file twice: '{names[0]}' and '{names[1]}'")
    ours = {name: values[name] for name in COLUMNS if name in values}
    if names:
        ours["file"] = values[names[0]]
    row = msgspec.convert(ours, _Row)
    meta = {name: value for name, value in values.items() if name not in COLUMNS and name not in FILE_COLUMNS}
    if _is_deeper(meta, MOST_DEPTH):
        return BadLine(str(manifest), line, f"is nested more than {MOST_DEPTH} deep")
    for name, time in (("start", row.start), ("end", row.end)):
        if time is not None and not 0 <= time <= LATEST:
            return BadLine(str(manifest), line, f"{name} is seconds from 0 to {LATEST:g}, not {time}")
    if row.end is not None and row.end <= (row.start or 0):
        return BadLine(str(manifest), line, f"end {row.end:g} is not after start {row.start or 0:g}")
    if not row.file or "\0" in row.file:
        return BadLine(str(manifest), line, "file names nothing")
    own = None if row.id is None else str(row.id)
    if own == "":
        return BadLine(str(manifest), line, "id is empty")
    return Entry(str(manifest.parent / row.file), row.prompt, row.start, row.end, own, str(manifest), line, meta)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether more than so many objects and lists are within each other: writing them again takes as many calls."""
    within = [value]
    for _ in range(levels + 1):
        within = [
            inner
            for outer in within
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(within)
