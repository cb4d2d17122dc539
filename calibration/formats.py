"""Each layout of a weight format as an object: what is stored of a layer's weight, and which layers take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..contract.dialects import DIALECTS
from ..contract.formats import LAYOUTS, Layout
from .quantize import (
    dequantize_int4,
    dequantize_int4_positive,
    dequantize_int8,
    dequantize_int8_channels,
    quantize_int4,
    quantize_int4_positive,
    quantize_int8,
    quantize_int8_channels,
)

#: A layer with fewer weights is not quantized to int8: it would save too little.
FEW_WEIGHTS = 1 << 12


class Statistics(Protocol):
    """What an observer saw of a layer's inputs. No format reads it yet."""


class Encoding:
    """A layout of weights ``[N, K]`` (N outputs, K inputs), of any float dtype and all finite. Subclasses compute.

    ``layout``: its record, which names the tensors.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def takes(self, layer: nn.Linear, block_size: int | None) -> bool:
        """Whether the layer gets this format if a recipe says nothing else. It reads shapes only."""
        return not self.layout.whole_blocks or layer.in_features % (block_size or 1) == 0

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        """The tensors that are stored, in the order of ``layout.tensors``. The weight is not changed."""
        raise NotImplementedError

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        """The float32 weight ``[N, width]`` that a graph with these tensors computes with."""
        raise NotImplementedError

    def round(self, weight: Tensor, block_size: int | None = None) -> Tensor:
        """The float32 weight ``[N, K]`` that the graph computes with, of the weight ``[N, K]`` of a checkpoint."""
        return self.decode(self.encode(weight, block_size), weight.shape[1])


class AsIs(Encoding):
    """Weights that are stored in a float type."""

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        return (weight.to(getattr(torch, self.layout.types[0])),)

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        return stored[0].float()


class Int4NBits(Encoding):
    """``quantize_int4``: blocks whose scales may be negative, for MatMulNBits. A block need not be full."""

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        return quantize_int4(weight, _sized(block_size))

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        codes, scales = stored
        return dequantize_int4(codes, scales, width)


class Int4Blocks(Encoding):
    """``quantize_int4_positive``: blocks with positive scales, for DequantizeLinear. Blocks must divide K."""

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        return quantize_int4_positive(weight, _sized(block_size))

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        codes, scales = stored
        return dequantize_int4_positive(codes, scales)


class _Int8(Encoding):
    def takes(self, layer: nn.Linear, block_size: int | None) -> bool:
        return super().takes(layer, block_size) and layer.weight.numel() >= FEW_WEIGHTS


class Int8NBits(_Int8):
    """``quantize_int8``: blocks, for MatMulNBits. A block need not be full."""

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        return quantize_int8(weight, _sized(block_size))

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        codes, scales = stored
        return dequantize_int8(codes, scales, width)


class Int8Channels(_Int8):
    """``quantize_int8_channels``: a positive scale for each output channel, for DequantizeLinear."""

    def encode(
        self, weight: Tensor, block_size: int | None = None, statistics: Statistics | None = None
    ) -> tuple[Tensor, ...]:
        return quantize_int8_channels(weight)

    def decode(self, stored: Sequence[Tensor], width: int) -> Tensor:
        codes, scales = stored
        return dequantize_int8_channels(codes, scales)


def _sized(block_size: int | None) -> int:
    if block_size is None:
        raise ValueError("this layout has blocks, but no block size was given")
    return block_size


_KINDS = {
    "float32": AsIs,
    "float16": AsIs,
    "int4_nbits": Int4NBits,
    "int8_nbits": Int8NBits,
    "int4_blocks": Int4Blocks,
    "int8_channels": Int8Channels,
}

ENCODINGS: dict[str, Encoding] = {name: kind(LAYOUTS[name]) for name, kind in _KINDS.items()}
"""The object of each layout, by the layout's name."""


def encoding(dialect: str, format: str) -> Encoding:
    """How the graphs of a dialect hold the weights of a format."""
    return ENCODINGS[DIALECTS[dialect].layouts[format]]
