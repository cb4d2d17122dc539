"""A record for each dialect of ONNX. The rest of the exporter finds it by the name that a target gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...calibration.quantize import FEW_WEIGHTS
from ...models.attention import Attention
from ...models.connectors import SqueezeExcite
from ...models.decoder import MLP, RMSNorm, SelfAttention, SparseMLP
from ..trace import TracedGraph
from . import fused, half, ort, plain, standard
from .experts import DenseExperts, GroupedExperts, with_linear
from .residuals import fuse_residuals

Rule = Callable[..., Any]
Rules = Mapping[type[nn.Module], Rule]
"""The replacement of each type of module while it is traced."""


@dataclass(frozen=True)
class Form:
    """How the matmuls of a component are written.

    ``weights``: the format (``fp32``, ``fp16``, ``int8``, ``int4``). ``block_size``: the input channels that share a
    scale. ``dtype``: the type of the inputs and outputs of matmuls and of the decoder's cache.
    """

    weights: str
    block_size: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Dialect:
    """The parts of a dialect.

    ``rules(form)`` and ``attention(dtype)`` give the replacements for tracing a component. ``finish(graph, form,
    decoder)`` runs the graph passes of the dialect in place.
    """

    opset: int
    rules: Callable[[Form], Rules]
    attention: Callable[[torch.dtype], Attention]
    finish: Callable[[TracedGraph, Form, bool], None]


def _products(form: Form, quantized: Callable[[nn.Linear], nn.Module]) -> dict[type[nn.Module], Rule]:
    """Rules for layers: float16 or quantized, as the form says.

    ``calibration.quantize.quantized`` names the same layers.
    """
    plain: Rule = half.Half if form.dtype == torch.float16 else _as_it_is

    def product(linear: nn.Linear) -> nn.Module:
        few = form.weights == "int8" and linear.weight.numel() < FEW_WEIGHTS
        return plain(linear) if few else quantized(linear)

    def unquantized(gate: SqueezeExcite) -> nn.Module:
        for name in ("fc1", "fc2"):
            setattr(gate, name, plain(getattr(gate, name)))
        return gate

    rules: dict[type[nn.Module], Rule] = {}
    if form.dtype == torch.float16:
        rules |= dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d), half.Half)
    if form.weights in ("int4", "int8"):
        rules[nn.Linear] = product
    if form.weights == "int8":
        rules[SqueezeExcite] = unquantized
    return rules


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def _ort_rules(form: Form) -> Rules:
    bits = {"int4": 4, "int8": 8}.get(form.weights, 0)
    rules = _products(form, lambda linear: ort.MatMulNBits(linear, form.block_size, form.dtype, bits))
    rules[RMSNorm] = ort.RMSNormalization
    if product := rules.get(nn.Linear):
        rules[SelfAttention] = lambda original: fused.FusedSelfAttention(original, product, form.dtype)
        mlp = fused.HalfMLP if form.dtype == torch.float16 else fused.FusedMLP
        rules[MLP] = lambda original: mlp(original, product)
    expert = rules.get(MLP, _as_it_is)
    rules[SparseMLP] = lambda original: GroupedExperts(original, expert)
    return rules


def _ort_finish(graph: TracedGraph, form: Form, decoder: bool) -> None:
    if form.dtype == torch.float16:
        half.finish(graph)
        half.narrow_activations(graph.model)
    if decoder:
        fuse_residuals(graph.model)


def _engine_products(opset: int) -> Callable[[Form], Rules]:
    def rules(form: Form) -> Rules:
        if form.weights == "int8":
            layers = _products(form, lambda linear: standard.ChannelProduct(linear, opset))
        else:
            layers = _products(form, standard.blocked_product(form.block_size, opset))
        linear = layers.get(nn.Linear, _as_it_is)
        return layers | {SparseMLP: lambda sparse: DenseExperts(sparse, lambda expert: with_linear(expert, linear))}

    return rules


def _standard_rules(form: Form) -> Rules:
    return {RMSNorm: ort.RMSNormalization, **_engine_products(standard.OPSET)(form)}


def _engine_finish(graph: TracedGraph, form: Form, decoder: bool) -> None:
    half.finish(graph)


DIALECTS = {
    "ort": Dialect(ort.OPSET, _ort_rules, ort.OrtAttention, _ort_finish),
    "standard": Dialect(standard.OPSET, _standard_rules, standard.StandardAttention, _engine_finish),
    "plain": Dialect(plain.OPSET, _engine_products(plain.OPSET), plain.PlainAttention, _engine_finish),
}
