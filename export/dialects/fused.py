"""Matmuls with the same input become one matmul: query, key and value; gate and up.

A decode step of one row spends its time on reading weights and on giving work to threads. A fused layer quantizes its
input once instead of three times and has four matmuls instead of seven. Each row of a matrix is quantized separately,
so the codes of a fused matrix are the codes of its parts, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops

from ...models.attention import CacheState
from ...models.decoder import MLP, SelfAttention
from .layers import Matmuls
from .ort import OPSET, grouped_attention

#: The parts of each fused layer, in the order of their rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_fused(tensor: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Read a state dict of unfused layers by the names of fused ones, too (``X.qkv_proj.weight``)."""

    def read(entry: str) -> Tensor:
        owner, _, leaf = entry.rpartition(".")
        prefix, _, layer = owner.rpartition(".")
        if layer not in FUSED:
            return tensor(entry)
        return torch.cat([tensor(f"{prefix}.{part}.{leaf}") for part in FUSED[layer]])

    return read


class FusedSelfAttention(nn.Module):
    """``models.decoder.SelfAttention`` with one matmul for query, key and value. The kernel takes them packed."""

    def __init__(self, original: SelfAttention, matmuls: Matmuls, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = original.num_heads, original.num_kv_heads
        self.qkv_proj = matmuls(original.q_proj, original.k_proj, original.v_proj)
        self.o_proj = matmuls(original.o_proj)
        self.width, self.dtype = original.q_proj.out_features, dtype

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, state: CacheState
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed, shape = self.qkv_proj(x).to(self.dtype), (*x.shape[:-1], self.width)
        out, present_key, present_value = grouped_attention(
            [packed], past_key, past_value, state, self.num_heads, self.num_kv_heads, shape
        )
        return self.o_proj(out), present_key, present_value


class FusedMLP(nn.Module):
    """``models.decoder.MLP`` with one matmul for gate and up."""

    def __init__(self, original: MLP, matmuls: Matmuls) -> None:
        super().__init__()
        self.gate_up_proj = matmuls(original.gate_proj, original.up_proj)
        self.down_proj = matmuls(original.down_proj)
        self.width = original.gate_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        shape = (*x.shape[:-1], self.width)
        # ``chunk`` would be exported as a sequence, whose elements are copied again.
        gate, up = ops.symbolic_multi_out(
            "Split",
            (both,),
            attrs={"axis": -1, "num_outputs": 2},
            dtypes=(x.dtype, x.dtype),
            shapes=(shape, shape),
            version=OPSET,
        )
        return self.down_proj(F.silu(gate) * up)


class HalfMLP(nn.Module):
    """``models.decoder.MLP`` between float16 matmuls.

    Gate and up stay separate: splitting a joint float16 result takes 2.4 ms of a prompt of 1024 tokens at 7 B (on an
    H100; a step of one row takes the same time either way). The activations between the matmuls are float16 without a
    cast. The gate is rounded once more. No value exceeds float16 that the next matmul could have taken.
    """

    def __init__(self, original: MLP, matmuls: Matmuls) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = matmuls(original.gate_proj), matmuls(original.up_proj)
        self.down_proj = matmuls(original.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).half(), self.up_proj(x).half()
        silu = ops.symbolic(
            "com.microsoft::QuickGelu", (gate,), attrs={"alpha": 1.0}, dtype=gate.dtype, shape=gate.shape, version=1
        )
        return self.down_proj((silu * up).float())
