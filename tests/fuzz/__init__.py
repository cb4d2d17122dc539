"""Fuzzers: mutants of media files and of structured inputs through the public runtime. See ``__main__.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_target(kind: str, folder: Path) -> Any:
    """The fuzzer of a kind: ``media``, ``structured``, or ``faults`` (one seed for each kind of fault)."""
    if kind == "media":
        from .media import MediaTarget

        return MediaTarget(folder)
    if kind == "faults":
        from .faults import FaultyTarget

        return FaultyTarget(folder)
    from .structured import StructuredTarget

    return StructuredTarget(folder)
