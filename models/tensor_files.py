"""Files of named tensors, read one tensor at a time: safetensors and PyTorch's zip pickles.

A file stays mapped only as long as a tensor read from it lives, so that going through a checkpoint of any size needs
the memory of its largest tensor. A pickle is only ever read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

#: How a Git LFS pointer begins (git-lfs, spec.md).
_POINTER = b"version https://git-lfs"

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What a file's header says of one tensor. ``dtype`` is None for a format that is not read (float8 and such)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    key: str
    """Its name in that file."""


def list_tensors(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a ``.safetensors`` or ``.bin`` file, without reading its values.

    Raises CheckpointError for a file that is truncated, of another format, or a pickle that holds anything else than
    tensors.
    """
    refuse_pointer(file)
    if file.suffix != ".safetensors":
        return {name: TensorInfo(tuple(x.shape), x.dtype, file, name) for name, x in _load_pickle(file).items()}
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: TensorInfo(tuple(x.get_shape()), _SAFETENSORS_DTYPES.get(x.get_dtype()), file, name)
                for name, x in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file (truncated?): {_first_line(error)}") from None


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, in the file's dtype. It may be a view of the mapped file: do not write into it."""
    file, name = info.file, info.key
    if file.suffix != ".safetensors":
        return _load_pickle(file)[name]
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: tensor {name} cannot be read: {_first_line(error)}") from None


def refuse_pointer(file: Path) -> None:
    """CheckpointError for what Git leaves in the place of a large file that was not fetched."""
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if pointer:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull")


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The state dict of a ``torch.save`` file, its values mapped and not read where the format allows that."""
    _refuse_bomb(file)
    try:
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    # A broken or hostile pickle can make the restricted unpickler raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{file} is refused: not a whole PyTorch file of plain tensors ({_pickle_reason(error)})"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} is refused: it holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file} is refused: its entry {name!r} is not a tensor")
        kinds = (value.layout != torch.strided, value.is_meta, value.is_nested, value.is_quantized)
        names = ("sparse", "without values (meta)", "nested", "quantized")
        if any(kinds):
            raise CheckpointError(f"{file} is refused: its tensor {name!r} is {names[kinds.index(True)]}")
    # A Parameter is a tensor that remembers its gradient.
    return {name: value.detach() for name, value in state.items()}


def _refuse_bomb(file: Path) -> None:
    """CheckpointError for a zip that unpacks to more than it weighs: PyTorch stores tensors without compression."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked, weight = sum(entry.file_size for entry in archive.infolist()), file.stat().st_size
            if unpacked > weight:
                raise CheckpointError(
                    f"{file} is refused: its {weight} bytes unpack to {unpacked}, and PyTorch does not compress"
                )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is refused: not a whole PyTorch file ({_first_line(error)})") from None


def _pickle_reason(error: Exception) -> str:
    """Why PyTorch refuses a file, without its advice to load it in a way that can run anything."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it would call {match[1]}"
    line = _first_line(error)
    return (
        "it is no file of torch.save" if isinstance(error, pickle.UnpicklingError) else line.partition("Re-running")[0]
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file cannot be read or holds something else."""
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
