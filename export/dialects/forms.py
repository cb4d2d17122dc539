"""What a dialect is to the rest of the exporter: a record of its parts, found by the name that a target gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...models.attention import Attention
from ...models.decoder import MLP, RMSNorm, SelfAttention
from ..trace import TracedGraph
from . import fused, ort, plain, standard
from .residuals import fuse_residuals

#: What stands in for a module of a type while it is traced.
Rules = Mapping[type[nn.Module], Callable[..., nn.Module]]


@dataclass(frozen=True)
class Dialect:
    """``rules(weights, block_size)`` and ``attention(weights)`` say what a component of that format is traced with.

    ``finish(graph, decoder)`` runs the dialect's graph passes, in place; ``cache_dtype(weights)`` is that of the
    decoder's keys and values.
    """

    opset: int
    rules: Callable[[str, int], Rules]
    attention: Callable[[str], Attention]
    finish: Callable[[TracedGraph, bool], None]
    cache_dtype: Callable[[str], torch.dtype]


def _ort_rules(weights: str, block_size: int) -> Rules:
    rules: dict[type[nn.Module], Callable[..., nn.Module]] = {RMSNorm: ort.RMSNormalization}
    if weights == "int4":

        def product(linear: nn.Linear) -> nn.Module:
            return ort.MatMulNBits(linear, block_size)

        rules[nn.Linear] = product
        rules[SelfAttention] = lambda original: fused.FusedSelfAttention(original, product)
        rules[MLP] = lambda original: fused.FusedMLP(original, product)
    return rules


def _ort_finish(graph: TracedGraph, decoder: bool) -> None:
    if decoder:
        fuse_residuals(graph.model)


def _standard_rules(weights: str, block_size: int) -> Rules:
    return {RMSNorm: ort.RMSNormalization, **_typed_products(weights, block_size, standard.OPSET)}


def _plain_rules(weights: str, block_size: int) -> Rules:
    return _typed_products(weights, block_size, plain.OPSET)


def _typed_products(weights: str, block_size: int, opset: int) -> Rules:
    rules: dict[type[nn.Module], Callable[..., nn.Module]] = {}
    if weights != "fp32":
        rules |= {nn.Linear: standard.Half, nn.Conv1d: standard.Half, nn.Conv2d: standard.Half}
    if weights == "int4":
        rules[nn.Linear] = standard.blocked_product(block_size, opset)
    return rules


def _standard_dtype(weights: str) -> torch.dtype:
    return torch.float32 if weights == "fp32" else torch.float16


DIALECTS = {
    "ort": Dialect(ort.OPSET, _ort_rules, lambda _: ort.OrtAttention(), _ort_finish, lambda _: torch.float32),
    "standard": Dialect(
        standard.OPSET,
        _standard_rules,
        lambda weights: standard.StandardAttention(_standard_dtype(weights)),
        lambda graph, _: standard.finish(graph),
        _standard_dtype,
    ),
    "plain": Dialect(
        plain.OPSET,
        _plain_rules,
        lambda weights: plain.PlainAttention(_standard_dtype(weights)),
        lambda graph, _: standard.finish(graph),
        _standard_dtype,
    ),
}
