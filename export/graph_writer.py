"""Filling a traced graph with weights: one tensor at a time, from the checkpoint straight into the bundle's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration.quantize import quantize_int4, quantize_int4_positive, quantize_int8, quantize_int8_channels
from .trace import TracedGraph, Weight

#: Tensors of a page or more start at multiples of one, so that a runtime can map the file instead of reading it; the
#: smaller ones at multiples of a cache line.
_PAGE, _LINE = 4096, 64
_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT4: torch.int8,
}

Quantizer = Callable[[Tensor, int], tuple[Tensor, Tensor]]

#: The two entries of a quantized layer, codes and scales, and what makes them of its weight and the block size.
_PAIRS: dict[tuple[str, str], Quantizer] = {
    ("qweight", "scales"): quantize_int4,
    ("codes", "factors"): quantize_int4_positive,
    ("qweight8", "scales8"): quantize_int8,
    ("codes8", "factors8"): lambda weight, _: quantize_int8_channels(weight),
}
_QUANTIZERS = {leaf: (place, make) for pair, make in _PAIRS.items() for place, leaf in enumerate(pair)}


class BinaryFile(Protocol):
    """What the data are written to: the bundle writer's hashing file."""

    def write(self, data: memoryview, /) -> object: ...


class WeightReader:
    """Entries of a component's (lowered) state dict by name, quantized where the lowering asks for it."""

    def __init__(self, tensor: Callable[[str], Tensor], block_size: int) -> None:
        self._tensor, self._block_size = tensor, block_size
        self._quantized: tuple[str, tuple[Tensor, Tensor]] | None = None

    def read(self, entry: str) -> Tensor:
        """The tensor of one entry; ``X.qweight`` and ``X.scales``, and the like, are made of ``X.weight`` together."""
        layer, _, leaf = entry.rpartition(".")
        if leaf not in _QUANTIZERS:
            return self._tensor(entry)
        place, make = _QUANTIZERS[leaf]
        if self._quantized is None or self._quantized[0] != layer:
            self._quantized = None  # free the last pair before the next is made
            self._quantized = (layer, make(self._tensor(f"{layer}.weight"), self._block_size))
        return self._quantized[1][place]


@dataclass
class DataFile:
    """What an external data file holds so far: its length, and where each weight lies in it (offset, bytes)."""

    size: int = 0
    spans: dict[Weight, tuple[int, int]] = field(default_factory=dict)


def payload_size(graph: TracedGraph, shared: bool = False) -> int:
    """Upper bound of the bytes that ``write_weights`` will write, from shapes alone; ``shared``: no weights again."""
    weights = () if shared else graph.weights.values()
    sizes = [math.prod(weight.shape) * weight.dtype.itemsize for weight in weights]
    sizes += [value.nbytes for value in _computed(graph).values()]
    return math.ceil(sum(size + _PAGE for size in sizes))


def write_weights(
    graph: TracedGraph, file: BinaryFile, location: str, reader: WeightReader, held: DataFile | None = None
) -> Iterator[int]:
    """Write the weights, and what the trace computed beyond a page, into ``file``, and point the initializers there.

    ``location`` is the name of the file beside the graph. ``held``: what earlier graphs have put into the same file;
    their weights are used again. Yields the bytes written after each tensor (progress).
    Peak memory is a few times the largest single tensor. Raises ``CheckpointError`` for a tensor with a NaN.
    """
    held = DataFile() if held is None else held

    def place(name: str, span: tuple[int, int]) -> None:
        value = graph.model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(location, *span, value.dtype, shape=value.shape, name=name)

    def append(data: np.ndarray) -> tuple[int, int]:
        raw = data.reshape(-1).view(np.uint8).data
        padding = -held.size % (_PAGE if len(raw) >= _PAGE else _LINE)
        file.write(memoryview(bytes(padding)))
        file.write(raw)
        held.size += padding + len(raw)
        return held.size - len(raw), len(raw)

    for name, weight in graph.weights.items():
        before = held.size
        if weight not in held.spans:
            held.spans[weight] = append(_as_stored(reader.read(weight.entry), weight))
        place(name, held.spans[weight])
        yield held.size - before
    for name, value in _computed(graph).items():
        before = held.size
        place(name, append(np.ascontiguousarray(value.numpy())))
        yield held.size - before


def serialize(graph: TracedGraph) -> bytes:
    """The graph itself, weights by reference. ``RuntimeError`` for a weight that ``write_weights`` has not seen."""
    values = graph.model.graph.initializers
    if unfilled := [name for name in graph.weights if not isinstance(values[name].const_value, ir.ExternalTensor)]:
        raise RuntimeError(f"the weights of {unfilled[0]} have not been written")
    return ir.to_proto(graph.model).SerializeToString()


def _computed(graph: TracedGraph) -> dict[str, ir.TensorProtocol]:
    """Initializers that hold their values since the trace (rotary tables) and are too large to stay in the graph."""
    return {
        name: value.const_value
        for name, value in graph.model.graph.initializers.items()
        if name not in graph.weights and value.const_value is not None and value.const_value.nbytes >= _PAGE
    }


def _as_stored(tensor: Tensor, weight: Weight) -> np.ndarray:
    if weight.transposed:
        tensor = tensor.T
    if tuple(tensor.shape) != weight.shape:
        raise ValueError(f"{weight.entry}: shape {tuple(tensor.shape)} where the graph has {weight.shape}")
    # Conversion and transposition in one pass, so that there is one copy at most.
    stored = tensor.to(_TORCH_DTYPES[weight.dtype], memory_format=torch.contiguous_format).contiguous().numpy()
    return pack_int4(stored) if weight.dtype == ir.DataType.INT4 else stored


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 codes -8..7 of any shape, two a byte in the order of the array, the lower nibble first (ONNX, uint8)."""
    flat = codes.reshape(-1).view(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] & 15) | (flat[1::2] << 4)
