"""What PyTorch needs of the records of ``contract.targets``."""

from __future__ import annotations

import torch

from ..contract.targets import Target


def matmul_dtype(target: Target, format: str) -> torch.dtype:
    """The type of the inputs and outputs of matmuls, and of the cache, in a component of that format."""
    return getattr(torch, target.matmul_type(format))
