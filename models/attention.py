"""The attention of every component goes through this module, so that a target's dialect can replace it.

Two shapes exist: ``full`` (the towers: every token sees every token) and ``cached`` (the decoder: causal, over a static
key/value cache, rotary embedding applied inside, because the fused kernels of the targets do so). The PyTorch
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
    longest row after this call.

    ``cos``, ``sin``: for sequential positions the rotary tables ``[context, head_dim / 2]``, of which a token takes the
    row of its place in the cache. For explicit positions the rows of the new tokens themselves,
    ``[B, S, head_dim / 2]``; then no kernel may look at places for them.
    """

    lengths: Tensor
    total_length: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def is_explicit(self) -> bool:
        """Whether ``cos`` and ``sin`` are those of the new tokens."""
        return self.cos.dim() == 3

    def turns(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, S, head_dim / 2]`` of the new tokens, which are at ``places`` int64 ``[B, S]``."""
        if self.is_explicit:
            return self.cos, self.sin
        return F.embedding(places, self.cos), F.embedding(places, self.sin)


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


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, num_heads * D]`` -> ``[B, num_heads, S, D]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of query heads ``[B, heads, S, D]`` that share key and value heads in groups: ``[B, S, heads * D]``.

    ``visible`` bool, broadcast to ``[B, heads, S, keys]``; ``None`` is causal over as many keys as queries.
    """
    groups = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=visible,
        is_causal=visible is None,
    )
    return out.transpose(1, 2).flatten(2)


class ReferenceAttention:
    """Plain PyTorch, the form every dialect is held against."""

    def full(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        heads = [split_heads(x, num_heads) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=bias)
        return out.transpose(1, 2).flatten(2)

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
        length, max_length = query.shape[1], past_key.shape[2]
        # Places of the new tokens in the cache, row by row: the last one sits at lengths[b].
        offsets = torch.arange(length, device=query.device) - (length - 1)
        places = state.lengths.long().unsqueeze(1) + offsets
        # A right-padded row has fewer real tokens than the step is long; its padding lands on place 0 and up and
        # is overwritten or masked, never seen by a real token.
        places = places.clamp(min=0)
        cos, sin = (each.unsqueeze(1) for each in state.turns(places))
        q, k = rotate(split_heads(query, num_heads), cos, sin), rotate(split_heads(key, num_kv_heads), cos, sin)
        v = split_heads(value, num_kv_heads)
        index = places[:, None, :, None].expand_as(k)
        present_key = past_key.scatter(2, index, k)
        present_value = past_value.scatter(2, index, v)
        slots = torch.arange(max_length, device=query.device)
        visible = slots <= places[:, None, :, None]
        return grouped_attention(q, present_key, present_value, visible), present_key, present_value


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
