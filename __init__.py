"""Compile Video-LLM captioners and caption video without PyTorch.

``Captioner.load(bundle).caption(file)`` is the way in. Names are imported when they are first used, so that ``import
intertitle`` costs next to nothing. Log records go to the loggers ``intertitle.*``; nothing shows them unless the
program sets up ``logging``.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BundleError,
    CheckpointError,
    ClosedError,
    DeadlineError,
    IntertitleError,
    ItemError,
    MediaError,
    OptionError,
    TargetError,
    TransientMediaError,
)

if TYPE_CHECKING:
    from .runtime.batching import BatchItem, BatchResult
    from .runtime.caption import Caption, CaptionStream
    from .runtime.captioner import Captioner
    from .runtime.decoding import Decoding
    from .runtime.prepared import MediaOptions, PreparedClip
    from .runtime.viewing import Count, Share, Viewing

__all__ = [
    "BatchItem",
    "BatchResult",
    "BundleError",
    "Caption",
    "CaptionStream",
    "Captioner",
    "CheckpointError",
    "ClosedError",
    "Count",
    "DeadlineError",
    "Decoding",
    "IntertitleError",
    "ItemError",
    "MediaError",
    "MediaOptions",
    "OptionError",
    "PreparedClip",
    "Share",
    "TargetError",
    "TransientMediaError",
    "Viewing",
    "__version__",
]

_LAZY = {
    "BatchItem": "batching",
    "BatchResult": "batching",
    "Caption": "caption",
    "CaptionStream": "caption",
    "Captioner": "captioner",
    "Count": "viewing",
    "Decoding": "decoding",
    "MediaOptions": "prepared",
    "PreparedClip": "prepared",
    "Share": "viewing",
    "Viewing": "viewing",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import the runtime only when something of it is used."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".runtime.{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
