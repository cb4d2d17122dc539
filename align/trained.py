"""The tensors that a preference training changes, and the adapter that they become."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonpath
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..contract.pipeline import PIXELS, SOUND
from ..errors import OptionError
from .files import write_whole
from .policy import Policy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What SynPO trains (train_synpo.py): every linear layer of the decoder."""
_BASE = "base_model.model."


class Trained:
    """PEFT's layers in a policy's decoder, and where ``connector_rate`` says so all that is between towers and decoder.

    Tensors go by PEFT's names over the released layout's. Raises ``OptionError`` where PEFT is not installed, and for
    a policy that has such layers already.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        learning_rate: float,
        connector_rate: float,
    ) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise OptionError(f"tuning needs PEFT (pip install 'intertitle[align]'): {error}") from None
        whole = _behind_towers(policy) if connector_rate else {}
        # Views of the parameters, in the released layout's shapes: what is copied into them is trained on.
        views = {
            component: policy.opened.to_checkpoint(component, {name: tensor.data for name, tensor in part.items()})
            for component, part in whole.items()
        }
        self._config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float is as good, PEFT's annotation is narrower
            lora_dropout=dropout,
            target_modules=list(TARGETS),
            modules_to_save=_modules(views.values()) if whole else None,
            task_type="CAUSAL_LM",
        )
        decoder = policy.decoder
        if any(isinstance(module, LoraLayer) for module in decoder.modules()):
            raise OptionError("the policy has been tuned already: open a new one")
        policy.requires_grad_(False)
        inject_adapter_in_model(self._config, decoder)
        self._rates = (learning_rate, connector_rate)
        self._layers = {name: module for name, module in decoder.named_modules() if isinstance(module, LoraLayer)}
        self._low_rank: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            released = next(iter(policy.opened.to_checkpoint("decoder", {f"{name}.weight": layer.weight})))
            module = f"{_BASE}{released.removesuffix('.weight')}"
            for side, part in (("A", layer.lora_A), ("B", layer.lora_B)):
                self._low_rank[f"{module}.lora_{side}.weight"] = part.get_parameter("default.weight")
        self._whole = [parameter.requires_grad_() for part in whole.values() for parameter in part.values()]
        self._before = [parameter.detach().clone() for parameter in self._whole]
        self._tensors = {name: tensor.data for name, tensor in self._low_rank.items()}
        for part in views.values():
            self._tensors |= {f"{_BASE}{name}": view for name, view in part.items()}

    @property
    def parameters(self) -> list[Tensor]:
        return [*self._low_rank.values(), *self._whole]

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        parts = (list(self._low_rank.values()), self._whole)
        return [{"params": part, "lr": rate} for part, rate in zip(parts, self._rates, strict=True) if part]

    def state(self) -> dict[str, Tensor]:
        """Every trained tensor by its name in the adapter; changes with the training."""
        return self._tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The policy as it was before the training, in a block that computes no gradients."""
        now = [parameter.detach().clone() for parameter in self._whole]
        self._switch(False, self._before)
        try:
            yield
        finally:
            self._switch(True, now)

    def _switch(self, adapters: bool, whole: Sequence[Tensor]) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(adapters)
        for parameter, value in zip(self._whole, whole, strict=True):
            parameter.data.copy_(value)

    def write(self, weights: Path) -> None:
        """``adapter_config.json`` and, last, the weights: a folder that has them is finished."""
        settings = self._config.to_dict() | {"target_modules": sorted(TARGETS)}
        settings |= {"base_model_name_or_path": None, "inference_mode": True}
        text = json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
        write_whole(weights.with_name("adapter_config.json"), lambda path: path.write_text(text))
        tensors = {name: tensor.contiguous() for name, tensor in self.state().items()}
        write_whole(weights, lambda path: save_file(tensors, path, {"format": "pt"}))


def _behind_towers(policy: Policy) -> dict[str, dict[str, Tensor]]:
    """What stands between the towers and the decoder, by component and the name in it: all of a stage that takes what
    another one gives, and the projector in a stage that has its tower in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for part in policy.config.parts:
        name = part.stage.name
        own: dict[str, Tensor] = {**dict(policy.stages[name].named_parameters())}
        if any(value.source in (PIXELS, SOUND) for value in part.stage.inputs):
            own = {entry: tensor for entry, tensor in own.items() if entry.startswith("projector.")}
        if own:
            found[name] = own
    return found


def _modules(components: Iterable[Iterable[str]]) -> list[str]:
    """What PEFT calls the modules that hold each component's tensors: the last word of the longest name that all of
    them begin with (``mm_projector``). A module inside of another one is left out."""
    roots = {commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]) for names in components}
    outer = [root for root in roots if not any(root.startswith(f"{other}/") for other in roots)]
    return sorted(root.rpartition("/")[2] for root in outer)
