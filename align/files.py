"""Files that are whole or absent, whenever a training is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a neighbour of ``path``, which takes its place when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    _sync(partial, os.O_RDONLY)
    partial.replace(path)
    if os.name == "posix":
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def read_json(path: Path) -> Any:
    """A JSON file of a training. ``OptionError`` for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error


def read_state(path: Path, *keys: str) -> dict[str, Any]:
    """A training's saved state, a dictionary with ``keys``. ``OptionError`` for one that is damaged."""
    try:
        saved = torch.load(path, weights_only=True)
        # The restricted unpickler can raise anything for a damaged file.
    except Exception as error:
        raise _damaged(path) from error
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise _damaged(path)
    return saved


def _damaged(path: Path) -> OptionError:
    return OptionError(f"{path} is damaged, so the training cannot go on from it: remove {path.parent} and train again")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
