"""The ``ort`` dialect: ONNX Runtime's fused operators (domain com.microsoft) where they exist.

Each class replaces a reference module or function while a component is traced, and emits one operator. The classes
compute nothing: the runtime's kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.onnx import ops

from ...contract.dialects import DIALECTS
from ...contract.formats import FORMATS
from ...models.attention import CacheState
from ...models.decoder import RMSNorm
from .half import half_parameter
from .layers import QuantizedLinear

#: The types of an operator's attribute in ``torch.onnx.ops``.
Attribute: TypeAlias = "int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]"

OPSET = DIALECTS["ort"].opset


class OrtAttention:
    """MultiHeadAttention for the towers, GroupQueryAttention (with rotary and cache inside) for the decoder.

    They compute in ``dtype`` between float32 neighbours.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    def full(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.to(self._dtype) for x in (query, key, value))
        return ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v, None, None, None if bias is None else bias.to(self._dtype)),
            attrs={"num_heads": num_heads},
            dtype=self._dtype,
            shape=query.shape,
            version=1,
        ).float()

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
        parts = [x.to(self._dtype) for x in (query, key, value)]
        return grouped_attention(parts, past_key, past_value, state, num_heads, num_kv_heads, query.shape)


def grouped_attention(
    parts: Sequence[Tensor],
    past_key: Tensor,
    past_value: Tensor,
    state: CacheState,
    num_heads: int,
    num_kv_heads: int,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupQueryAttention; see ``Attention.cached``. It computes in the type of ``parts``.

    ``parts``: query, key and value, or one tensor ``[B, S, (num_heads + 2 * num_kv_heads) * head_dim]`` with all three.
    ``shape``: that of the query. The kernel applies rotary embedding itself, unless positions are explicit: it can only
    count them.
    """
    dtype = parts[0].dtype
    cos, sin = state.cos.to(dtype), state.sin.to(dtype)
    attributes: dict[str, Attribute] = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "do_rotary": 1}
    tables: tuple[Tensor, ...] = (cos, sin)
    if state.is_explicit:
        query, key, value = parts if len(parts) == 3 else _unpacked(parts[0], num_heads, num_kv_heads)
        parts = (_turned(query, cos, sin, num_heads), _turned(key, cos, sin, num_kv_heads), value)
        attributes["do_rotary"], tables = 0, ()
    inputs = (*parts, *(None,) * (3 - len(parts)), past_key, past_value, state.lengths, state.total_length, *tables)
    out, present_key, present_value = ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=(dtype, past_key.dtype, past_value.dtype),
        shapes=(shape, past_key.shape, past_value.shape),
        version=1,
    )
    return out.float(), present_key, present_value


def _turned(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotary embedding of ``[B, S, num_heads * head_dim]`` with the cosines and sines of each token."""
    return ops.symbolic(
        "RotaryEmbedding", (x, cos, sin), attrs={"num_heads": num_heads}, dtype=x.dtype, shape=x.shape, version=OPSET
    )


def _unpacked(packed: Tensor, num_heads: int, num_kv_heads: int) -> Sequence[Tensor]:
    size = packed.shape[-1] // (num_heads + 2 * num_kv_heads)
    widths = [heads * size for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return ops.symbolic_multi_out(
        "Split",
        (packed, torch.tensor(widths)),
        attrs={"axis": -1},
        dtypes=(packed.dtype,) * 3,
        shapes=[(*packed.shape[:-1], width) for width in widths],
        version=OPSET,
    )


class RMSNormalization(nn.Module):
    """The fused norm in place of ``models.decoder.RMSNorm``."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.symbolic(
            "RMSNormalization",
            (x, self.weight),
            attrs={"axis": -1, "epsilon": self.eps},
            dtype=x.dtype,
            shape=x.shape,
            version=OPSET,
        )


class MatMulNBits(QuantizedLinear):
    """A matmul with int4 or int8 weights in place of ``nn.Linear``.

    In float32 the kernel may quantize the activations to int8 block by block (accuracy level 4: about three times as
    fast on a CPU as level 0, docs/facts.md 6). In float16, which is for GPUs, it may not (level 0).
    """

    def __init__(self, layout: str, linear: nn.Linear, block_size: int | None, dtype: torch.dtype) -> None:
        assert block_size is not None
        super().__init__(layout, block_size)
        bits, blocks = FORMATS[self.stored.layout.format].bits, -(-linear.in_features // block_size)
        self._codes, self._scales = self.stored.layout.tensors
        self.hold(self._codes, torch.uint8, linear.out_features, blocks, block_size * bits // 8)
        self.hold(self._scales, dtype, linear.out_features, blocks)
        self.bias = linear.bias if linear.bias is None or dtype == torch.float32 else half_parameter(linear.bias)
        self.out_features, self.dtype = linear.out_features, dtype
        self.attributes: dict[str, Attribute] = {
            "K": linear.in_features,
            "N": linear.out_features,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": 4 if dtype == torch.float32 else 0,
        }

    def forward(self, x: Tensor) -> Tensor:
        # On a GPU, the kernel of some versions silently ignores a bias.
        inside = self.bias if self.dtype == torch.float32 else None
        y = ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x.to(self.dtype), getattr(self, self._codes), getattr(self, self._scales), None, None, inside),
            attrs=self.attributes,
            dtype=self.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return (y if inside is self.bias else y + self.bias).float()
