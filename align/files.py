"""The files of a training, which are whole or absent whenever it is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..whole_files import whole


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a neighbour of ``path``, which takes its place when it is complete and on the disk."""
    with whole(path, alone=True) as partial:
        write(partial)


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
