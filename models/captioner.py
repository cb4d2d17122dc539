"""A checkpoint as a captioner: its config, its modules, and their weights one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OptionError
from .adapters import Adapter
from .checkpoint import Checkpoint
from .config import CaptionerConfig
from .decoder import Decoder
from .families import FAMILIES, find_family
from .sources import Source
from .stages import on_meta


def open_checkpoint(
    path: str | Path, adapter: str | Path | None = None, keep: float | None = None
) -> CaptionerCheckpoint:
    """Open a checkpoint folder in a released layout, with a LoRA adapter folder merged in if given.

    ``keep``: the share of visual tokens that a tower with merging (AuroraCap's) keeps. Reads configs and tensor
    headers, no weights.
    Raises CheckpointError (see ``CaptionerCheckpoint.validate``) and OptionError for a ``keep`` that cannot be.
    """
    checkpoint = Checkpoint.open(path)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    if keep is not None:
        config = config.keeping(keep)
    opened = CaptionerCheckpoint(checkpoint, config, None if adapter is None else Adapter.open(adapter))
    opened.validate()
    return opened


class CaptionerCheckpoint:
    """One captioner on disk. Its components are the stages of its pipeline and ``decoder``."""

    def __init__(self, checkpoint: Checkpoint, config: CaptionerConfig, adapter: Adapter | None = None) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.adapter = adapter
        self._builders: dict[str, Callable[[], nn.Module]] = {
            part.stage.name: partial(part.build, part.config) for part in config.parts
        }
        self._builders["decoder"] = partial(Decoder, config.decoder)
        shapes = {
            name: {entry: tuple(value.shape) for entry, value in self.module(name).state_dict().items()}
            for name in self._builders
        }
        self._translation = FAMILIES[config.family].translate(checkpoint, config, shapes)

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.path

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the order in which data passes them."""
        return tuple(self._builders)

    def module(self, component: str) -> nn.Module:
        """The component on the meta device (no memory), in eval mode, without gradients."""
        return on_meta(self._builders[component])

    def tensor(self, component: str, name: str) -> Tensor:
        """One entry of ``module(component).state_dict()``, translated and with the adapter merged.

        In the checkpoint's dtype, or float32 where it was merged or folded. It may be a view of the mapped file: do not
        write into it. Raises CheckpointError naming the checkpoint's tensor when that has a NaN or an infinity.
        """
        return self._build(self._translation.sources[component][name])

    def load(self, component: str) -> nn.Module:
        """The component with its weights in float32, in eval mode, without gradients."""
        module = self.module(component)
        state = {name: self.tensor(component, name).to(torch.float32).contiguous() for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)

    def embedding(self) -> Tensor:
        """The embedding table ``[vocabulary or more, hidden]``; dtype and errors as for ``tensor``.

        Rows behind the vocabulary are learned vectors of prompts (``contract.manifest.Embedding``).
        """
        return self._build(self._translation.sources["embedding"]["weight"])

    def to_checkpoint(self, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of ``module(component).state_dict()`` as tensors under the checkpoint's own names, copies included.

        ``component`` may be ``embedding`` with the entry ``weight``. Reading them gives the entries again. Raises
        OptionError where ``state`` has a part only of the entries that share a tensor.
        """
        sources = self._translation.sources[component]
        used = {name for entry in state for name in sources[entry].names}
        for entry, source in sources.items():
            if source.shared and entry not in state and used.intersection(source.names):
                raise OptionError(
                    f"{source.names[0]} holds {entry} beside other layers: they can only be written together"
                )
        tensors: dict[str, Tensor] = {}
        for entry, value in state.items():
            source = sources[entry]
            for name, part in zip(source.names, source.split(value), strict=True):
                tensors[name] = tensors[name] + part if source.shared and name in tensors else part
        copies = {copy: tensors[name] for copy, name in self._translation.duplicates.items() if name in tensors}
        return tensors | copies

    def fingerprint(self) -> str:
        """sha256 (hex) of the checkpoint's files, and of the adapter's where there is one."""
        own = self.checkpoint.fingerprint()
        if self.adapter is None:
            return own
        return hashlib.sha256(f"{own}\0{self.adapter.fingerprint()}".encode()).hexdigest()

    def validate(self) -> None:
        """Check names, shapes and dtypes of all tensors against what the modules need, and the adapter against them.

        Raises CheckpointError naming the first tensor that is missing, wrongly shaped, not floating point, unknown, or
        a second copy that differs from the one in use.
        """
        tensors, where = self.checkpoint.tensors, self.path
        used: set[str] = set()
        missing: list[str] = []
        for sources in self._translation.sources.values():
            for source in sources.values():
                for name, shape in zip(source.names, source.shapes, strict=True):
                    used.add(name)
                    info = tensors.get(name)
                    if info is None:
                        missing.append(name)
                    elif info.shape != shape:
                        raise CheckpointError(
                            f"{where}: the tensor {name} is {list(info.shape)}, but the config asks for {list(shape)}"
                        )
                    elif info.dtype is None or not info.dtype.is_floating_point:
                        raise CheckpointError(
                            f"{where}: the tensor {name} is not floating point; quantized checkpoints are not read"
                        )
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{where}: the tensor {missing[0]} is missing{more}")
        duplicates = self._translation.duplicates
        for name in tensors:
            if name not in used and name not in duplicates and not self._translation.is_dead(name):
                raise CheckpointError(f"{where}: the tensor {name} is not part of a {self.config.family} captioner")
        for name, original in duplicates.items():
            if not self.checkpoint.equal(name, original):
                raise CheckpointError(f"{where}: the tensor {name} should be a copy of {original} and differs")
        if self.adapter is not None:
            self.adapter.check(tensors, self.checkpoint.config.get("model_type"))

    def _build(self, source: Source) -> Tensor:
        return source.build(*(self._read(name) for name in source.names))

    def _read(self, name: str) -> Tensor:
        """One checkpoint tensor, checked, with the adapter merged."""
        weight = self.checkpoint.tensor(name)
        if not _is_finite(weight):
            raise CheckpointError(f"{self.path}: the tensor {name} holds NaN or infinite values")
        if self.adapter is None or not self.adapter.touches(name):
            return weight
        weight = self.adapter.merge(name, weight.to(torch.float32))
        if not _is_finite(weight):
            raise CheckpointError(f"{self.adapter.path}: merged into {name} it gives NaN or infinite values")
        return weight


def _is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. ``aminmax`` carries a NaN through and is some 40 times faster than ``isfinite``."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
