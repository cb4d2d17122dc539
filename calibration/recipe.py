"""A recipe decides the format of every linear layer, once: the exporter lowers by it, ``verify`` rounds by it.

It is an ordered list of rules (``contract.formats.Rule``) and is written into the bundle. The exceptions come first
(layers that stay unquantized), then one rule for all other layers of the component.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ..contract.formats import FORMATS, Rule, decide
from ..contract.manifest import Manifest
from ..contract.targets import Target, get_target
from ..models import CaptionerCheckpoint
from .formats import encoding

#: The component that ``--weights`` is about. All others are encoders.
DECODER = "decoder"


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a component by their names; a layer with two names has the first one."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def make_recipe(
    source: CaptionerCheckpoint, target: Target, weights: str, encoder_weights: str, block_size: int | None = None
) -> list[Rule]:
    """The recipe of a whole captioner for a target: the decoder in the format ``weights``, other components in
    ``encoder_weights``. ``block_size``: of the decoder's format, the target's default when ``None``."""
    recipe: list[Rule] = []
    for name in source.components:
        module = source.module(name)
        if name == DECODER:
            recipe += component_rules(name, module, target, weights, block_size)
        else:
            recipe += component_rules(name, module, target, encoder_weights)
    return recipe


def component_rules(
    component: str, module: nn.Module, target: Target, format: str, block_size: int | None = None
) -> list[Rule]:
    """The rules of one component (its module may be on the meta device) whose weights are of a format.

    If the format is quantized, a layer stays unquantized if its module names it in ``unquantized_layers``
    (squeeze-excite, which scales whole channels) or if the encoding does not take it (few weights, a width that blocks
    must divide and do not).
    """
    size = target.block_size(format) if block_size is None else block_size
    encoded = encoding(target.dialect, format)
    layers, kept = linear_layers(module), list[str]()
    if FORMATS[format].quantized:
        named = _named(module, "unquantized_layers")
        kept = [name for name, layer in layers.items() if name in named or not encoded.takes(layer, size)]
    plain, others = target.unquantized(format), [name for name in layers if name not in set(kept)]
    rules = [Rule(component=component, pattern=each, format=plain) for each in patterns(kept, others)]
    return [*rules, Rule(component=component, pattern="*", format=format, block_size=size)]


def patterns(chosen: Iterable[str], others: Sequence[str]) -> list[str]:
    """Few patterns of ``fnmatch`` that match all chosen names and none of the others.

    A number in a name becomes ``*`` where that matches none of the others.
    """
    found: list[str] = []
    for name in chosen:
        if any(fnmatchcase(name, pattern) for pattern in found):
            continue
        general = re.sub(r"\d+", "*", name)
        found.append(name if any(fnmatchcase(other, general) for other in others) else general)
    return found


def _named(module: nn.Module, attribute: str) -> set[str]:
    """The layers that some submodule names in an attribute, by their names in the whole."""
    return {
        f"{name}.{layer}" if name else layer
        for name, each in module.named_modules()
        for layer in getattr(each, attribute, ())
    }


@dataclass(frozen=True)
class Rounding:
    """How a bundle rounds the linear layers of a component of the checkpoint.

    ``dialect``: of its graphs, which decides the layouts. ``recipe``: at least the rules of that component.
    """

    dialect: str
    component: str
    recipe: tuple[Rule, ...]

    def apply(self, module: nn.Module) -> None:
        """Round the quantized layers of the component, in place. Layers in a float type are left as they are."""
        for name, layer in linear_layers(module).items():
            rule = decide(self.recipe, self.component, name)
            if FORMATS[rule.format].quantized:
                rounded = encoding(self.dialect, rule.format).round(layer.weight.data, rule.block_size)
                layer.weight.data = rounded


def roundings_of(dialect: str, recipe: Sequence[Rule]) -> Mapping[str, Rounding]:
    """The rounding of each component that has a quantized layer."""
    quantized = dict.fromkeys(rule.component for rule in recipe if FORMATS[rule.format].quantized)
    return {name: Rounding(dialect, name, tuple(recipe)) for name in quantized}


def stated_recipe(manifest: Manifest, source: CaptionerCheckpoint) -> list[Rule]:
    """The recipe by which a bundle of a checkpoint was compiled.

    An older bundle does not state it: it has the default one of its target and formats.
    """
    decoder = manifest.components[DECODER]
    encoders = next(part.weights for name, part in manifest.components.items() if name != DECODER)
    target = get_target(manifest.target)
    return manifest.recipe or make_recipe(source, target, decoder.weights, encoders, decoder.block_size)


def roundings(manifest: Manifest, source: CaptionerCheckpoint) -> Mapping[str, Rounding]:
    """The rounding in a bundle of each component of its checkpoint that has a quantized layer."""
    return roundings_of(manifest.dialect, stated_recipe(manifest, source))
