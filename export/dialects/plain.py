"""The ``plain`` dialect for TensorRT 10.3 (JetPack 6), which lacks the operators of ``standard``.

The graph is the same, but attention, rotary embedding and norms are spelled out in opset 21, the first one with int4
and blocks. The cache is written by selecting, for each slot, the old value or the new token. A scatter would be a layer
that TensorRT does not fuse, and the cache is copied anyway: nothing is updated in place before TensorRT 10.15. Matmuls
have the same types as in ``standard``; the softmax is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract.dialects import DIALECTS
from ...models.attention import rotate
from .standard import StandardAttention

OPSET = DIALECTS["plain"].opset


class PlainAttention(StandardAttention):
    """Attention in elementary operators, with matmuls in ``dtype``."""

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, heads, S, D]``. Heads that share keys and values are grouped, so that neither is copied."""
        rows, heads, length, width = query.shape
        shared = key.shape[1]
        grouped = query.reshape(rows, shared, heads // shared * length, width)
        scores = (grouped @ key.transpose(2, 3)).float() * width**-0.5
        scores = scores.reshape(rows, heads, length, key.shape[2])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        elif mask is not None:
            scores = scores + mask.float()
        weights = scores.softmax(-1).to(value.dtype)
        out = weights.reshape(rows, shared, heads // shared * length, key.shape[2]) @ value
        return out.reshape(rows, heads, length, width)

    @staticmethod
    def _write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """``cache [B, heads, max, D]`` with ``new [B, heads, S, D]`` from slot ``start [B]`` on."""
        slots = torch.arange(cache.shape[2]) - start.unsqueeze(1)
        inside = (slots >= 0) & (slots < new.shape[2])
        index = slots.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(
            cache.shape[0], cache.shape[1], -1, cache.shape[3]
        )
        return torch.where(inside[:, None, :, None], new.gather(2, index), cache)
