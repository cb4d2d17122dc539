"""Linear layers while a component is traced: each becomes what its rule in the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...contract.formats import FORMATS, LAYOUTS, Layout, Rule

#: Makes the module that takes the place of a linear layer, of the layer, the block size and the type of its inputs.
Lowering = Callable[[nn.Linear, "int | None", torch.dtype], nn.Module]


@dataclass(frozen=True)
class Stored:
    """How the weight of a layer is stored: ``layout`` names the tensors, ``block_size`` is that of their scales."""

    layout: Layout
    block_size: int | None = None


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored as the tensors of a layout. Subclasses emit the operators."""

    def __init__(self, layout: str, block_size: int | None = None) -> None:
        super().__init__()
        self.stored = Stored(LAYOUTS[layout], block_size)

    def hold(self, tensor: str, dtype: torch.dtype, *shape: int) -> None:
        """Register a tensor of the layout, without memory."""
        assert tensor in self.stored.layout.tensors
        with torch.device("meta"):
            self.register_buffer(tensor, torch.empty(shape, dtype=dtype))


def stored_layers(module: nn.Module) -> dict[str, Stored]:
    """How each quantized layer of a lowered component is stored, by each of its names."""
    return {
        name: layer.stored
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, QuantizedLinear)
    }


class Matmuls:
    """Lowers linear layers by their rules. A layer is known by identity: modules move while they are lowered."""

    def __init__(self, lowerings: Mapping[str, Lowering], rules: Mapping[nn.Linear, Rule], dtype: torch.dtype) -> None:
        self._lowerings, self._rules, self._dtype = lowerings, rules, dtype

    def __call__(self, *layers: nn.Linear) -> nn.Module:
        """What takes the place of a linear layer, or of several with the same input (``joinable``), as one.

        The outputs of several lie one behind the other. A joined layer is on the meta device: its weights are read
        later, by name.
        """
        rule = self._rules[layers[0]]
        return self._lowerings[rule.format](_joined(layers), rule.block_size, self._dtype)

    def joinable(self, *layers: nn.Linear) -> bool:
        """Whether the layers can be one: their formats are the same, and it is not float32, where nothing is gained."""
        formats = {(self._rules[layer].format, self._rules[layer].block_size) for layer in layers}
        return len(formats) == 1 and FORMATS[next(iter(formats))[0]].dtype != "float32"

    def inside(self, module: nn.Module) -> nn.Module:
        """The module itself, its own linear layers replaced."""
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, self(child))
        return module


def _joined(layers: tuple[nn.Linear, ...]) -> nn.Linear:
    if len(layers) == 1:
        return layers[0]
    outputs = sum(layer.out_features for layer in layers)
    return nn.Linear(layers[0].in_features, outputs, bias=layers[0].bias is not None, device="meta")
