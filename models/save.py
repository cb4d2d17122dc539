"""Trained modules back into a checkpoint in the released layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OptionError
from ..whole_files import whole
from .captioner import CaptionerCheckpoint

#: Beside the weights; what of these a checkpoint has is copied as it is.
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth")


def save_checkpoint(
    opened: CaptionerCheckpoint,
    state: Mapping[str, Mapping[str, Tensor]],
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a copy of a checkpoint with other weights, whole or not at all, and return its path.

    ``state``: state dicts by component (``embedding`` with the entry ``weight`` among them); what they do not hold, the
    tensors that no component uses included, is copied from ``opened``. One file of safetensors in ``dtype``, under the
    released names; configs and tokenizer as they are. Raises ``OptionError`` for a path that is taken or cannot be
    written.
    """
    path = Path(path)
    if path.exists():
        raise OptionError(f"{path} exists already: give a new path, or remove it first")
    changed: dict[str, Tensor] = {}
    for component, entries in state.items():
        changed |= opened.to_checkpoint(component, entries)
    tensors = {
        name: (changed[name] if name in changed else opened.checkpoint.tensor(name)).detach().to("cpu", dtype).clone()
        for name in opened.checkpoint.tensors
    }
    try:
        with whole(path) as partial:
            shutil.copytree(opened.path, partial, ignore=_ignore_weights)
            # The metadata is what transformers looks for before it reads such a file.
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                partial / "model.safetensors",
                {"format": "pt"},
            )
            # safetensors keeps its files to their owner.
            (partial / "model.safetensors").chmod(0o644)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def _ignore_weights(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(_WEIGHTS)]
