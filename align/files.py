"""Files that are whole or absent, whenever a training is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a neighbour of ``path``, which takes its place when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
