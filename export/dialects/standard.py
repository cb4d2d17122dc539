"""The ``standard`` dialect: operators of ONNX itself (opset 24), which is what TensorRT's parser fuses.

``Attention`` with an explicit boolean mask and one output (TensorRT takes no other form), ``RotaryEmbedding``,
``RMSNormalization``, and ``TensorScatter`` into a static cache, whose output is bound to the memory of its input.

TensorRT is strongly typed, so the types are in the graph. With ``float16`` the products (linear layers, convolutions,
attention) take and give float16; what is between them stays in float32: residual sums, norms, rotary embedding,
activations. Qwen2's residual stream leaves float16's range, and pointwise work is fused into the products' ends, where
its width costs nothing. TensorRT refuses the attribute ``softmax_precision``: the softmax inside Attention is its own.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.onnx import ops

from ...models.attention import CacheState
from ..trace import TracedGraph, Weight

#: First opset with TensorScatter.
OPSET = 24

_HALF = ir.DataType.FLOAT16


class StandardAttention:
    """Attention, RotaryEmbedding and TensorScatter; products in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shared: tuple[CacheState, tuple[Tensor, ...]] | None = None

    def full(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(x, num_heads) for x in (query, key, value))
        return self._joined(self._attend(q, k, v, None if bias is None else bias.to(self._dtype)))

    def cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        state: CacheState,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol says, for rows that hold at least S tokens after the call (S new ones, no padding)."""
        start, cos, sin, visible = self._positions(state, query.shape[1], past_key.shape[2])
        turned = [
            self._rotate(x.unflatten(-1, (heads, -1)).transpose(1, 2), cos, sin).to(self._dtype)
            for x, heads in ((query, num_heads), (key, num_kv_heads))
        ]
        present_key = self._write(past_key, turned[1], start)
        present_value = self._write(past_value, self._heads(value, num_kv_heads), start)
        return self._joined(self._attend(turned[0], present_key, present_value, visible)), present_key, present_value

    def _positions(self, state: CacheState, length: int, max_length: int) -> tuple[Tensor, ...]:
        """Where the new tokens go ``[B]``, their rotary rows ``[B, S, D/2]`` and what they see ``[B, 1, S, max]``."""
        if self._shared is None or self._shared[0] is not state:
            start = state.lengths.long() - (length - 1)
            positions = start.unsqueeze(1) + torch.arange(length)
            visible = torch.arange(max_length) <= positions[:, None, :, None]
            self._shared = state, (start, F.embedding(positions, state.cos), F.embedding(positions, state.sin), visible)
        return self._shared[1]

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.to(self._dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _joined(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2).float()

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return ops.symbolic("Attention", (query, key, value, mask), dtype=query.dtype, shape=query.shape, version=OPSET)

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.symbolic("RotaryEmbedding", (x, cos, sin), dtype=x.dtype, shape=x.shape, version=OPSET)

    @staticmethod
    def _write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return ops.symbolic(
            "TensorScatter",
            (cache, new, start),
            attrs={"axis": 2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=OPSET,
        )


class Half(nn.Module):
    """A linear layer or a convolution in float16 between float32 neighbours. It has the names of the original."""

    def __init__(self, original: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.weight = _half(original.weight)
        self.bias = None if original.bias is None else _half(original.bias)
        # In a tuple, which hides the module: its own parameters are not of the graph.
        self._original = (original,)

    def forward(self, x: Tensor) -> Tensor:
        (original,) = self._original
        if isinstance(original, nn.Linear):
            return F.linear(x.half(), self.weight, self.bias).float()
        return original._conv_forward(x.half(), self.weight, self.bias).float()


def _half(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, dtype=torch.float16), requires_grad=False)


class BlockedProduct(nn.Module):
    """An int4 product in place of ``nn.Linear``: DequantizeLinear over blocks of input channels, then MatMul.

    Its initializers are ``codes`` (int4 ``[K, N]``) and ``factors`` (float16 ``[K / block, N]``, all positive): what
    ``quantize_int4_positive`` gives.
    """

    codes: Tensor
    factors: Tensor

    def __init__(self, linear: nn.Linear, block_size: int, opset: int = OPSET) -> None:
        super().__init__()
        self.block_size, self._opset = block_size, opset
        shape = (linear.in_features, linear.out_features)
        with torch.device("meta"):
            # Traced as int8, since PyTorch has no int4 that can be traced: ``finish`` says what it is.
            self.register_buffer("codes", torch.empty(shape, dtype=torch.int8))
            self.register_buffer("factors", torch.empty(shape[0] // block_size, shape[1], dtype=torch.float16))
        self.bias = None if linear.bias is None else _half(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = ops.symbolic(
            "DequantizeLinear",
            (self.codes, self.factors),
            attrs={"axis": 0, "block_size": self.block_size},
            dtype=torch.float16,
            shape=self.codes.shape,
            version=self._opset,
        )
        y = x.half() @ weight
        return (y if self.bias is None else y + self.bias).float()


def blocked_product(block_size: int, opset: int = OPSET) -> Callable[[nn.Linear], nn.Module]:
    """The rule for the linear layers of an int4 component; a width that no block divides stays in float16."""

    def product(linear: nn.Linear) -> nn.Module:
        return Half(linear) if linear.in_features % block_size else BlockedProduct(linear, block_size, opset)

    return product


def finish(graph: TracedGraph) -> None:
    """Graph passes of the dialect, in place.

    What is constant is computed (TensorRT wants axes as constants) except from weights, which are not there yet; int4
    codes get their type; casts that undo or repeat each other go.
    """
    lacking = set(graph.weights)
    fold_constants(
        graph.model,
        should_fold=lambda node: False if lacking & {v.name for v in node.inputs if v is not None} else None,
    )
    RemoveUnusedNodesPass()(graph.model)
    initializers = graph.model.graph.initializers
    for name, weight in list(graph.weights.items()):
        if name not in initializers:
            del graph.weights[name]
        elif weight.entry.rpartition(".")[2] == "codes":
            initializers[name].type = ir.TensorType(ir.DataType.INT4)
            graph.weights[name] = Weight(weight.entry, ir.DataType.INT4, weight.shape, weight.transposed)
    fold_casts(graph.model)
    # TensorRT names layers after nodes and values both, and refuses two of one name.
    for index, node in enumerate(graph.model.graph):
        node.name = f"{node.op_type}.{index}"


def fold_casts(model: ir.Model) -> int:
    """Drop casts that change nothing; returns how many.

    Float16 to float32 and back is the same value bit for bit, and a second cast of one value to one type is the first.
    """
    folded, known = 0, dict[tuple[ir.Value, ir.DataType | None], ir.Value]()
    for node in list(model.graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or source is None or output.is_graph_output():
            continue
        inner = source.producer()
        if inner is not None and inner.op_type == "Cast" and inner.inputs[0] is not None:
            types = inner.inputs[0].dtype, source.dtype, output.dtype
            same = inner.inputs[0] if types == (_HALF, ir.DataType.FLOAT, _HALF) else None
        else:
            same = None
        if same is None:
            same = known.setdefault((source, output.dtype), output)
        if same is output or output.dtype is None:
            continue
        output.replace_all_uses_with(same)
        model.graph.remove(node, safe=True)
        if not source.uses() and inner is not None and inner.op_type == "Cast" and not source.is_graph_output():
            known.pop((inner.inputs[0], source.dtype), None)  # type: ignore[arg-type]
            model.graph.remove(inner, safe=True)
        folded += 1
    return folded
