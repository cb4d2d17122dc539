"""What a file holds, known without reading it again while size and time of its last change are the same."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass

from ...errors import MediaError, TransientMediaError
from ..media.doors import is_transient

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """Size in bytes and time of the last change in nanoseconds."""

    size: int
    mtime_ns: int


def identify(path: str) -> Identity:
    """``MediaError`` for what is no file, ``TransientMediaError`` where the system cannot say."""
    try:
        status = os.stat(path)  # noqa: PTH116 (as the user wrote it)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise (TransientMediaError if is_transient(error) else MediaError)(f"{path}: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder, and a batch captions files" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise MediaError(f"{path}: is {what}")
    return Identity(status.st_size, status.st_mtime_ns)


class ContentHashes:
    """sha256 of files, each read once while it does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Identity], str] = {}

    def learn(self, path: str, identity: Identity, sha256: str) -> None:
        """Take the hash of an earlier run for right."""
        self._known[os.path.abspath(path), identity] = sha256  # noqa: PTH100

    def of(self, path: str, identity: Identity) -> str:
        """Hexadecimal sha256 of the file. ``MediaError`` when it cannot be read."""
        key = (os.path.abspath(path), identity)  # noqa: PTH100
        if key not in self._known:
            digest = hashlib.sha256()
            try:
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                kind = TransientMediaError if is_transient(error) else MediaError
                raise kind(f"{path}: cannot be read ({error.strerror})") from error
            self._known[key] = digest.hexdigest()
        return self._known[key]
