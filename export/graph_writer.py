"""Filling a traced graph with weights: one tensor at a time, from the checkpoint straight into the bundle's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration.quantize import quantize_int4
from .trace import TracedGraph, Weight

#: Tensors start at multiples of a page, so that a runtime can map the file instead of reading it.
_PAGE = 4096
_TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.UINT8: torch.uint8}


class BinaryFile(Protocol):
    """What the data are written to: the bundle writer's hashing file."""

    def write(self, data: memoryview, /) -> object: ...


class WeightReader:
    """Entries of a component's (lowered) state dict by name, quantized where the lowering asks for it."""

    def __init__(self, tensor: Callable[[str], Tensor], block_size: int) -> None:
        self._tensor, self._block_size = tensor, block_size
        self._quantized: tuple[str, tuple[Tensor, Tensor]] | None = None

    def read(self, entry: str) -> Tensor:
        """The tensor of one entry; ``X.qweight`` and ``X.scales`` are made of ``X.weight`` together."""
        layer, _, leaf = entry.rpartition(".")
        if leaf not in ("qweight", "scales"):
            return self._tensor(entry)
        if self._quantized is None or self._quantized[0] != layer:
            self._quantized = None  # free the last pair before the next is made
            self._quantized = (layer, quantize_int4(self._tensor(f"{layer}.weight"), self._block_size))
        return self._quantized[1][0 if leaf == "qweight" else 1]


def payload_size(graph: TracedGraph) -> int:
    """Upper bound of the bytes that ``write_weights`` will write, from shapes alone."""
    sizes = [int(np.prod(weight.shape)) * weight.dtype.itemsize for weight in graph.weights.values()]
    return int(sum(size + _PAGE for size in sizes))


def write_weights(graph: TracedGraph, file: BinaryFile, location: str, reader: WeightReader) -> Iterator[int]:
    """Write every weight of the graph into ``file`` and point its initializer there.

    ``location`` is the name of the file beside the graph. Yields the bytes written after each tensor (progress).
    Peak memory is a few times the largest single tensor.
    """
    offset = 0
    for name, weight in graph.weights.items():
        data = _as_stored(reader.read(weight.entry), weight)
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        padding = -offset % (_PAGE if len(raw) >= _PAGE else 64)
        file.write(memoryview(bytes(padding)))
        file.write(raw)
        offset += padding
        value = graph.model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            location, offset, len(raw), weight.dtype, shape=ir.Shape(weight.shape), name=name
        )
        offset += len(raw)
        yield padding + len(raw)


def serialize(graph: TracedGraph) -> bytes:
    """The graph itself, weights by reference. ``ValueError`` when something in it was never filled in."""
    return ir.to_proto(graph.model).SerializeToString()


def _as_stored(tensor: Tensor, weight: Weight) -> np.ndarray:
    if weight.transposed:
        tensor = tensor.T
    if tuple(tensor.shape) != weight.shape:
        raise ValueError(f"{weight.entry}: shape {tuple(tensor.shape)} where the graph has {weight.shape}")
    return tensor.to(_TORCH_DTYPES[weight.dtype]).contiguous().numpy()
