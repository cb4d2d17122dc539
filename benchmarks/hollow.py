"""Bundles that travel without their weights: ``python -m intertitle.benchmarks.hollow BUNDLE FOLDER``.

For a machine with a GPU that gigabytes do not reach, or that takes long to compile: the graphs are kept, and of every
large tensor a few thousand of its values. Where it is measured, ``fill`` draws as many as the tensor had from those, so
that kernels meet numbers of the right kind and spread. What is said of such a bundle is about time and memory; captions
and logits are noise.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import torch

from ..contract.manifest import FileRecord, Manifest
from ..runtime.bundle import MANIFEST_FILE, parse_manifest
from ..runtime.integrity import FileState, hash_files, remember

#: What a hollow bundle has in place of its files of weights.
HOLLOW_FILE = "hollow.json"
KEPT_FILE = "hollow.bin"
#: Values that are kept of a tensor, and the size from which it is one to be drawn, in values.
_SAMPLE = 4096
_DRAWN_AT_ONCE = 1 << 26


class _Tensor(msgspec.Struct, frozen=True):
    """A stretch of a file of weights: its bytes, of how many a value has, and where its kept values lie in
    ``hollow.bin``, of which there are ``_SAMPLE`` or, of a small one, all."""

    file: str
    offset: int
    length: int
    width: int
    kept: int


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def main(bundle: Path, folder: Path) -> None:
    """Write BUNDLE without its weights to FOLDER, which ``benchmarks.gpu --bundles`` takes."""
    size = hollow(bundle, folder)
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


def hollow(bundle: Path, folder: Path) -> int:
    """Write a bundle without its weights; returns its bytes."""
    manifest, tensors, rng = _manifest(bundle), list[_Tensor](), np.random.default_rng(0)
    folder.mkdir(parents=True)
    with (folder / KEPT_FILE).open("wb") as kept:
        for file, offset, length, width in _stretches(bundle, manifest):
            values = np.memmap(bundle / file, f"V{width}", "r", offset, (length // width,))
            tensors.append(_Tensor(file, offset, length, width, kept.tell()))
            few = values if len(values) <= _SAMPLE else values[np.sort(rng.integers(0, len(values), _SAMPLE))]
            kept.write(few.tobytes())
    large = {tensor.file for tensor in tensors}
    for name in (*manifest.files, MANIFEST_FILE):
        if name not in large:
            shutil.copyfile(bundle / name, folder / name)
    (folder / HOLLOW_FILE).write_bytes(msgspec.json.encode(tensors))
    return sum(path.stat().st_size for path in folder.iterdir())


def fill(folder: Path, bundle: Path) -> None:
    """Write the bundle of a hollow one, its weights drawn: on a GPU, if PyTorch has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    manifest, generator = _manifest(folder), torch.Generator(device).manual_seed(0)
    tensors = msgspec.json.decode((folder / HOLLOW_FILE).read_bytes(), type=list[_Tensor])
    kept = np.fromfile(folder / KEPT_FILE, np.uint8)
    large = {tensor.file for tensor in tensors}
    bundle.mkdir(parents=True)
    for name in manifest.files:
        if name not in large:
            shutil.copyfile(folder / name, bundle / name)
            continue
        with (bundle / name).open("wb") as file:
            file.truncate(manifest.files[name].size)
            for tensor in (each for each in tensors if each.file == name):
                file.seek(tensor.offset)
                for values in _values(tensor, kept, generator):
                    file.write(values.data)
    states = {name: FileState.of((bundle / name).stat()) for name in manifest.files}
    digests = hash_files(bundle, states, states)
    files = {name: FileRecord(digest, states[name].size) for name, digest in digests.items()}
    written = msgspec.json.encode(msgspec.structs.replace(manifest, files=files))
    (bundle / MANIFEST_FILE).write_bytes(written)
    # They were hashed just now, and nobody else knows of them: opening the bundle need not do it again.
    remember(bundle, hashlib.sha256(written).hexdigest(), states)


def _values(
    tensor: _Tensor, kept: npt.NDArray[np.uint8], generator: torch.Generator
) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """The bits of a tensor's values, in pieces: those that were kept, or as many drawn from them."""
    count = tensor.length // tensor.width
    sample = kept[tensor.kept : tensor.kept + min(count, _SAMPLE) * tensor.width]
    if count <= _SAMPLE:
        yield sample
        return
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    table = torch.from_numpy(sample.copy()).view(types[tensor.width]).to(generator.device)
    for start in range(0, count, _DRAWN_AT_ONCE):
        size = min(_DRAWN_AT_ONCE, count - start)
        yield table[torch.randint(0, len(table), (size,), generator=generator, device=generator.device)].cpu().numpy()


def _stretches(bundle: Path, manifest: Manifest) -> Iterator[tuple[str, int, int, int]]:
    """File, offset, bytes and bytes a value of every tensor that lies outside of a graph, and of the embedding."""
    seen: set[tuple[str, int]] = set()
    for name in manifest.files:
        if not name.endswith(".onnx"):
            continue
        for tensor in onnx.load(str(bundle / name), load_external_data=False).graph.initializer:
            where: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
            if where and (where["location"], int(where["offset"])) not in seen:
                seen.add((where["location"], int(where["offset"])))
                yield where["location"], int(where["offset"]), int(where["length"]), _width(tensor.data_type)
    table = manifest.files[manifest.embedding.file].size
    yield manifest.embedding.file, 0, table, table // int(np.prod(manifest.embedding.shape))


def _width(data_type: int) -> int:
    """Bytes of a value; of codes, which come several to a byte, one."""
    try:
        width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize
    except (KeyError, TypeError):
        return 1
    return width if width in (2, 4) else 1


def _manifest(folder: Path) -> Manifest:
    return parse_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))


if __name__ == "__main__":
    main()
