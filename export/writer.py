"""Writing a bundle whole or not at all.

The files go into a hidden directory beside the target, which is renamed when everything is on disk. The writer holds a
lock (``flock``) on that directory, so that the leavings of a writer that was killed can be told from one at work.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from ..contract.manifest import MANIFEST_FILE, FileRecord, Manifest
from ..errors import IntertitleError, OptionError
from ..runtime.bundle import is_plain_name, parse_manifest

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes hashed and written at once: the second of the two finds them in the processor's cache.
_CHUNK = 1 << 20

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BundleFile(io.RawIOBase):
    """A file of a bundle being written, front to back; its sha256 and size grow along.

    It has no ``fileno``: what is written past ``write`` would miss the hash.
    """

    def __init__(self, writer: BundleWriter, path: Path) -> None:
        super().__init__()
        self.name = path.name
        self._writer = writer
        self._sha256 = hashlib.sha256()
        self._size = 0
        with writer.disk_errors(self.name):
            self._file = path.open("xb")

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Buffer, /) -> int:
        """Append any buffer (bytes, memoryview, a numpy array); returns its size in bytes.

        ``IntertitleError`` when the disk is full.
        """
        if self.closed:
            raise ValueError(f"{self.name} is closed")
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
        with self._writer.disk_errors(self.name):
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                self._sha256.update(chunk)
                self._file.write(chunk)
        self._size += len(view)
        self._writer.written += len(view)
        return len(view)

    def close(self) -> None:
        """Put the file on disk."""
        if self.closed:
            return
        try:
            with self._writer.disk_errors(self.name), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            super().close()

    def abandon(self) -> None:
        """Close without caring for the contents."""
        with suppress(OSError):
            self._file.close()
        super().close()

    @property
    def record(self) -> FileRecord:
        """Size and sha256 of what has been written."""
        return FileRecord(self._sha256.hexdigest(), self._size)


class BundleWriter:
    """Context manager that writes a bundle to ``path``; nothing appears there before ``commit``.

    An existing ``path`` is refused with ``OptionError``, unless ``overwrite`` is set and it is a bundle.
    ``expected_bytes``, if known, must be free on the disk beforehand. A full disk raises ``IntertitleError``. Leaving
    the context without ``commit`` removes what was written; SIGTERM and SIGHUP do so, too, before they end the process.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, expected_bytes: int | None = None
    ) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 (".." in the last place has no name to write beside)
        self.written = 0
        self._overwrite = overwrite
        self._expected = expected_bytes
        self._directory: Path | None = None
        self._lock = -1
        self._caught: list[int] = []
        self._files: dict[str, BundleFile] = {}

    def check_place(self) -> None:
        """Raise ``OptionError`` where entering would, without touching anything: better before hours of tracing."""
        parent = self.path.parent
        if not parent.is_dir():
            raise OptionError(f"{self.path}: there is no directory {parent} to write the bundle in; create it first")
        self._check_target()
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OptionError(f"{self.path}: cannot write a bundle there: no permission to write in {parent}")

    def __enter__(self) -> BundleWriter:
        parent = self.path.parent
        if not parent.is_dir():
            raise OptionError(f"{self.path}: there is no directory {parent} to write the bundle in; create it first")
        try:
            _sweep(self.path)
            self._check_target()
            self._check_space()
            self._caught = _catch_ends()
            self._directory, self._lock = _create_locked(self.path)
        except OSError as error:
            self._release_ends()
            raise OptionError(f"{self.path}: cannot write a bundle there: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._release_ends()
        if isinstance(error, _Ended):
            os.kill(os.getpid(), error.number)

    def _release_ends(self) -> None:
        for number in self._caught:
            signal.signal(number, signal.SIG_DFL)
        self._caught = []

    def create(self, name: str) -> BundleFile:
        """A new file of the bundle, to be written front to back and closed."""
        if self._directory is None:
            raise ValueError("the writer is not open")
        if not is_plain_name(name) or name in self._files:
            raise ValueError(f"{name!r} is no name for a file of a bundle, or was written already")
        self._files[name] = BundleFile(self, self._directory / name)
        return self._files[name]

    def add_bytes(self, name: str, data: Buffer) -> None:
        """Write a whole file at once."""
        with self.create(name) as file:
            file.write(data)

    def commit(self, manifest: Manifest) -> Path:
        """Complete ``manifest`` with the files written, write it, and let the bundle appear at ``path``.

        Returns ``path``. ``BundleError`` when the manifest would not be accepted by ``Bundle.open``.
        """
        if self._directory is None:
            raise ValueError("the writer is not open")
        if unclosed := [name for name, file in self._files.items() if not file.closed]:
            raise ValueError(f"still open: {', '.join(unclosed)}")
        records = {name: self._files[name].record for name in sorted(self._files)}
        data = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, files=records)), indent=2)
        parse_manifest(data, MANIFEST_FILE)
        with self.disk_errors(MANIFEST_FILE):
            with (self._directory / MANIFEST_FILE).open("xb") as file:
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            _fsync_directory(self._directory)
        self._check_target()
        try:
            self._publish(self._directory)
        except OSError as error:
            raise OptionError(f"{self.path}: cannot put the bundle there: {error.strerror}") from error
        self._directory = None
        return self.path

    @contextmanager
    def disk_errors(self, name: str) -> Iterator[None]:
        """A full disk as one line that says what was needed; other failures to write likewise."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise IntertitleError(f"{self.path}: cannot write '{name}': {error.strerror}") from error
            needed = "" if self._expected is None else f" of about {_bytes(self._expected)}"
            raise IntertitleError(
                f"{self.path}: the disk is full ({error.strerror}): '{name}' could not be written "
                f"after {_bytes(self.written)}{needed}; nothing was kept"
            ) from error

    def _check_target(self) -> None:
        if not os.path.lexists(self.path):
            return
        if problem := _not_a_bundle(self.path):
            raise OptionError(f"{self.path} exists and is not a bundle ({problem}); choose another name")
        if not self._overwrite:
            raise OptionError(f"{self.path} exists; choose another name, or have it overwritten (--overwrite)")

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if self._expected is not None and free < self._expected:
            raise IntertitleError(
                f"{self.path}: the bundle takes about {_bytes(self._expected)}, "
                f"but only {_bytes(free)} are free on that disk"
            )

    def _publish(self, directory: Path) -> None:
        """Rename into place. An old bundle changes places with the new one at once, where the system can do that; else
        it goes aside first and comes back if the renaming fails."""
        parent = self.path.parent
        if not os.path.lexists(self.path):
            directory.rename(self.path)
            _fsync_directory(parent)
            return
        aside = _sibling(self.path, "replaced")
        lock = _open_directory(self.path)
        try:
            if not _lock(lock):
                raise OptionError(f"{self.path} is being replaced by another process")
            if _exchange(directory, self.path):
                _fsync_directory(parent)
                shutil.rmtree(directory, ignore_errors=True)
                return
            self.path.rename(aside)
            try:
                directory.rename(self.path)
            except OSError:
                aside.rename(self.path)
                raise
            _fsync_directory(parent)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step (Linux, renameat2); false where the system or its disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD of fcntl.h, RENAME_EXCHANGE of linux/fs.h
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


class _Ended(BaseException):
    """SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _catch_ends() -> list[int]:
    """Let SIGTERM and SIGHUP raise ``_Ended`` where they would end the process; those that do so now."""
    if threading.current_thread() is not threading.main_thread():
        return []

    def end(number: int, _: object) -> None:
        raise _Ended(number)

    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    return [int(number) for number in caught]


def _sibling(path: Path, role: str) -> Path:
    return path.parent / f".{path.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}"


def _sweep(path: Path) -> None:
    """Clear up after writers of ``path`` that were killed.

    A bundle that one of them had put aside, and not replaced yet, comes back.
    """
    pattern = re.compile(re.escape(f".{path.name}.") + r"(partial|replaced)-\d+-[0-9a-f]{8}")
    for sibling in list(path.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if match is None:
            continue
        with suppress(OSError):
            descriptor = _open_directory(sibling)
            try:
                if not _lock(descriptor, certain=True):
                    continue
                if match[1] == "replaced" and not os.path.lexists(path):
                    sibling.rename(path)
                else:
                    shutil.rmtree(sibling)
            finally:
                os.close(descriptor)


def _create_locked(path: Path) -> tuple[Path, int]:
    """A new temporary directory beside ``path``, and the descriptor that keeps it locked."""
    while True:
        directory = _sibling(path, "partial")
        directory.mkdir()
        # Until it is locked, another process may sweep it away as left over.
        with suppress(FileNotFoundError):
            descriptor = _open_directory(directory)
            if _lock(descriptor) and directory.exists():
                return directory, descriptor
            os.close(descriptor)


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(descriptor: int, certain: bool = False) -> bool:
    """Lock an open directory until it is closed; false when another process has it.

    Some network file systems lock no directories: then everything counts as unlocked, or with ``certain`` as locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not certain
    return True


class _Listing(msgspec.Struct):
    """As much of a ``bundle.json`` of any schema version as is needed to know a bundle's files."""

    schema_version: int
    files: dict[str, msgspec.Raw]


def _not_a_bundle(path: Path) -> str | None:
    """Why a directory must not be deleted in place of a bundle, damaged or old as it may be."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return "not a directory"
        listing = msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=_Listing)
        for entry in path.iterdir():
            if entry.name not in (MANIFEST_FILE, *listing.files):
                return f"{entry.name!r} does not belong to one"
            if entry.is_dir() and not entry.is_symlink():
                return f"{entry.name!r} is a directory"
    except FileNotFoundError:
        return f"no {MANIFEST_FILE} in it"
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return f"its {MANIFEST_FILE} cannot be read"
    return None


def _fsync_directory(directory: Path) -> None:
    descriptor = _open_directory(directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(count: int) -> str:
    """``6.1 GB``; decimal units, as disks are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
