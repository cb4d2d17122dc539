"""What a dialect is to the rest of the exporter: a record of its parts, found by the name that a target gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...models.attention import Attention
from ...models.decoder import MLP, RMSNorm, SelfAttention
from ..trace import TracedGraph
from . import fused, half, ort, plain, standard
from .residuals import fuse_residuals

#: What stands in for a module of a type while it is traced.
Rules = Mapping[type[nn.Module], Callable[..., nn.Module]]


@dataclass(frozen=True)
class Form:
    """How a component's products are written: the format of its weights (``fp32``, ``fp16``, ``int4``), the input
    channels that share a scale of it, and the type that products take and give; the decoder's cache is of it too."""

    weights: str
    block_size: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Dialect:
    """``rules(form)`` and ``attention(dtype)`` say what a component is traced with; ``finish(graph, form, decoder)``
    runs the dialect's graph passes, in place."""

    opset: int
    rules: Callable[[Form], Rules]
    attention: Callable[[torch.dtype], Attention]
    finish: Callable[[TracedGraph, Form, bool], None]


def _ort_rules(form: Form) -> Rules:
    rules: dict[type[nn.Module], Callable[..., nn.Module]] = {RMSNorm: ort.RMSNormalization}

    def product(linear: nn.Linear) -> nn.Module:
        return ort.MatMulNBits(linear, form.block_size, form.dtype) if form.weights == "int4" else half.Half(linear)

    if form.dtype == torch.float16:
        rules |= {nn.Conv1d: half.Half, nn.Conv2d: half.Half}
    if form.weights != "fp32":
        rules[nn.Linear] = product
        rules[SelfAttention] = lambda original: fused.FusedSelfAttention(original, product, form.dtype)
        rules[MLP] = lambda original: fused.FusedMLP(original, product)
    return rules


def _ort_finish(graph: TracedGraph, form: Form, decoder: bool) -> None:
    if form.dtype == torch.float16:
        half.finish(graph)
        half.narrow_activations(graph.model)
    if decoder:
        fuse_residuals(graph.model)


def _engine_products(opset: int) -> Callable[[Form], Rules]:
    def rules(form: Form) -> Rules:
        found: dict[type[nn.Module], Callable[..., nn.Module]] = {}
        if form.dtype == torch.float16:
            found |= {nn.Linear: half.Half, nn.Conv1d: half.Half, nn.Conv2d: half.Half}
        if form.weights == "int4":
            found[nn.Linear] = standard.blocked_product(form.block_size, opset)
        return found

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
