"""Targets for the exporter: the records of ``contract.targets``, and what PyTorch needs of them."""

from __future__ import annotations

import torch

from ..contract.targets import TARGETS, Target, get_target

__all__ = ["TARGETS", "Target", "get_target", "matmul_dtype"]


def matmul_dtype(target: Target, format: str) -> torch.dtype:
    """The type of the inputs and outputs of matmuls, and of the cache, in a component of that format."""
    return getattr(torch, target.matmul_type(format))
