"""The components of a captioner as graphs: how each is lowered, called while it is traced, and named at its door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.recipe import component_rules
from ..contract.formats import Rule
from ..contract.pipeline import EachUnit, OneSound, Pipeline, Stage, Variant, WholeClip, Window
from ..contract.targets import Target
from ..models import CaptionerCheckpoint
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.stages import build_on_meta, meta_values
from .dialects.forms import DIALECTS, Replacements, form_of
from .dialects.layers import Stored, stored_layers
from .targets import matmul_dtype
from .trace import Signature, TracedGraph, trace


@dataclass(frozen=True)
class ComponentGraph:
    """One traced component: its graph, the format of its weights and the number of its parameters.

    The entries of ``traced.weights`` are those of the state dict of the checkpoint's component ``name``, where a
    quantized layer has the tensors of its layout in place of ``weight``. ``stored`` has the quantized layers by name.
    """

    name: str
    traced: TracedGraph
    weights: str
    parameters: int
    stored: Mapping[str, Stored]


@dataclass(frozen=True)
class Part:
    """A graph to be traced: a module of the component ``name`` on the meta device, and how it is called.

    ``beside``: the variant of the stage that it is, if it is not the component's own graph but stands beside it.
    """

    name: str
    module: nn.Module
    signature: Signature
    beside: Variant | None = None


class _DecoderGraph(nn.Module):
    """The decoder with its cache as flat graph inputs and outputs. Positions are places in the row."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs_embeds: Tensor, lengths: Tensor, total_length: Tensor, logits_index: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        return self._run(inputs_embeds, lengths, total_length, logits_index, past, None)

    def _run(
        self,
        inputs_embeds: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        position_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        logits, present = self.decoder(inputs_embeds, lengths, total_length, logits_index, pairs, position_ids)
        return (logits, *(tensor for pair in present for tensor in pair))


class _PositionedDecoderGraph(_DecoderGraph):
    """The same with positions as one more input."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        logits_index: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        return self._run(inputs_embeds, lengths, total_length, logits_index, past, position_ids)


_DECODER_GRAPHS = {"sequential": _DecoderGraph, "explicit": _PositionedDecoderGraph}


#: How the units of a stage lie in front of each of its inputs: the name of the leading axis (``None``: it is 1), and
#: example sizes for the given number of units. They are above 1: torch.export would take a 1 for a constant.
_LEADING: dict[type, Callable[[Any, int], tuple[str | None, list[int]]]] = {
    EachUnit: lambda unit, units: ("frames", [2]),
    Window: lambda unit, units: ("slots", [2, unit.kernel]),
    WholeClip: lambda unit, units: ("frames", [max(2, units)]),
    OneSound: lambda unit, units: (None, [1]),
}


def stage_signature(stage: Stage, pipeline: Pipeline, values: Mapping[str, Tensor]) -> Signature:
    """The inputs of a stage, and ``[units, tokens, width]`` out; ``values`` are as ``models.stages.meta_values`` gives.

    An input is ``[frames, ...]`` for each unit and for the whole clip, ``[slots, kernel, ...]`` for windows and
    ``[1, ...]`` for a sound, with any number of frames or slots; behind it stand the axes of one unit of its source
    (``[3, S, S]`` for pixels, ``[frames, mels]`` for sound, ``[tokens, width]`` for a stage). ``tokens`` varies where
    the source has variants with different numbers of tokens, so that one graph serves them all.
    """
    arguments, axes = [], []
    for value in stage.inputs:
        units = pipeline.units(value.source, pipeline.sampling.count)
        axis, sizes = _LEADING[type(stage.unit)](stage.unit, units)
        arguments.append(torch.zeros(*sizes, *values[value.source].shape[1:]))
        varying = {} if axis is None else {0: axis}
        if varies(pipeline, value.source):
            varying[len(sizes)] = "tokens"
        axes.append(varying)
    names = tuple(value.name for value in stage.inputs)
    return Signature(tuple(arguments), tuple(axes), names, (stage.output,))


def varies(pipeline: Pipeline, source: str) -> bool:
    """Whether the units of what a stage takes have another number of tokens in another variant."""
    return any(stage.name == source for stage in pipeline.stages) and len(pipeline.token_counts(source)) > 1


def decoder_signature(config: DecoderConfig, cache_dtype: torch.dtype = torch.float32) -> Signature:
    """New tokens and the static cache in; logits of the asked positions and the cache out (see ``Decoder``).

    Embeddings and logits are float32, the cache is ``cache_dtype``. Explicit positions are one more input.
    """
    # Example sizes differ from each other and from 0 and 1, which torch.export would take for constants.
    rows, length, max_length, asked = 2, 5, 16, 3
    cache = (rows, config.num_kv_heads, max_length, config.head_dim)
    given = ("position_ids",) if config.positions == "explicit" else ()
    arguments = (
        torch.zeros(rows, length, config.hidden_size),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(rows, asked, dtype=torch.int64),
        *(torch.zeros(rows, length, dtype=torch.int64) for _ in given),
        [torch.zeros(cache, dtype=cache_dtype) for _ in range(2 * config.num_layers)],
    )
    axes = (
        {0: "rows", 1: "length"},
        {0: "rows"},
        {},
        {0: "rows", 1: "asked"},
        *({0: "rows", 1: "length"} for _ in given),
        [{0: "rows", 2: "max_length"}] * (2 * config.num_layers),
    )
    parts = [f"{layer}.{part}" for layer in range(config.num_layers) for part in ("key", "value")]
    return Signature(
        arguments,
        axes,
        ("inputs_embeds", "lengths", "total_length", "logits_index", *given, *(f"past.{part}" for part in parts)),
        ("logits", *(f"present.{part}" for part in parts)),
    )


def captioner_parts(
    source: CaptionerCheckpoint, pipeline: Pipeline, cache_dtype: torch.dtype = torch.float32
) -> Iterator[Part]:
    """The graphs of a captioner in the order in which data passes them, a stage's variants one after the other.

    ``pipeline``: that of the checkpoint with its numbers of tokens (``models.stages.measured``).
    """
    config = source.config
    values = meta_values(config)
    for stage in pipeline.stages:
        signature = stage_signature(stage, pipeline, values)
        if not stage.variants:
            yield Part(stage.name, source.module(stage.name), signature)
        for place, variant in enumerate(stage.variants):
            form = config.keeping(variant.keep).part(stage.name)
            yield Part(stage.name, build_on_meta(form), signature, variant if place else None)
    yield Part("decoder", source.module("decoder"), decoder_signature(config.decoder, cache_dtype))


def lower(module: nn.Module, replacements: Replacements) -> nn.Module:
    """Replace every submodule whose exact type has a replacement, in place; returns the module."""
    for name, child in list(module.named_children()):
        replacement = replacements.get(type(child))
        if replacement is not None:
            setattr(module, name, replacement(child))
        else:
            lower(child, replacements)
    return module


def component_graph(
    name: str,
    module: nn.Module,
    signature: Signature,
    target: Target,
    weights: str,
    recipe: Sequence[Rule] | None = None,
) -> ComponentGraph:
    """Lower a component (on the meta device) to the target's dialect and trace it.

    ``weights`` is the format of the component. ``recipe``: the format of each linear layer, the component's default
    when ``None``. The module is not usable afterwards.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    recipe = component_rules(name, module, target, weights) if recipe is None else recipe
    dialect, form = DIALECTS[target.dialect], form_of(module, name, recipe, matmul_dtype(target, weights))
    lowered = lower(module, dialect.replacements(form))
    stored = stored_layers(lowered)
    is_decoder = isinstance(lowered, Decoder)
    called = _DECODER_GRAPHS[lowered.config.positions](lowered) if isinstance(lowered, Decoder) else lowered
    traced = trace(called, signature, dialect.attention(form.dtype), dialect.opset)
    dialect.finish(traced, form, is_decoder)
    _drop_unused_inputs(traced)
    if not is_decoder:
        return ComponentGraph(name, traced, weights, parameters, stored)
    entries = {
        initializer: replace(weight, entry=weight.entry.removeprefix("decoder."))
        for initializer, weight in traced.weights.items()
    }
    return ComponentGraph(name, TracedGraph(traced.model, entries), weights, parameters, stored)


def _drop_unused_inputs(graph: TracedGraph) -> None:
    """Remove inputs that the dialect does not use (``total_length`` where the mask is explicit)."""
    inputs = graph.model.graph.inputs
    for value in list(inputs):
        if not value.uses() and not value.is_graph_output():
            inputs.remove(value)
