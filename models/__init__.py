"""The captioners: compact PyTorch reference modules, and the reading of released checkpoints and adapters."""

from .captioner import CaptionerCheckpoint, open_checkpoint
from .families import FAMILIES

__all__ = ["FAMILIES", "CaptionerCheckpoint", "open_checkpoint"]
