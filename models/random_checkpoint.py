"""Random-weight checkpoints in a family's released layout, for measuring and for the demo.

What a checkpoint holds is its family's to say (``sizes.py`` in the family's folder, ``random_layout.Size``). Here its
tensors are drawn and written: each from its own generator, seeded by its name, straight into bf16 (220 million values a
second on one core: no tricks needed), and it leaves memory before the next one comes. The pickles are the most held at
once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import OptionError
from ..whole_files import whole
from .families import FAMILIES
from .random_layout import Layout, RandomTensor, Size

SIZES: dict[str, Size] = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
"""The sizes of all families by name."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

_CHUNK = 1 << 24
"""Values drawn at a time."""


def write_checkpoint(
    path: str | Path,
    size: str | Size,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    text: Sequence[str] | None = None,
    hollow: bool = False,
) -> Path:
    """Write a checkpoint folder, whole or not at all, and return its path.

    ``size`` is a key of ``SIZES`` or dimensions of one's own; the same size and seed give the same bytes on one version
    of PyTorch. ``text`` is what the tokenizer's merges come from, as many as the vocabulary has room for. ``hollow``:
    the tensors of the shards are zeros that were never written, so that a checkpoint of any size takes no room on most
    file systems.
    Raises ``OptionError`` for an unknown size, a path that is taken, or a disk that is full.
    """
    path = Path(path)
    if isinstance(size, str):
        if size not in SIZES:
            raise OptionError(f"size {size!r} is not one of {', '.join(SIZES)}")
        size = SIZES[size]
    if path.exists():
        raise OptionError(f"{path} exists already: give a new path, or remove it first")
    try:
        with whole(path) as partial:
            partial.mkdir(parents=True)
            for name, content in size.files(text).items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(content, encoding="utf-8")
            _write_weights(partial, size.layout(), seed, progress or (lambda done, total: None), hollow)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def _write_weights(folder: Path, layout: Layout, seed: int, progress: Progress, hollow: bool) -> None:
    shards = {place: _shards(tensors, layout.shard_bytes) for place, tensors in layout.shards.items()}
    files = [*layout.pickles.values(), *(shard for each in shards.values() for shard in each)]
    total = sum(tensor.bytes for file in files for tensor in file)
    done = 0

    def values(tensor: RandomTensor) -> Iterator[Tensor]:
        nonlocal done
        for chunk in _draw(tensor, seed):
            yield chunk
            done += 2 * chunk.numel()
            progress(done, total)

    for place, parts in shards.items():
        (folder / place).mkdir(exist_ok=True)
        weight_map = {}
        for number, shard in enumerate(parts, 1):
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
            with (folder / place / name).open("wb") as file:
                _write_header(file, shard)
                if hollow:
                    file.truncate(file.tell() + sum(tensor.bytes for tensor in shard))
                    continue
                for tensor in shard:
                    for chunk in values(tensor):
                        file.write(chunk.view(torch.int16).numpy().data)
        index = {"metadata": {"total_size": sum(t.bytes for shard in parts for t in shard)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / place / "model.safetensors.index.json").write_text(text)
    for name, part in layout.pickles.items():
        state = {tensor.name: torch.cat([*values(tensor)]).reshape(tensor.shape) for tensor in part}
        try:
            torch.save(state, folder / name)
        except RuntimeError as error:  # how PyTorch reports a failed write
            raise OSError(f"{name}: {str(error).splitlines()[0]}") from None


def _draw(tensor: RandomTensor, seed: int) -> Iterator[Tensor]:
    """The values in bf16, flat, in chunks."""
    digest = hashlib.sha256(f"{seed}:{tensor.seeded_as}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = math.prod(tensor.shape)
    for start in range(0, count, _CHUNK):
        values = torch.empty(min(_CHUNK, count - start), dtype=torch.bfloat16)
        yield values.normal_(tensor.mean, tensor.std, generator=generator)


def _shards(tensors: Iterable[RandomTensor], limit: int) -> list[list[RandomTensor]]:
    """Tensors in order, a new shard where one would pass the limit (as transformers' ``save_pretrained``)."""
    shards: list[list[RandomTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.bytes
    return shards


def _write_header(file: BinaryIO, tensors: list[RandomTensor]) -> None:
    """The safetensors format by hand, because its own writer wants the whole shard in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": span}
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
