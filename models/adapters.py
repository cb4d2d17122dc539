"""LoRA adapters in the PEFT layout, merged in float32 as each tensor is read.

An aligned model (SynPO, LeanPO, a VideoLLaMA2 fine-tune) is delivered as ``adapter_config.json``,
``adapter_model.safetensors`` or ``.bin``, and for VideoLLaMA2 ``non_lora_trainables.bin`` with whole replacement
tensors (VideoLLaMA2 ``model/__init__.py``; PEFT ``tuners/lora``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .bounded import run_bounded
from .checkpoint import hash_files
from .fields import Fields, shown
from .tensor_files import TensorInfo, list_tensors, read_json, read_tensor

_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
#: Options of PEFT that change the computation in ways that are not merged here, with the value that means "off".
_REFUSED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "arrow_config": None,
}
#: What alpha may be, and a rank; published adapters have 1 to 2048.
_ALPHA = (1e-6, 1e6)
#: Values of PEFT's ``init_lora_weights`` that leave the base as it is. PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA take a
#: part out of it when training begins, and the checkpoint still has that part (PEFT ``tuners/lora/config.py``).
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """``scale * B @ A`` is added to a weight; A and B by their names in ``adapter_model``."""

    a: str
    b: str
    scale: float


class Adapter:
    """What an adapter folder does to the tensors of its base, by the base checkpoint's tensor names."""

    def __init__(
        self,
        path: Path,
        files: tuple[Path, ...],
        tensors: Mapping[str, TensorInfo],
        low_rank: dict[str, LowRank],
        replaced: dict[str, str],
        model_type: str | None,
    ) -> None:
        self.path = path
        self.files = files
        self.tensors = tensors
        self.low_rank = low_rank
        self.replaced = replaced
        self.model_type = model_type

    @classmethod
    def open(cls, path: str | Path) -> Adapter:
        """Read an adapter folder's settings and tensor headers.

        Raises CheckpointError for what is not a LoRA adapter, for options that cannot be merged into the weights, and
        for tensors whose names or shapes do not belong to one.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give the folder of a LoRA adapter")
        settings = path / "adapter_config.json"
        if not settings.is_file():
            raise CheckpointError(f"{path} has no adapter_config.json; it is not a PEFT adapter")
        fields = Fields(read_json(settings), str(settings))
        _check_kind(fields)
        weights = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        weights = [file for file in weights if file.is_file()][:1]
        if not weights:
            raise CheckpointError(f"{path} has no adapter_model.safetensors or adapter_model.bin")
        tensors = list_tensors(weights[0])
        low_rank, replaced = _read_names(fields, tensors)
        if not low_rank:
            raise CheckpointError(f"{weights[0]} holds no LoRA tensors (lora_A, lora_B)")
        whole = path / "non_lora_trainables.bin"
        if whole.is_file():
            extra = list_tensors(whole)
            tensors = {**tensors, **extra}
            replaced.update(_trainable_names(extra))
            weights.append(whole)
        own = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        return cls(path, (settings, *weights), tensors, low_rank, replaced, own.get("model_type"))

    def check(self, base: Mapping[str, TensorInfo], model_type: str | None) -> None:
        """Raise CheckpointError unless every tensor that the adapter touches is in ``base`` with a fitting shape."""
        if self.model_type is not None and self.model_type != model_type:
            raise CheckpointError(
                f"{self.path} was trained on a {self.model_type} model, but the checkpoint is {model_type}"
            )
        wanted = {target: self.tensors[name].shape for target, name in self.replaced.items()}
        for target, part in self.low_rank.items():
            wanted[target] = (self.tensors[part.b].shape[0], self.tensors[part.a].shape[1])
        for target, shape in wanted.items():
            info = base.get(target)
            if info is None:
                raise CheckpointError(
                    f"{self.path} changes {target}, which the checkpoint does not have: another base?"
                )
            if info.shape != shape:
                raise CheckpointError(
                    f"{self.path} changes {target} as {list(shape)}, but it is {list(info.shape)} in the checkpoint: "
                    "another base?"
                )

    def touches(self, name: str) -> bool:
        """Whether the adapter changes the base tensor ``name``."""
        return name in self.low_rank or name in self.replaced

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` as the adapter leaves it: float32 where it is changed, as given where it is not.

        Replacement comes before the low-rank sum, as the reference loads ``non_lora_trainables`` first.
        """
        if name in self.replaced:
            weight = self._read(self.replaced[name])
        part = self.low_rank.get(name)
        if part is not None:
            weight = weight + part.scale * (self._read(part.b) @ self._read(part.a))
        return weight

    def fingerprint(self) -> str:
        """sha256 (hex) of the adapter's settings and weights."""
        return hash_files((file.name, file) for file in self.files)

    def _read(self, name: str) -> Tensor:
        return read_tensor(self.tensors[name]).to(torch.float32)


def _check_kind(fields: Fields) -> None:
    kind = fields.text("peft_type")
    if kind.upper() != "LORA":
        raise CheckpointError(f"{fields.where}: peft_type {kind} is not supported, only LORA")
    for option, off in _REFUSED.items():
        if fields.get(option, off) not in (off, None, [], {}):
            raise CheckpointError(f"{fields.where}: {option} is switched on; such an adapter cannot be merged here")
    initial = fields.get("init_lora_weights", True)
    if not any(initial is known or (isinstance(known, str) and initial == known) for known in _INITIAL):
        raise CheckpointError(
            f"{fields.where}: init_lora_weights is {shown(initial)}, so the adapter may belong to a base that its "
            "training changed, not to this checkpoint; save it with PEFT's path_initial_model_for_weight_conversion"
        )


def _read_names(fields: Fields, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Low-rank pairs and whole replacements, by base tensor name."""
    sides: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in tensors:
        short = name.removeprefix("base_model.model.")
        match = _LORA_NAME.fullmatch(short)
        if match is not None:
            sides.setdefault(match["module"], {})[match["side"]] = name
        elif "lora_" in short:
            raise CheckpointError(f"{fields.where}: the adapter tensor {name} is of a kind that cannot be merged here")
        else:
            # modules_to_save: a whole layer, trained beside the adapter.
            replaced[re.sub(r"\.modules_to_save(\.default)?\.", ".", short)] = name
    low_rank = {}
    ranks = _by_pattern(fields, "rank_pattern", sides, fields.integer("r"))
    alphas = _by_pattern(fields, "alpha_pattern", sides, fields.number("lora_alpha", 8, *_ALPHA))
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{fields.where}: {module} has lora_{'/'.join(pair)} only, its other half is missing")
        a, b = tensors[pair["A"]].shape, tensors[pair["B"]].shape
        rank = ranks[module]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise CheckpointError(
                f"{fields.where}: the LoRA pair of {module} is {list(b)} x {list(a)}, but its rank is said to be {rank}"
            )
        rank_root = math.sqrt(rank) if fields.flag("use_rslora", False) else rank
        low_rank[f"{module}.weight"] = LowRank(pair["A"], pair["B"], alphas[module] / rank_root)
    return low_rank, replaced


def _by_pattern(fields: Fields, option: str, modules: Collection[str], default: float) -> dict[str, float]:
    """The value for each module by PEFT's rule: the first key that, as a regular expression, is the module name or ends
    it after a dot."""
    patterns = fields.get(option) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{fields.where}: {option} is not an object")
    for key, value in patterns.items():
        if type(value) not in (int, float) or not _ALPHA[0] <= value <= _ALPHA[1]:
            raise CheckpointError(f"{fields.where}: {option} gives {shown(key)} the value {shown(value)}")
    names, keys = list(modules), list(patterns)
    places: list[int | None] = [None] * len(names)
    # Plain names, which most keys are, need no process of their own.
    if all(re.fullmatch(r"[\w.]*", key) for key in keys):
        plain = [re.compile(rf"(.*\.)?({key})") for key in keys]
        places = [next((i for i, each in enumerate(plain) if each.fullmatch(name)), None) for name in names]
    elif keys:
        places = run_bounded("match", {"patterns": keys, "names": names}, f"{fields.where}: {option}")
    return {
        name: default if place is None else patterns[keys[place]] for name, place in zip(names, places, strict=True)
    }


def _trainable_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Base names of ``non_lora_trainables.bin``: the wrappers' prefixes are stripped as the reference strips them."""
    short = {name.removeprefix("base_model."): name for name in tensors}
    if any(name.startswith("model.model.") for name in short):
        short = {name.removeprefix("model."): original for name, original in short.items()}
    return short
