"""The components of a captioner as graphs: how each is lowered, called while it is traced, and named at its door."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibration.recipe import component_rules
from ..contract.formats import Rule
from ..models import CaptionerCheckpoint
from ..models.config import AudioConfig, ConnectorConfig, DecoderConfig, VisionConfig
from ..models.connectors import SpatialTemporalConnector
from ..models.decoder import Decoder
from .dialects.forms import DIALECTS, Replacements, form_of
from .dialects.layers import Stored, stored_layers
from .targets import Target, matmul_dtype
from .trace import Signature, TracedGraph, trace


@dataclass(frozen=True)
class ComponentGraph:
    """One traced component: its graph, the format of its weights and the number of its parameters.

    The entries of ``traced.weights`` are those of the state dict of the checkpoint's component ``source`` (the
    connector becomes two graphs), where a quantized layer has the tensors of its layout in place of ``weight``.
    ``stored`` has the quantized layers by name.
    """

    name: str
    traced: TracedGraph
    weights: str
    parameters: int
    source: str
    stored: Mapping[str, Stored]


@dataclass(frozen=True)
class Part:
    """A component to be traced: a module on the meta device, how it is called, and where its weights come from."""

    name: str
    source: str
    module: nn.Module
    signature: Signature


class _DecoderGraph(nn.Module):
    """The decoder with its cache as flat graph inputs and outputs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs_embeds: Tensor, lengths: Tensor, total_length: Tensor, logits_index: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        logits, present = self.decoder(inputs_embeds, lengths, total_length, logits_index, pairs)
        return (logits, *(tensor for pair in present for tensor in pair))


def vision_signature(config: VisionConfig) -> Signature:
    """``pixel_values [N, 3, S, S]`` to ``features [N, P, D]``, any number of frames."""
    size = config.image_size
    return Signature((torch.zeros(2, 3, size, size),), ({0: "frames"},), ("pixel_values",), ("features",))


def connector_signature(config: ConnectorConfig, tokens_per_frame: int) -> Signature:
    """``features [T, P, D]`` to ``visual_tokens [blocks, tokens, H]``, any T.

    P varies too where each frame is a block, so that one graph serves every ratio of merging.
    """
    axes = {0: "frames", 1: "tokens"} if config.per_frame else {0: "frames"}
    # Example sizes above 1: torch.export would take a 1 for a constant.
    example = torch.zeros(max(2, config.num_frames), max(2, tokens_per_frame), config.in_size)
    return Signature((example,), (axes,), ("features",), ("visual_tokens",))


def frame_connector_signature(config: ConnectorConfig, tokens_per_frame: int) -> Signature:
    """``features [T, P, D]`` to ``frame_tokens [T, P, C]``, any T."""
    example = torch.zeros(2, tokens_per_frame, config.in_size)
    return Signature((example,), ({0: "frames"},), ("features",), ("frame_tokens",))


def slot_signature(config: ConnectorConfig, tokens_per_frame: int, time_kernel: int) -> Signature:
    """``windows [S, kt, P, C]`` to ``visual_tokens [S, tokens, H]``, any S."""
    example = torch.zeros(2, time_kernel, tokens_per_frame, config.out_size)
    return Signature((example,), ({0: "slots"},), ("windows",), ("visual_tokens",))


def audio_signature(config: AudioConfig) -> Signature:
    """``fbank [1, frames, mel]`` to ``audio_tokens [1, tokens, H]``."""
    example = torch.zeros(1, config.num_frames, config.num_mel_bins)
    return Signature((example,), ({},), ("fbank",), ("audio_tokens",))


def decoder_signature(config: DecoderConfig, cache_dtype: torch.dtype = torch.float32) -> Signature:
    """New tokens and the static cache in; logits of the asked positions and the cache out (see ``Decoder``).

    Embeddings and logits are float32, the cache is ``cache_dtype``.
    """
    # Example sizes differ from each other and from 0 and 1, which torch.export would take for constants.
    rows, length, max_length, asked = 2, 5, 16, 3
    cache = (rows, config.num_kv_heads, max_length, config.head_dim)
    arguments = (
        torch.zeros(rows, length, config.hidden_size),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(rows, asked, dtype=torch.int64),
        [torch.zeros(cache, dtype=cache_dtype) for _ in range(2 * config.num_layers)],
    )
    axes = (
        {0: "rows", 1: "length"},
        {0: "rows"},
        {},
        {0: "rows", 1: "asked"},
        [{0: "rows", 2: "max_length"}] * (2 * config.num_layers),
    )
    parts = [f"{layer}.{part}" for layer in range(config.num_layers) for part in ("key", "value")]
    return Signature(
        arguments,
        axes,
        ("inputs_embeds", "lengths", "total_length", "logits_index", *(f"past.{part}" for part in parts)),
        ("logits", *(f"present.{part}" for part in parts)),
    )


def captioner_parts(
    source: CaptionerCheckpoint, tokens_per_frame: int, cache_dtype: torch.dtype = torch.float32
) -> Iterator[Part]:
    """The components of a captioner in the order in which data passes them; the tower gives ``tokens_per_frame``."""
    config = source.config
    yield Part("vision", "vision", source.module("vision"), vision_signature(config.vision))
    connector, spec = source.module("connector"), config.connector
    if not isinstance(connector, SpatialTemporalConnector):
        yield Part("connector", "connector", connector, connector_signature(spec, tokens_per_frame))
    else:
        framewise = connector.frame_part()
        if framewise is not None:
            signature = frame_connector_signature(spec, tokens_per_frame)
            yield Part("frame_connector", "connector", framewise, signature)
        signature = slot_signature(spec, tokens_per_frame, connector.time_kernel)
        yield Part("connector", "connector", connector.slot_part(), signature)
    if config.audio is not None:
        yield Part("audio", "audio", source.module("audio"), audio_signature(config.audio))
    yield Part("decoder", "decoder", source.module("decoder"), decoder_signature(config.decoder, cache_dtype))


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
    source: str | None = None,
    recipe: Sequence[Rule] | None = None,
) -> ComponentGraph:
    """Lower a component (on the meta device) to the target's dialect and trace it.

    ``weights`` is the format of the component. ``source``: the checkpoint's component that the weights are of, where
    its name is another. ``recipe``: the format of each linear layer, the component's default when ``None``. The module
    is not usable afterwards.
    """
    source = name if source is None else source
    parameters = sum(parameter.numel() for parameter in module.parameters())
    recipe = component_rules(source, module, target, weights) if recipe is None else recipe
    dialect, form = DIALECTS[target.dialect], form_of(module, source, recipe, matmul_dtype(target, weights))
    lowered = lower(module, dialect.replacements(form))
    stored = stored_layers(lowered)
    is_decoder = isinstance(lowered, Decoder)
    called = _DecoderGraph(lowered) if is_decoder else lowered
    traced = trace(called, signature, dialect.attention(form.dtype), dialect.opset)
    dialect.finish(traced, form, is_decoder)
    _drop_unused_inputs(traced)
    if not is_decoder:
        return ComponentGraph(name, traced, weights, parameters, source, stored)
    entries = {
        initializer: replace(weight, entry=weight.entry.removeprefix("decoder."))
        for initializer, weight in traced.weights.items()
    }
    return ComponentGraph(name, TracedGraph(traced.model, entries), weights, parameters, source, stored)


def _drop_unused_inputs(graph: TracedGraph) -> None:
    """Remove inputs that the dialect does not use (``total_length`` where the mask is explicit)."""
    inputs = graph.model.graph.inputs
    for value in list(inputs):
        if not value.uses() and not value.is_graph_output():
            inputs.remove(value)
