"""The components of a captioner as graphs: how each is lowered, called while it is traced, and named at its door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.config import AudioConfig, ConnectorConfig, DecoderConfig, VisionConfig
from ..models.decoder import Decoder, RMSNorm
from .dialects import ort
from .targets import Target
from .trace import Signature, TracedGraph, trace


@dataclass(frozen=True)
class ComponentGraph:
    """One traced component: its graph, the format of its weights and the number of its parameters.

    The entries of ``traced.weights`` are those of the component's own state dict, where a layer that was lowered to
    int4 has ``qweight`` and ``scales`` in place of ``weight``.
    """

    name: str
    traced: TracedGraph
    weights: str
    parameters: int


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
    """``features [T, P, D]`` to ``visual_tokens [blocks, tokens, H]``; T varies where frames do not mix."""
    axes = {0: "frames"} if config.per_frame else {}
    example = torch.zeros(config.num_frames, tokens_per_frame, config.in_size)
    return Signature((example,), (axes,), ("features",), ("visual_tokens",))


def audio_signature(config: AudioConfig) -> Signature:
    """``fbank [1, frames, mel]`` to ``audio_tokens [1, tokens, H]``."""
    example = torch.zeros(1, config.num_frames, config.num_mel_bins)
    return Signature((example,), ({},), ("fbank",), ("audio_tokens",))


def decoder_signature(config: DecoderConfig) -> Signature:
    """New tokens and the static cache in; logits of the asked positions and the cache out (see ``Decoder``)."""
    # Example sizes differ from each other and from 0 and 1, which torch.export would take for constants.
    rows, length, max_length, asked = 2, 5, 16, 3
    cache = (rows, config.num_kv_heads, max_length, config.head_dim)
    arguments = (
        torch.zeros(rows, length, config.hidden_size),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(rows, asked, dtype=torch.int64),
        [torch.zeros(cache) for _ in range(2 * config.num_layers)],
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


#: What stands in for a module of a type while it is traced.
Rules = Mapping[type[nn.Module], Callable[..., nn.Module]]


def lower(module: nn.Module, rules: Rules) -> nn.Module:
    """Replace every submodule whose exact type has a rule, in place; returns the module."""
    for name, child in list(module.named_children()):
        rule = rules.get(type(child))
        if rule is not None:
            setattr(module, name, rule(child))
        else:
            lower(child, rules)
    return module


def component_graph(name: str, module: nn.Module, signature: Signature, target: Target, weights: str) -> ComponentGraph:
    """Lower a component (on the meta device) to the target's dialect and trace it.

    ``weights`` ``"int4"`` turns its linear layers into MatMulNBits. The module is not usable afterwards.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    rules: dict[type[nn.Module], Callable[..., nn.Module]] = {RMSNorm: ort.RMSNormalization}
    if weights == "int4":
        rules[nn.Linear] = lambda linear: ort.MatMulNBits(linear, target.block_size)
    lowered = lower(module, rules)
    if not isinstance(lowered, Decoder):
        return ComponentGraph(name, trace(lowered, signature, ort.OrtAttention(), ort.OPSET), weights, parameters)
    traced = trace(_DecoderGraph(lowered), signature, ort.OrtAttention(), ort.OPSET)
    entries = {
        initializer: replace(weight, entry=weight.entry.removeprefix("decoder."))
        for initializer, weight in traced.weights.items()
    }
    return ComponentGraph(name, TracedGraph(traced.model, entries), weights, parameters)
