"""Files and folders that are whole or absent, whenever a program is stopped."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A neighbour of ``path`` to write in the block: a file or a folder, which takes the place of ``path`` at its end.

    It is then complete and on the disk. What was at ``path`` stays until then, and for good if the block raises.
    ``alone``: no other process or thread writes ``path``. The neighbour then always has the same name, so a program
    that is killed again and again leaves one at most; ``discard`` removes it. ``OSError`` where the disk is full.
    """
    partial = _neighbour(path, alone)
    if alone:
        _remove(partial)
    try:
        yield partial
        if partial.is_file():
            _sync(partial)
        partial.replace(path)
        if os.name == "posix":
            with suppress(OSError):
                # A rename is on disk once its folder is.
                _sync(path.parent)
    finally:
        _remove(partial)


def discard(path: Path) -> None:
    """Remove what a killed program that wrote ``path`` alone has left beside it."""
    _remove(_neighbour(path, True))


def _neighbour(path: Path, alone: bool) -> Path:
    mark = "intertitle-" if alone else f"{os.getpid()}-{threading.get_ident()}."
    return path.with_name(f".{path.name}.{mark}partial")


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
