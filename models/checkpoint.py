"""A checkpoint folder in a released layout, seen as one flat set of named tensors that are read lazily."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensor_files import TensorInfo, list_tensors, read_json, read_tensor, refuse_pointer

#: Released next to VideoLLaMA2's shards; their tensors carry the shards' names, and the shards win.
_BESIDE = ("audio_tower.bin", "mm_projector_a.bin", "mm_projector.bin")
#: AuroraCap's folders, each with its own config and weights.
_PARTS = ("visual_encoder", "projector")
#: Names of weight files, in transformers' order of preference.
_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
#: Files beside the weights that decide what a captioner computes; they count in the fingerprint.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: What a tokenizer is read from where there is no tokenizer.json (``export.tokenizer``).
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a transformers-style folder, single or sharded, in transformers' order of preference.

    Empty when there are none. Shards without their index are read when they are complete. Raises CheckpointError for
    a shard that is not there.
    """
    for stem, suffix in _WEIGHTS:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
            shards = sorted(set(weight_map.values()))
            for name in shards:
                if Path(name).name != name or Path(name).suffix != suffix:
                    raise CheckpointError(f"{index} names {name!r}, which is not a plain {suffix} file name")
                if not (folder / name).is_file():
                    raise CheckpointError(f"{folder / name} is missing, but {index.name} lists it; download it again")
            return [folder / name for name in shards]
    return next(filter(None, (_loose_shards(folder, *kind) for kind in _WEIGHTS)), [])


def _loose_shards(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Shards ``STEM-00001-of-00003`` without their index. CheckpointError where one of them is missing."""
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    found = {match[0]: match for name in sorted(p.name for p in folder.iterdir()) if (match := pattern.fullmatch(name))}
    if not found:
        return []
    count = next(iter(found.values()))[2]
    for number in range(1, int(count) + 1):
        name = f"{stem}-{number:05d}-of-{count}{suffix}"
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing beside {next(iter(found))}; download it again")
    return [folder / f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 (hex) over names and whole contents, whatever their order.

    All bytes count, so that no edit goes unseen; at about 1.8 GB/s a core a 16 GB checkpoint takes some 9 s of CPU,
    little beside compiling it.
    """

    def digest(file: Path) -> str:
        state, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        with file.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                state.update(buffer[:size])
        return state.hexdigest()

    named = sorted(files)
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(pool.map(digest, (file for _, file in named)))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    total = hashlib.sha256()
    for (name, _), value in zip(named, digests, strict=True):
        total.update(f"{name}\0{value}\n".encode())
    return total.hexdigest()


class Checkpoint:
    """Config, tensor headers and lazy tensors of one folder.

    Tensors are named as the files name them; those of a sub-folder (AuroraCap's ``visual_encoder`` and ``projector``,
    a vision tower folder that ``mm_vision_tower`` names) have the folder in front: ``visual_encoder/vision_model...``.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the config and every tensor's header.

        Raises CheckpointError for a path that is not a folder, a config or weight file that is missing, truncated or
        malformed, and a pickle that holds anything else than tensors.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give the folder of a downloaded checkpoint")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; it is not a checkpoint folder")
        config = read_json(path / "config.json")
        files = weight_files(path)
        if not files:
            raise CheckpointError(f"{path} has no model weights (model*.safetensors or pytorch_model*.bin)")
        tensors: dict[str, TensorInfo] = {}
        # Earlier files win: the shards' copy of a tower is the trained one.
        for file in [*files, *(path / name for name in _BESIDE if (path / name).is_file())]:
            for name, info in list_tensors(file).items():
                tensors.setdefault(name, info)
        for part in cls._part_names(path, config):
            for file in weight_files(path / part):
                tensors.update((f"{part}/{name}", info) for name, info in list_tensors(file).items())
        return cls(path, config, tensors)

    @staticmethod
    def _part_names(path: Path, config: dict[str, Any]) -> list[str]:
        tower = config.get("mm_vision_tower")
        names = [*_PARTS, tower] if isinstance(tower, str) and tower and Path(tower).name == tower else [*_PARTS]
        return [name for name in dict.fromkeys(names) if name not in (".", "..") and (path / name).is_dir()]

    @property
    def part_names(self) -> tuple[str, ...]:
        """Sub-folders that are part of the checkpoint."""
        return tuple(self._part_names(self.path, self.config))

    @property
    def tower_folder(self) -> str | None:
        """The sub-folder that ``mm_vision_tower`` names, None where that is a hub name."""
        name = self.config.get("mm_vision_tower")
        return name if name in self.part_names else None

    def tensor(self, name: str) -> Tensor:
        """One tensor's values in the file's dtype. It may be a view of the mapped file: do not write into it."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: the tensor {name} is missing")
        return read_tensor(info)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values (NaN counts as a difference)."""
        if self.tensors[first].shape != self.tensors[second].shape:
            return False
        return torch.equal(self.tensor(first).float(), self.tensor(second).float())

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder (``generation_config.json``, ``visual_encoder/config.json``), None if absent."""
        return read_json(self.path / name) if (self.path / name).is_file() else None

    def text(self, name: str) -> str | None:
        """A text file of the folder, None if absent."""
        if not (self.path / name).is_file():
            return None
        refuse_pointer(self.path / name)
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise CheckpointError(f"{self.path / name} is not readable text") from None

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides what the captioner computes: weights, configs, tokenizer."""
        folders = ["", *(f"{part}/" for part in self.part_names)]
        settings = [f"{folder}{name}" for folder in folders for name in _SETTINGS]
        if not (self.path / "tokenizer.json").is_file():
            settings += _TOKENIZER
        files = {name: self.path / name for name in settings if (self.path / name).is_file()}
        files.update((info.file.relative_to(self.path).as_posix(), info.file) for info in self.tensors.values())
        return hash_files(files.items())
