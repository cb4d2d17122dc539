"""What the tests of the model room share: the fixtures' numbers, and copies of a fixture checkpoint to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intertitle.models import CaptionerCheckpoint, open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def opened(data_dir: Path) -> Callable[..., CaptionerCheckpoint]:
    """``opened("av-qwen2")``: a fixture checkpoint, opened once for all tests."""
    cache: dict[Any, CaptionerCheckpoint] = {}

    def get(name: str, adapter: str | None = None, keep: float | None = None) -> CaptionerCheckpoint:
        key = (name, adapter, keep)
        if key not in cache:
            cache[key] = open_checkpoint(data_dir / name, adapter and data_dir / adapter, keep)
        return cache[key]

    return get


@pytest.fixture(scope="session")
def expected(data_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """``expected("av-qwen2")``: the numbers of the original implementation."""
    cache: dict[str, dict[str, np.ndarray]] = {}

    def get(name: str) -> dict[str, np.ndarray]:
        if name not in cache:
            with np.load(data_dir / name / "expected.npz") as file:
                cache[name] = dict(file)
        return cache[name]

    return get


def _relative_error(actual: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    actual, wanted = np.asarray(actual, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert actual.shape == wanted.shape
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="session")
def relative_error() -> Callable[..., float]:
    """Largest difference over largest magnitude; shapes must agree."""
    return _relative_error


class Copy:
    """A fixture checkpoint in a folder of its own, to be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def edit_json(self, name: str, *remove: str, **changes: Any) -> None:
        file = self.path / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values = {key: value for key, value in {**values, **changes}.items() if key not in remove}
        file.write_text(json.dumps(values))

    def tensors(self, name: str = "model.safetensors") -> dict[str, Tensor]:
        return load_file(self.path / name)

    def save(self, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
        # Written beside and renamed: the old file may still be mapped.
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, self.path / "new")
        (self.path / "new").replace(self.path / name)


@pytest.fixture
def copied(data_dir: Path, tmp_path: Path) -> Callable[[str], Copy]:
    """``copied("av-qwen2")``: a copy of a fixture in ``tmp_path``, without its expected numbers."""

    def copy(name: str) -> Copy:
        shutil.copytree(data_dir / name, tmp_path / name, ignore=shutil.ignore_patterns("expected.npz"))
        return Copy(tmp_path / name)

    return copy
