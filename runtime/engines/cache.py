"""The cache of engines: a folder that belongs to this user alone, with a note beside each engine of its origin.

An engine is executable code. So it is never read from a bundle, only from a folder that this user owns and nobody else
can write to, and only if its hash is the one that was noted when it was built there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ...errors import TargetError
from ...whole_files import whole
from ..integrity import cache_directory

_NOTE_BYTES = 1 << 20


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that an engine depends on.

    ``bundle``: the name of the captioner. ``graph``, ``data``: hashes of the bundle's files. ``capabilities``: compute
    capabilities of the GPUs that it runs on. ``options``: the sizes that it is built for.
    """

    bundle: str
    component: str
    graph: str
    data: str
    library: str
    version: str
    platform: str
    capabilities: tuple[str, ...]
    options: dict[str, int]

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:24]


class _Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    origin: Origin
    sha256: str
    size: int


#: The message for a field that differs between the existing engine and the wanted one.
_CHANGES = {
    "graph": "the bundle's graph changed",
    "data": "the bundle's weights changed",
    "library": "it was built with {old}, not {new}",
    "version": "TensorRT is {new}, it was built with {old}",
    "platform": "it was built for {old}, this is {new}",
    "capabilities": "it is for compute capability {old}, not {new}",
    "options": "the sizes differ (wanted {new}, built {old})",
}


class EngineCache:
    """The engines that this user built, for any bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls) -> EngineCache:
        """The cache of this user. ``TargetError`` if the user cannot have a private folder."""
        folder = cache_directory("engines")
        if folder is None:
            raise TargetError(
                "engines need a cache folder of this user alone (0700): set XDG_CACHE_HOME to a place where one can be"
            )
        return cls(folder)

    def path(self, origin: Origin) -> Path:
        """The path of the engine of this origin, whether it exists or not."""
        return self.folder / f"{origin.component}-{origin.key}.engine"

    def why_missing(self, origin: Origin) -> str | None:
        """``None`` if the engine exists and is whole; else what is wrong, or how the existing engine differs."""
        note = self._fitting_note(origin)
        return note if isinstance(note, str) else self._altered(origin, note, _sha256(self.path(origin)))

    def built(self, like: Origin) -> list[Origin]:
        """All engines of the same component of the same captioner."""
        return [note.origin for note in self._notes(like)]

    def load(self, origin: Origin) -> bytes:
        """The engine's bytes. ``TargetError`` if it is missing or is not the one that was built here."""
        note, data = self._fitting_note(origin), b""
        if isinstance(note, str):
            fault = note
        else:
            data = self.path(origin).read_bytes()
            fault = self._altered(origin, note, hashlib.sha256(data).hexdigest())
        if fault is not None:
            raise TargetError(f"no engine of {origin.component}: {fault}; run intertitle build")
        return data

    def store(self, origin: Origin, engine: bytes) -> Path:
        """Keep an engine, whole or not at all; other engines of the component stay."""
        note = _Note(origin=origin, sha256=hashlib.sha256(engine).hexdigest(), size=len(engine))
        path = self.path(origin)
        # An engine without a note does not count, so the note is written last.
        self._note_path(origin).unlink(missing_ok=True)
        self._write(path, engine)
        self._write(self._note_path(origin), msgspec.json.encode(note))
        return path

    def timing(self, library: str, version: str) -> bytes:
        """The kernel times that earlier builds with this TensorRT measured; empty if there are none."""
        try:
            path = self._timing_path(library, version)
            _check_private(path, stat.S_ISREG)
            return path.read_bytes()
        except (OSError, TargetError):
            return b""

    def keep_timing(self, library: str, version: str, data: bytes) -> None:
        """Keep the kernel times for the next build."""
        if data:
            self._write(self._timing_path(library, version), data)

    @contextmanager
    def building(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Only one build runs at a time: a second one calls ``waiting`` once and waits. Leftovers are removed."""
        path = self.folder / "lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            for partial in self.folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
            yield

    def _fitting_note(self, origin: Origin) -> _Note | str:
        """The note of the engine of this origin, or why it is missing. The engine itself is not read."""
        path, note_path = self.path(origin), self._note_path(origin)
        if not path.exists() and not note_path.exists():
            others = [note.origin for note in self._notes(origin)]
            if not others:
                return "there is no engine yet"
            # Compare with the engine that differs least.
            nearest = min(others, key=lambda other: len(_changed(other, origin)))
            return "; ".join(describe_change(nearest, origin, name) for name in _changed(nearest, origin))
        if not note_path.exists() or not path.exists():
            return "its build was interrupted"
        _check_private(path, stat.S_ISREG)
        note = self._read_note(note_path)
        if note is None or note.origin != origin:
            return f"{note_path.name} is not what intertitle wrote"
        return note

    def _altered(self, origin: Origin, note: _Note, sha256: str) -> str | None:
        return None if sha256 == note.sha256 else f"{self.path(origin).name} is not the engine that was built here"

    def _notes(self, like: Origin) -> Iterator[_Note]:
        for path in sorted(self.folder.glob(f"{like.component}-*.json")):
            note = self._read_note(path)
            if note is not None and (note.origin.bundle, note.origin.component) == (like.bundle, like.component):
                yield note

    @staticmethod
    def _read_note(path: Path) -> _Note | None:
        try:
            _check_private(path, stat.S_ISREG)
            with path.open("rb") as file:
                return msgspec.json.decode(file.read(_NOTE_BYTES), type=_Note)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _note_path(self, origin: Origin) -> Path:
        return self.path(origin).with_suffix(".json")

    def _timing_path(self, library: str, version: str) -> Path:
        return self.folder / f"timing-{library}-{version}.cache"

    def _write(self, path: Path, data: bytes) -> None:
        try:
            with whole(path) as partial:
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
        except OSError as error:
            raise TargetError(f"{path}: cannot be written: {error.strerror}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _changed(old: Origin, new: Origin) -> list[str]:
    """The names of the fields that differ."""
    return [name for name in _CHANGES if getattr(old, name) != getattr(new, name)]


def describe_change(old: Origin, new: Origin, name: str) -> str:
    """The message about a field that differs."""
    was, now = getattr(old, name), getattr(new, name)
    if isinstance(was, dict):
        names = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        was, now = (", ".join(f"{key} {each.get(key)}" for key in names) for each in (was, now))
    elif isinstance(was, tuple):
        was, now = (", ".join(each) for each in (was, now))
    return _CHANGES[name].format(old=was, new=now)


def _check_private(path: Path, kind: Callable[[int], bool]) -> None:
    """``TargetError`` unless the path has this kind, belongs to this user, and nobody else can write to it."""
    status = path.lstat()
    if not kind(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise TargetError(f"{path} belongs to another user or is open to others: remove it, and run intertitle build")
