"""The lowering of each dialect of ONNX. The rest of the exporter finds it by the name that a target gives.

``contract.dialects`` has the records, which need no PyTorch. Here are the modules that take the place of the reference
modules while a component is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...calibration.recipe import linear_layers
from ...contract.dialects import DIALECTS as RECORDS
from ...contract.formats import Rule, decide
from ...models.attention import Attention
from ...models.decoder import MLP, RMSNorm, SelfAttention, SparseMLP
from ..trace import TracedGraph
from . import fused, half, ort, plain, standard
from .experts import DenseExperts, GroupedExperts
from .layers import Lowering, Matmuls
from .residuals import fuse_residuals

Replacement = Callable[..., Any]
Replacements = Mapping[type[nn.Module], Replacement]
"""The replacement of each type of module while it is traced."""


@dataclass(frozen=True)
class Form:
    """How a component is written: the type of the inputs and outputs of its matmuls (and of the decoder's cache), and
    the rule of each of its linear layers."""

    dtype: torch.dtype
    layers: Mapping[nn.Linear, Rule]


def form_of(module: nn.Module, component: str, recipe: Sequence[Rule], dtype: torch.dtype) -> Form:
    """The form of a component, or of a part of it whose layers have the names that they have in the whole."""
    return Form(dtype, {layer: decide(recipe, component, name) for name, layer in linear_layers(module).items()})


@dataclass(frozen=True)
class Dialect:
    """The parts of a dialect.

    ``matmuls``: for each format of weights, what takes the place of a linear layer. ``modules(form, matmuls)`` gives
    the replacements of the other modules, ``attention(dtype)`` that of all attention. ``finish(graph, form, decoder)``
    runs the graph passes of the dialect in place.
    """

    name: str
    matmuls: Mapping[str, Lowering]
    modules: Callable[[Form, Matmuls], Replacements]
    attention: Callable[[torch.dtype], Attention]
    finish: Callable[[TracedGraph, Form, bool], None]

    @property
    def opset(self) -> int:
        return RECORDS[self.name].opset

    def replacements(self, form: Form) -> Replacements:
        """The replacement of each type of module of a component."""
        matmuls = Matmuls(self.matmuls, form.layers, form.dtype)
        return {nn.Linear: matmuls, **_convolutions(form), **self.modules(form, matmuls)}


def _convolutions(form: Form) -> Replacements:
    """Convolutions have no format of their own: they compute in the type of matmuls."""
    return dict.fromkeys((nn.Conv1d, nn.Conv2d), half.Half) if form.dtype == torch.float16 else {}


def _as_it_is(layer: nn.Linear, block_size: int | None, dtype: torch.dtype) -> nn.Module:
    return layer


def _half(layer: nn.Linear, block_size: int | None, dtype: torch.dtype) -> nn.Module:
    return half.Half(layer)


def _ort_modules(form: Form, matmuls: Matmuls) -> Replacements:
    def attention(original: SelfAttention) -> nn.Module:
        parts = original.q_proj, original.k_proj, original.v_proj
        if matmuls.joinable(*parts):
            return fused.FusedSelfAttention(original, matmuls, form.dtype)
        return matmuls.inside(original)

    def mlp(original: MLP) -> nn.Module:
        if form.dtype == torch.float16:
            return fused.HalfMLP(original, matmuls)
        if matmuls.joinable(original.gate_proj, original.up_proj):
            return fused.FusedMLP(original, matmuls)
        return matmuls.inside(original)

    def experts(original: SparseMLP) -> nn.Module:
        return GroupedExperts(original, mlp)

    return {RMSNorm: ort.RMSNormalization, SelfAttention: attention, MLP: mlp, SparseMLP: experts}


def _ort_finish(graph: TracedGraph, form: Form, decoder: bool) -> None:
    if form.dtype == torch.float16:
        half.finish(graph)
        half.narrow_activations(graph.model)
    if decoder:
        fuse_residuals(graph.model)


def _engine_matmuls(opset: int) -> dict[str, Lowering]:
    return {
        "fp32": _as_it_is,
        "fp16": _half,
        "int4": lambda layer, block_size, _: standard.BlockedProduct(layer, block_size, opset),
        "int8": lambda layer, *_: standard.ChannelProduct(layer, opset),
    }


def _engine_modules(form: Form, matmuls: Matmuls) -> dict[type[nn.Module], Replacement]:
    return {SparseMLP: lambda original: DenseExperts(original, matmuls.inside)}


def _standard_modules(form: Form, matmuls: Matmuls) -> Replacements:
    return {RMSNorm: ort.RMSNormalization, **_engine_modules(form, matmuls)}


def _engine_finish(graph: TracedGraph, form: Form, decoder: bool) -> None:
    half.finish(graph)


DIALECTS = {
    each.name: each
    for each in (
        Dialect(
            "ort",
            {
                "fp32": _as_it_is,
                "fp16": _half,
                "int4": lambda *layer: ort.MatMulNBits("int4_nbits", *layer),
                "int8": lambda *layer: ort.MatMulNBits("int8_nbits", *layer),
            },
            _ort_modules,
            ort.OrtAttention,
            _ort_finish,
        ),
        Dialect(
            "standard",
            _engine_matmuls(standard.OPSET),
            _standard_modules,
            standard.StandardAttention,
            _engine_finish,
        ),
        Dialect("plain", _engine_matmuls(plain.OPSET), _engine_modules, plain.PlainAttention, _engine_finish),
    )
}
