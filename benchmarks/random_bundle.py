"""A bundle with random weights, for benchmarks that are given none."""

from __future__ import annotations

from pathlib import Path

from ..export.compile import compile_bundle
from ..models.random_checkpoint import write_checkpoint


def random_bundle(folder: Path, size: str, weights: str = "int4") -> Path:
    """Write a random checkpoint of a size (``random_checkpoint.SIZES``) below ``folder`` and compile it there."""
    checkpoint = write_checkpoint(folder / "checkpoints" / size, size)
    return compile_bundle(checkpoint, folder / f"{size}-{weights}", weights=weights).path
