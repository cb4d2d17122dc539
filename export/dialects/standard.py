"""The ``standard`` dialect: operators of ONNX itself (opset 24), which TensorRT's parser fuses.

They are ``Attention`` with an explicit boolean mask and one output (TensorRT takes no other form), ``RotaryEmbedding``,
``RMSNormalization``, and ``TensorScatter`` into a static cache, whose output is bound to the memory of its input.

TensorRT is strongly typed, so the types are in the graph (``half.py``). It fuses pointwise operators into the end of a
matmul, where float32 costs nothing. It refuses the attribute ``softmax_precision`` and chooses the type of the softmax
inside Attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx import ops

from ...contract.dialects import DIALECTS
from ...models.attention import CacheState
from .half import half_parameter
from .layers import QuantizedLinear

OPSET = DIALECTS["standard"].opset


class StandardAttention:
    """Attention, RotaryEmbedding and TensorScatter, with matmuls in ``dtype``."""

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
        """See the protocol. Rows must hold at least S tokens after the call (S new ones, no padding)."""
        start, cos, sin, visible = self._positions(state, query.shape[1], past_key.shape[2])
        turned = [
            self._rotate(x.unflatten(-1, (heads, -1)).transpose(1, 2), cos, sin).to(self._dtype)
            for x, heads in ((query, num_heads), (key, num_kv_heads))
        ]
        present_key = self._write(past_key, turned[1], start)
        present_value = self._write(past_value, self._heads(value, num_kv_heads), start)
        return self._joined(self._attend(turned[0], present_key, present_value, visible)), present_key, present_value

    def _positions(self, state: CacheState, length: int, max_length: int) -> tuple[Tensor, ...]:
        """First slots of the new tokens ``[B]``, their rotary rows ``[B, S, D/2]``, their mask ``[B, 1, S, max]``."""
        if self._shared is None or self._shared[0] is not state:
            start = state.lengths.long() - (length - 1)
            places = start.unsqueeze(1) + torch.arange(length)
            visible = torch.arange(max_length) <= places[:, None, :, None]
            self._shared = state, (start, *state.turns(places), visible)
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


class BlockedProduct(QuantizedLinear):
    """An int4 matmul in place of ``nn.Linear``: DequantizeLinear over blocks of input channels, then MatMul.

    Its initializers are ``codes`` (int4 ``[K, N]``) and ``factors`` (float16 ``[K / block, N]``, all positive).
    """

    codes: Tensor
    factors: Tensor

    def __init__(self, linear: nn.Linear, block_size: int | None, opset: int = OPSET) -> None:
        assert block_size is not None
        super().__init__("int4_blocks", block_size)
        self.block_size, self._opset = block_size, opset
        inputs, outputs = linear.in_features, linear.out_features
        # PyTorch cannot trace int4, so the trace has int8 and ``half.finish`` sets the type.
        self.hold("codes", torch.int8, inputs, outputs)
        self.hold("factors", torch.float16, inputs // block_size, outputs)
        self.bias = None if linear.bias is None else half_parameter(linear.bias)

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


class ChannelProduct(QuantizedLinear):
    """An int8 matmul in place of ``nn.Linear``: DequantizeLinear with a scale per output channel, then MatMul.

    Its initializers are ``codes8`` (int8 ``[K, N]``) and ``factors8`` (float16 ``[N]``, all positive).
    """

    codes8: Tensor
    factors8: Tensor

    def __init__(self, linear: nn.Linear, opset: int) -> None:
        super().__init__("int8_channels")
        self._opset = opset
        self.hold("codes8", torch.int8, linear.in_features, linear.out_features)
        self.hold("factors8", torch.float16, linear.out_features)
        self.bias = None if linear.bias is None else half_parameter(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = ops.symbolic(
            "DequantizeLinear",
            (self.codes8, self.factors8),
            attrs={"axis": 1},
            dtype=torch.float16,
            shape=self.codes8.shape,
            version=self._opset,
        )
        y = x.half() @ weight
        return (y if self.bias is None else y + self.bias).float()
