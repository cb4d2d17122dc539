"""Filling a traced graph with weights: one tensor at a time, from the checkpoint straight into the bundle's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration.formats import ENCODINGS
from .dialects.layers import Stored
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


class BinaryFile(Protocol):
    """What the data are written to: the bundle writer's hashing file."""

    def write(self, data: memoryview, /) -> object: ...


class WeightReader:
    """Entries of a component's (lowered) state dict by name.

    ``tensor``: reads an entry of the checkpoint's component. ``layers``: how the quantized layers are stored, by name.
    """

    def __init__(self, tensor: Callable[[str], Tensor], layers: Mapping[str, Stored] | None = None) -> None:
        self._tensor, self._layers = tensor, layers or {}
        self._encoded: tuple[str, tuple[Tensor, ...]] | None = None

    def read(self, entry: str) -> Tensor:
        """The tensor of one entry. The tensors of a quantized layer ``X`` are made of ``X.weight`` together."""
        layer, _, leaf = entry.rpartition(".")
        stored = self._layers.get(layer)
        if stored is None or leaf not in stored.layout.tensors:
            return self._tensor(entry)
        if self._encoded is None or self._encoded[0] != layer:
            self._encoded = None  # free the tensors of the last layer before the next ones are made
            encoding = ENCODINGS[stored.layout.name]
            self._encoded = (layer, encoding.encode(self._tensor(f"{layer}.weight"), stored.block_size))
        return self._encoded[1][stored.layout.tensors.index(leaf)]


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
