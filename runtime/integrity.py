"""Whether files are what their hashes say, without reading gigabytes again each time.

A file that was hashed once is remembered by its inode, size and times in a per-user record. Later it is taken for
unchanged only while all of these are the same; the record never says what the hash is, only that it was right.

The record notices every ordinary change of a file. It does not stop a program that may write to the bundle and means
to deceive: a change through a writable shared mapping that was made dirty before the hashing moves no time stamp until
the kernel writes the page back, some 30 s later on a disk and never on tmpfs. So nothing on tmpfs is remembered, and
whoever shares a writable bundle with others opens it with ``verify="full"``.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import msgspec

from ..errors import BundleError
from ..whole_files import whole
from .graph_check import CHECK_VERSION

#: Called with the bytes read so far and the bytes to read in all.
Progress = Callable[[int, int], None]

_CHUNK = 8 << 20
_THREADS = 2

#: No symlink is followed and no FIFO waited for, whatever stands there since it was looked at. (Windows has neither.)
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_OPEN_FLAGS |= getattr(os, "O_BINARY", 0)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

#: A file younger than this may still change without its times changing (their resolution is 4 ms on ext4, 2 s on FAT).
_SETTLED_SECONDS = 2.0


class FileState(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file changes. ``ctime`` cannot be set by a program, unlike ``mtime``."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether a change from now on is certain to show in the times (so ask before hashing, not after)."""
        return time.time() - max(self.mtime_ns, self.ctime_ns) / 1e9 > _SETTLED_SECONDS


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of one bundle that had the hashes of the ``bundle.json`` whose own hash is ``manifest``.

    ``graphs``: the version of the check that its graphs have passed.
    """

    manifest: str
    files: dict[str, FileState]
    graphs: int


def hash_files(
    directory: Path, states: Mapping[str, FileState], names: Iterable[str], progress: Progress | None = None
) -> dict[str, str]:
    """sha256 (hexadecimal) of each named file of ``directory``, two files at a time.

    ``states`` are the files as they were seen before; ``BundleError`` when one is another by now or cannot be read.
    ``progress`` is called in the calling thread.
    """
    names = sorted(names, key=lambda name: -states[name].size)
    total = sum(states[name].size for name in names)
    done = dict.fromkeys(names, 0)
    stop = threading.Event()

    def digest(name: str) -> str:
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK, states[name].size + 1)))
        try:
            # No symlink is followed and no FIFO waited for, whatever stands there by now.
            flags = (
                os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            )
            with open(os.open(directory / name, flags), "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
                before = FileState.of(os.fstat(file.fileno()))
                while (count := file.readinto(buffer)) and not stop.is_set():
                    sha256.update(buffer[:count])
                    done[name] += count
                after = FileState.of(os.fstat(file.fileno()))
        except OSError as error:
            raise BundleError(f"{directory}: '{name}' cannot be read: {error.strerror}") from error
        if not before == after == states[name]:
            raise BundleError(f"{directory}: '{name}' was changed while it was read; try again")
        return sha256.hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = {name: pool.submit(digest, name) for name in names}
        try:
            pending = set(futures.values())
            while pending:
                _, pending = wait(pending, timeout=0.1)
                if progress is not None:
                    progress(sum(done.values()), total)
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            # An interrupt, or an error of the progress display: the pool must not go on reading.
            stop.set()
            for future in futures.values():
                future.cancel()
            raise


def read_file(directory: Path, name: str) -> bytes:
    """A file of ``directory``, whole. ``BundleError`` when it cannot be read or is no regular file."""
    try:
        with os.fdopen(os.open(directory / name, _OPEN_FLAGS), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BundleError(f"{directory}: '{name}' is not a regular file")
            return file.read()
    except OSError as error:
        raise BundleError(f"{directory}: '{name}' cannot be read: {error.strerror}") from error


def in_memory(directory: Path) -> bool:
    """Whether a directory lies on tmpfs, by Linux's list of mounts; ``False`` where there is none."""
    try:
        device = directory.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    # Fields by proc(5): the third is the device; the kind of file system follows a lone "-".
    lines = [line.split() for line in mounts.splitlines()]
    return any(
        fields[2] == number and "-" in fields and fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
        for fields in lines
        if len(fields) > 4
    )


def remembered(directory: Path, manifest_sha256: str) -> dict[str, FileState]:
    """The files of ``directory`` found right before, as they were then; empty when nothing trustworthy is known."""
    path = None if in_memory(directory) else _record_path(directory)
    if path is None:
        return {}
    try:
        with os.fdopen(os.open(path, _OPEN_FLAGS), "rb") as file:
            if not _is_private(os.fstat(file.fileno()), stat.S_ISREG):
                return {}
            record = msgspec.json.decode(file.read(), type=_Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return record.files if (record.manifest, record.graphs) == (manifest_sha256, CHECK_VERSION) else {}


def remember(directory: Path, manifest_sha256: str, states: Mapping[str, FileState]) -> None:
    """Note that these files, settled before they were hashed, have the hashes of the manifest, and that its graphs
    passed ``graph_check``.

    Failing to write the note costs only another hashing, so no error is raised.
    """
    path = None if in_memory(directory) else _record_path(directory)
    if path is None:
        return
    record = _Record(manifest_sha256, dict(states), CHECK_VERSION)
    with suppress(OSError), whole(path) as partial, os.fdopen(os.open(partial, _WRITE_FLAGS, 0o600), "wb") as file:
        file.write(msgspec.json.encode(record))


def cache_directory(name: str) -> Path | None:
    """The directory ``name`` of the per-user cache, created with mode 0700.

    ``$XDG_CACHE_HOME/intertitle/NAME``, or under ``~/.cache``. ``None`` when it cannot be made, belongs to another
    user or is open to others, and on systems without owners and modes.
    """
    if os.name != "posix":
        return None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        if not base.is_absolute():
            return None
        base.mkdir(parents=True, exist_ok=True)
        path = base
        for part in ("intertitle", name):
            path = path / part
            path.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(path.lstat(), stat.S_ISDIR):
                return None
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return path


def _record_path(directory: Path) -> Path | None:
    """Where the record of a bundle is kept: one for each place, so that a rewritten bundle leaves none behind."""
    cache = cache_directory("verified")
    if cache is None:
        return None
    return cache / f"{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]}.json"


def _is_private(status: os.stat_result, kind: Callable[[int], bool]) -> bool:
    return kind(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
