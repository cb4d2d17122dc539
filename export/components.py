"""The components of a captioner as graphs: how each is lowered, called while it is traced, and named at its door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.config import CaptionerConfig
from ..models.decoder import Decoder, RMSNorm
from .dialects import ort
from .targets import Target
from .trace import Signature, TracedGraph, trace


@dataclass(frozen=True)
class ComponentGraph:
    """One traced component: its graph, the format of its weights and the number of its parameters."""

    name: str
    traced: TracedGraph
    weights: str
    parameters: int


class _DecoderGraph(nn.Module):
    """The decoder with its cache as flat graph outputs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs_embeds: Tensor, lengths: Tensor, total_length: Tensor, logits_index: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        logits, present = self.decoder(inputs_embeds, lengths, total_length, logits_index, pairs)
        return (logits, *(tensor for pair in present for tensor in pair))


def vision_signature(config: CaptionerConfig) -> Signature:
    """``pixel_values [N, 3, S, S]`` to ``features [N, P, D]``, any number of frames."""
    size = config.vision.image_size
    return Signature((torch.zeros(2, 3, size, size),), ({0: "frames"},), ("pixel_values",), ("features",))


def connector_signature(config: CaptionerConfig, tokens_per_frame: int) -> Signature:
    """``features [T, P, D]`` to ``visual_tokens [blocks, tokens, H]``; T varies where frames do not mix."""
    connector = config.connector
    axes = {0: "frames"} if connector.per_frame else {}
    example = torch.zeros(connector.num_frames, tokens_per_frame, connector.in_size)
    return Signature((example,), (axes,), ("features",), ("visual_tokens",))


def audio_signature(config: CaptionerConfig) -> Signature:
    """``fbank [1, frames, mel]`` to ``audio_tokens [1, tokens, H]``."""
    assert config.audio is not None
    example = torch.zeros(1, config.audio.num_frames, config.audio.num_mel_bins)
    return Signature((example,), ({},), ("fbank",), ("audio_tokens",))


def decoder_signature(config: CaptionerConfig) -> Signature:
    """New tokens and the static cache in; logits of the asked positions and the cache out (see ``Decoder``)."""
    decoder = config.decoder
    # Example sizes differ from each other and from 0 and 1, which torch.export would take for constants.
    rows, length, max_length, asked = 2, 5, 16, 3
    cache = (rows, decoder.num_kv_heads, max_length, decoder.head_dim)
    arguments = (
        torch.zeros(rows, length, decoder.hidden_size),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(rows, asked, dtype=torch.int64),
        [torch.zeros(cache) for _ in range(2 * decoder.num_layers)],
    )
    axes = (
        {0: "rows", 1: "length"},
        {0: "rows"},
        {},
        {0: "rows", 1: "asked"},
        [{0: "rows", 2: "max_length"}] * (2 * decoder.num_layers),
    )
    layers = range(decoder.num_layers)
    past = [f"past.{i}.{part}" for i in layers for part in ("key", "value")]
    present = [f"present.{i}.{part}" for i in layers for part in ("key", "value")]
    return Signature(
        arguments,
        axes,
        ("inputs_embeds", "lengths", "total_length", "logits_index", *past),
        ("logits", *present),
    )


def lower(module: nn.Module, rules: dict[type[nn.Module], Callable[[nn.Module], nn.Module]]) -> nn.Module:
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

    ``weights`` ``"int4"`` turns the linear layers of the decoder into MatMulNBits; the other components stay fp32.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    rules: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {RMSNorm: ort.RMSNormalization}  # type: ignore[dict-item]
    if weights == "int4":
        rules[nn.Linear] = lambda linear: ort.MatMulNBits(linear, target.block_size)  # type: ignore[arg-type]
    lowered = lower(module, rules)
    if isinstance(lowered, Decoder):
        lowered = _DecoderGraph(lowered)
    traced = trace(lowered, signature, ort.OrtAttention(), ort.OPSET)
    if isinstance(lowered, _DecoderGraph):
        for weight in traced.weights.values():
            weight.entry = weight.entry.removeprefix("decoder.")
    return ComponentGraph(name, traced, weights, parameters)
