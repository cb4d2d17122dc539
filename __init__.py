"""Compile Video-LLM captioners and caption video without PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import IntertitleError

if TYPE_CHECKING:
    from .runtime.captioner import Caption, Captioner, CaptionStream
    from .runtime.decoding import Decoding

__all__ = ["Caption", "CaptionStream", "Captioner", "Decoding", "IntertitleError", "__version__"]

_LAZY = {"Caption": "captioner", "CaptionStream": "captioner", "Captioner": "captioner", "Decoding": "decoding"}


def __getattr__(name: str) -> Any:
    """Import the runtime only when something of it is used."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".runtime.{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
