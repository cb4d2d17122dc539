"""The attention of every component goes through this module, so that a target's dialect can replace it.

Two shapes exist: ``full`` (the towers: every token sees every token) and ``cached`` (the decoder: causal, over a static
key/value cache, rotary positions applied inside, because the fused kernels of the targets do so). The PyTorch
reference of both is ``ReferenceAttention``; an exporter swaps in its own implementation with ``use`` while it traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CacheState:
    """What ``cached`` needs beside queries, keys and values; the same for every layer of one call.

    ``lengths`` int32 ``[B]``: tokens in the cache after this call, less one (the convention of ONNX Runtime's
    GroupQueryAttention, which also lets rows of different length share a step). ``total_length`` int32 scalar: the
    longest row after this call. ``cos``, ``sin`` ``[context, head_dim / 2]``: rotary tables.
    """

    lengths: Tensor
    total_length: Tensor
    cos: Tensor
    sin: Tensor


class Attention(Protocol):
    """What a dialect must provide."""

    def full(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        """Attention of every query to every key, scaled by ``head_dim ** -0.5``.

        query, key, value ``[B, S, num_heads * head_dim]``; ``bias`` ``[B or 1, num_heads, S, S]`` is added to the
        logits. Returns ``[B, S, num_heads * head_dim]``.
        """
        ...

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
        """Causal attention of the new tokens over the cache, keys and values of the new tokens written into it.

        query ``[B, S, num_heads * head_dim]``, key and value ``[B, S, num_kv_heads * head_dim]`` (before rotary);
        past_key, past_value ``[B, num_kv_heads, max_length, head_dim]``, row b filled up to
        ``lengths[b] + 1 - S``. Returns the output ``[B, S, num_heads * head_dim]`` and the updated cache.
        """
        ...


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form (Llama, Mistral, Qwen2). x ``[B, heads, S, D]``, tables ``[B, 1, S, D/2]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ReferenceAttention:
    """Plain PyTorch, the form every dialect is held against."""

    def full(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        batch, length, width = query.shape
        heads = [x.unflatten(-1, (num_heads, width // num_heads)).transpose(1, 2) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=bias)
        return out.transpose(1, 2).reshape(batch, length, width)

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
        batch, length, _ = query.shape
        max_length, head_dim = past_key.shape[2:]
        # Positions of the new tokens, row by row: the last one sits at lengths[b].
        offsets = torch.arange(length, device=query.device) - (length - 1)
        positions = state.lengths.long().unsqueeze(1) + offsets
        # A right-padded row has fewer real tokens than the step is long; its padding lands on position 0 and up and
        # is overwritten or masked, never seen by a real token.
        positions = positions.clamp(min=0)
        cos, sin = state.cos[positions].unsqueeze(1), state.sin[positions].unsqueeze(1)
        q = rotate(query.unflatten(-1, (num_heads, head_dim)).transpose(1, 2), cos, sin)
        k = rotate(key.unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2), cos, sin)
        v = value.unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2)
        index = positions[:, None, :, None].expand_as(k)
        present_key = past_key.scatter(2, index, k)
        present_value = past_value.scatter(2, index, v)
        slots = torch.arange(max_length, device=query.device)
        visible = slots <= positions[:, None, :, None]
        groups = num_heads // num_kv_heads
        out = F.scaled_dot_product_attention(
            q,
            present_key.repeat_interleave(groups, dim=1),
            present_value.repeat_interleave(groups, dim=1),
            attn_mask=visible,
        )
        return out.transpose(1, 2).reshape(batch, length, num_heads * head_dim), present_key, present_value


_REFERENCE = ReferenceAttention()
_current: ContextVar[Attention | None] = ContextVar("attention", default=None)


def current() -> Attention:
    """The implementation in force."""
    return _current.get() or _REFERENCE


@contextmanager
def use(implementation: Attention) -> Iterator[None]:
    """Route the attention of every module through ``implementation`` inside the block (while tracing a dialect)."""
    token = _current.set(implementation)
    try:
        yield
    finally:
        _current.reset(token)
