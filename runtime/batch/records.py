"""The output of a batch: one JSON record a line, appended and on disk before the next item is taken for done.

A process that is killed leaves whole lines and at most one torn one, which the next run removes. Nothing else is kept
beside the file: the records say with which settings they were made and what their files held.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar

import msgspec

from ...errors import IntertitleError, OptionError, TransientMediaError
from ...plain_text import safe_json
from ...whole_files import discard, whole
from ..media.segments import MOST_SEGMENTS
from ..viewing import percent
from .content import Identity

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not noticed there
    fcntl = None

Record = dict[str, Any]

#: Settings as they were called in older records.
_OLD_NAMES = {"drop_duplicates": "duplicates", "refine": "retrospective", "contrasts": "contrast_alpha"}


@dataclass(frozen=True)
class Settings:
    """What decides a caption besides the clip: the bundle and every setting that is not at its default, by name."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, bundle: Path, given: Mapping[str, Any], usual: Mapping[str, Any]) -> Settings:
        """Those of ``given`` that are not as ``usual``, and the bundle, whose manifest names all its files by hash."""
        values = {name: value for name, value in given.items() if name not in usual or value != usual[name]}
        values["bundle"] = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
        # As they are read back: tuples are lists there.
        return cls(json.loads(json.dumps(values)))

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def record(self) -> Record:
        """Their part of a record."""
        return {"run": self.fingerprint, "settings": dict(self.values)}

    def differences(self, other: Mapping[str, Any]) -> str:
        """``name: there VALUE, now VALUE`` for each setting in which ``other`` (there) is not this one (now)."""
        names = sorted({*self.values, *other})
        return "; ".join(
            f"{name}: there {_shown(other, name)}, now {_shown(self.values, name)}"
            for name in names
            if self.values.get(name) != other.get(name)
        )


@dataclass(frozen=True)
class Known:
    """What is remembered of a record that is in the file: where it is, and what it was made of.

    ``asked``: instruction, start and end. ``base``: the input that it is of. ``transient``: it failed for a reason that
    may have gone.
    """

    offset: int
    length: int
    failed: bool
    file: str
    identity: Identity | None
    sha256: str | None
    asked: tuple[object, ...]
    content: tuple[object, ...] | None
    segments: int | None
    base: str
    transient: bool = False


class _Error(msgspec.Struct):
    kind: str = ""
    transient: bool = False


#: Neither NaN nor infinity, which ``json`` reads. A file may say of itself that it lasts longer than ``LATEST``.
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]


class _Found(msgspec.Struct):
    """The fields of a record that decide what is done again, as they must be. Bit rot and hand edits change types."""

    settings: dict[str, Any]
    file: str | None = None
    source: str | None = None
    size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None
    prompt: str | None = None
    start: _Seconds | None = None
    end: _Seconds | None = None
    seconds: _Seconds | None = None
    part_of: str | None = None
    #: How many there are, or (pairs) their captions.
    segments: Annotated[int, msgspec.Meta(ge=1, le=MOST_SEGMENTS)] | list[str] | None = None
    text: str | msgspec.UnsetType = msgspec.UNSET
    error: _Error | msgspec.UnsetType = msgspec.UNSET


def error_record(error: IntertitleError, message: str, debug: bool) -> Record:
    """``error`` as its part of a record: kind, reason, whether it may pass, and with ``debug`` the traceback."""
    kind = type(error).__name__.removesuffix("Error").removeprefix("Transient").lower()
    found: Record = {"kind": kind, "reason": message}
    if isinstance(error, TransientMediaError):
        found["transient"] = True
    if debug:
        found["traceback"] = "".join(traceback.format_exception(error))
    return {"error": found}


def content_key(record: Mapping[str, Any]) -> tuple[object, ...] | None:
    """Records with the same one have the same caption, under the same settings."""
    if record.get("sha256") is None or "text" not in record:
        return None
    return record["sha256"], record.get("prompt"), record.get("start"), record.get("end")


class RecordFile:
    """A JSONL file of records that is open for one run, under a lock that ends with the process.

    Opening removes a torn last line, the records of failures that may have passed, and with ``retry_failed`` those of
    all failures; ``overwrite`` begins afresh.
    ``OptionError`` when another run has the file open, when it is not a file of records, when its records were made
    with other settings, and when it cannot be written.

    ``KEY`` names the field that identifies a record and comes first in it, ``FILE`` that of the file that it is of,
    ``MAKER`` the command that writes the output.
    """

    KEY: ClassVar[str] = "id"
    FILE: ClassVar[str] = "file"
    MAKER: ClassVar[str] = "batch"

    def __init__(self, path: Path, settings: Settings, *, overwrite: bool = False, retry_failed: bool = False) -> None:
        self.path = path
        self.settings = settings
        self.known: dict[str, Known] = {}
        self._by_content: dict[tuple[object, ...], str] = {}
        self._created = not path.exists()
        try:
            self._file = _open_locked(path)
        except OSError as error:
            raise OptionError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            self._load(overwrite)
            again = {name for name, known in self.known.items() if known.failed and (retry_failed or known.transient)}
            if again:
                self._rewrite([name for name in self.known if name not in again])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OptionError(f"{path}: cannot be written: {error.strerror}") from error
            raise

    def append(self, record: Record) -> None:
        """Put a record on disk. ``OptionError`` when that fails; what was there before stays whole."""
        line = encode({self.KEY: record[self.KEY], **record, **self.settings.record})
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise OptionError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._remember(record, self._end, len(line))
        self._end += len(line)

    def read(self, name: str) -> Record:
        """The record of an item."""
        known = self.known[name]
        return json.loads(os.pread(self._file.fileno(), known.length, known.offset))

    def captioned_like(self, key: tuple[object, ...]) -> Record | None:
        """A caption of the same content, instruction and span."""
        name = self._by_content.get(key)
        if name is None or self.known[name].content != key:
            return None
        return self.read(name)

    def finish(self, order: Sequence[str], bases: Collection[str] = ()) -> None:
        """Put the records of ``order`` first, in this order, those of earlier inputs behind them.

        Records of ``bases`` (inputs) that are not in ``order`` are of segments that there no longer are: they go.
        """
        wanted = [name for name in dict.fromkeys(order) if name in self.known]
        first, gone = set(wanted), set(bases)
        wanted += [name for name, known in self.known.items() if name not in first and known.base not in gone]
        places = [self.known[name] for name in wanted]
        gapless = all(a.offset + a.length == b.offset for a, b in itertools.pairwise(places))
        if gapless and sum(known.length for known in places) == self._end:
            return
        try:
            self._rewrite(wanted)
        except OSError as error:
            raise OptionError(f"{self.path}: cannot be put in order: {error.strerror}") from error

    def close(self) -> None:
        """Give up the lock; a file that this run made and put nothing into goes."""
        if not self._file.closed:
            if self._created and os.fstat(self._file.fileno()).st_size == 0:
                self.path.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, overwrite: bool) -> None:
        self._end = 0
        discard(self.path.resolve())
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            if overwrite:
                if not self._is_output(file.readline()):
                    raise OptionError(f"{self.path}: is not an output of {self.MAKER}, so it is not overwritten")
                self._file.truncate(0)
                return
            for number, line in enumerate(file, 1):
                if not self._take(line, number):
                    break
        if os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)
            os.fsync(self._file.fileno())

    def _take(self, line: bytes, number: int) -> bool:
        """Remember a line that was found in the file; ``False`` if it is torn."""
        record = found = None
        try:
            record = json.loads(line)
            found = msgspec.convert(record, _Found)
        except (ValueError, RecursionError):  # msgspec's is a ValueError
            pass
        if not line.endswith(b"\n"):
            # Some file systems fill the end of a file with zeros when the power fails.
            if self._is_output(line) or (self._end > 0 and not line.strip(b"\0")):
                return False
            found = None
        if found is None or not isinstance(record, dict) or not isinstance(record.get(self.KEY), str):
            raise OptionError(
                f"{self.path}: line {number} is not a record of {self.MAKER}; choose another output (or mend the line)"
            )
        different = self.settings.differences(_named_as_now(record["settings"]))
        if different:
            raise OptionError(f"{self.path}: was written with other settings ({different}); --overwrite starts afresh")
        self._remember(record, self._end, len(line))
        self._end += len(line)
        return True

    def _remember(self, record: Record, offset: int, length: int) -> None:
        size, time = record.get("size"), record.get("mtime_ns")
        key = content_key(record)
        name = record[self.KEY]
        self.known.pop(name, None)  # a later record of an item stands for it, at its own place
        self.known[name] = Known(
            offset,
            length,
            "error" in record,
            record.get(self.FILE) or "",
            None if size is None or time is None else Identity(size, time),
            record.get("sha256"),
            (record.get("prompt"), record.get("start"), record.get("end")),
            key,
            record.get("segments") if isinstance(record.get("segments"), int) else None,
            record.get("part_of") or name,
            "error" in record and bool(record["error"].get("transient")),
        )
        if key is not None:
            self._by_content[key] = name

    @property
    def _beginning(self) -> bytes:
        """How every record begins, so that no other file is ever taken for an output and cut or replaced."""
        return f'{{"{self.KEY}": "'.encode()

    def _is_output(self, line: bytes) -> bool:
        """Whether a file that begins with ``line`` is empty, holds records, or broke off in its first one."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return self._could_begin(line) and not line.endswith(b"\n")
        return self._could_begin(line) and isinstance(record, dict) and {"settings", "run"} <= record.keys()

    def _could_begin(self, data: bytes) -> bool:
        """Whether this is a record, or the beginning of one."""
        return data[: len(self._beginning)] == self._beginning[: len(data)]

    def _rewrite(self, names: Sequence[str]) -> None:
        """The file with these records only, in this order: the new one or the old one is there at any moment."""
        file = None
        try:
            with whole(self.path.resolve(), alone=True) as partial:
                file = open(partial, "w+b", buffering=0)  # noqa: PTH123, SIM115
                _lock(file)
                with suppress(OSError):
                    partial.chmod(os.fstat(self._file.fileno()).st_mode & 0o777)
                with open(file.fileno(), "wb", closefd=False) as buffered:
                    for line in self._lines(names):
                        buffered.write(line)
        except BaseException:
            if file is not None:
                file.close()
            raise
        self._file.close()
        self._file = file
        offset, before, self.known = 0, self.known, {}
        for name in names:
            known = before[name]
            self.known[name] = Known(**{**known.__dict__, "offset": offset})
            offset += known.length
        self._by_content = {known.content: name for name, known in self.known.items() if known.content is not None}
        self._end = offset

    def _lines(self, names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            yield os.pread(self._file.fileno(), self.known[name].length, self.known[name].offset)


class RecordStream:
    """Records written to a stream, where nothing can be looked up or resumed."""

    KEY: ClassVar[str] = RecordFile.KEY
    FILE: ClassVar[str] = RecordFile.FILE

    def __init__(self, write: Callable[[str], object], settings: Settings) -> None:
        self.settings = settings
        self.known: dict[str, Known] = {}
        self._write = write

    def append(self, record: Record) -> None:
        """Write a record as a line."""
        self._write(encode({**record, **self.settings.record}).decode())

    def read(self, name: str) -> Record:
        raise KeyError(name)

    def captioned_like(self, key: tuple[object, ...]) -> Record | None:
        """Nothing: what was written is gone."""
        return None

    def finish(self, order: Sequence[str], bases: Collection[str] = ()) -> None:
        """Nothing to do: records stay in the order in which they were complete."""

    def __enter__(self) -> RecordStream:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON in UTF-8; what is no text (odd file names) as escapes, what is no number as null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    try:
        return (safe_json(json.dumps(finite, ensure_ascii=False)) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(finite) + "\n").encode()


def _named_as_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of records that were written before each had one name, and a budget its text."""
    found = {_OLD_NAMES.get(name, name): value for name, value in settings.items()}
    budget = found.get("visual_tokens")
    if isinstance(budget, float):
        found["visual_tokens"] = percent(budget)
    elif isinstance(budget, int):
        found["visual_tokens"] = str(budget)
    return found


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "the default"
    text = str(values[name])
    return text if len(text) <= 40 else f"{text[:12]}…" if " " not in text else f"{text[:37]}…"


def _open_locked(path: Path) -> IO[bytes]:
    """``path`` opened for reading and writing, made if it is missing, locked. Locks belong to a file, not to a name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        file = open(descriptor, "r+b", buffering=0)  # noqa: PTH123, SIM115 (a descriptor)
        try:
            _lock(file)
            # Another run may have put a new file in its place between the opening and the lock.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            raise OptionError(f"{path}: another run is writing it") from None
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[bytes]) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: two runs on one output are not noticed there.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
