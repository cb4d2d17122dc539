"""The language decoder of every family: a Llama-shaped stack (Llama, Mistral, Mixtral, Qwen2).

State-dict names follow the released checkpoints without their ``model.`` prefix. The embedding table is not part of
it: the runtime looks rows up on the host and splices visual and audio tokens in before the decoder runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import attention
from .attention import CacheState
from .config import DecoderConfig


def rotary_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[context_length, head_dim / 2]`` float32; positions are divided by ``rope_factor``.

    Computed as the reference does it: inverse frequencies and angles in float32 (transformers, Llama rotary
    embedding; "linear" scaling divides the positions).
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inverse_frequency = 1.0 / (config.rope_theta**half)
    positions = torch.arange(config.context_length, dtype=torch.float32) / config.rope_factor
    angles = torch.outer(positions, inverse_frequency)
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, the mean square in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention; rotary positions and the cache live in ``attention.cached``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, state: CacheState
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out, present_key, present_value = attention.current().cached(
            query, key, value, past_key, past_value, state, self.num_heads, self.num_kv_heads
        )
        return self.o_proj(out), present_key, present_value


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The score of every expert for a token: ``[..., H]`` to ``[..., num_experts]``.

    Its weight is ``[num_experts, H]``. It is not an ``nn.Linear``, because it is never quantized: it decides which
    experts run.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def choose_experts(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best experts of each token: weights that sum to 1, and numbers int64, both ``[..., count]``.

    Mixtral's rule (transformers 4.42.4, MixtralSparseMoeBlock): softmax in float32 over all experts, then the best
    ones, divided by their sum.
    """
    weights, chosen = scores.float().softmax(-1).topk(count, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


class SparseMLP(nn.Module):
    """Several SwiGLUs ("experts"), of which each token passes the few that a router chooses (Mixtral)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = choose_experts(self.gate(tokens), self.experts_per_token)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            weighted = expert(tokens[rows]) * weights[rows, places].unsqueeze(-1).to(x.dtype)
            out = out.index_add(0, rows, weighted)
        return out.view_as(x)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config) if config.num_experts else MLP(config)

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor, state: CacheState
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, present_key, present_value = self.self_attn(self.input_layernorm(x), past_key, past_value, state)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), present_key, present_value


class Decoder(nn.Module):
    """Embeddings in, logits of the asked positions and the updated cache out; prefill and decode are one function."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # On the CPU even when the module is built on the meta device: they are computed, not read from a checkpoint.
        with torch.device("cpu"):
            cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        logits_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run S new tokens of B rows.

        inputs_embeds ``[B, S, H]``; lengths int32 ``[B]`` and total_length int32 scalar as in ``CacheState``;
        logits_index int64 ``[B, N]``: which of the S positions to project to the vocabulary (the last one when
        captioning, all of a caption's when scoring it); past: key and value ``[B, kv_heads, max_length, head_dim]`` a
        layer; position_ids int64 ``[B, S]``: the positions of the new tokens, their places in the row if ``None``.
        Returns logits ``[B, N, V]`` and the present cache.
        """
        state = CacheState(lengths, total_length, *self._rotary(position_ids))
        x, present = inputs_embeds, []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            x, key, value = layer(x, past_key, past_value, state)
            present.append((key, value))
        x = x.gather(1, logits_index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.lm_head(self.norm(x)), present

    def _rotary(self, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines as ``CacheState`` has them."""
        if position_ids is None:
            return self.cos, self.sin
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)

    def empty_cache(self, rows: int, max_length: int) -> list[tuple[Tensor, Tensor]]:
        """A zeroed cache in the module's dtype and device."""
        shape = (rows, self.config.num_kv_heads, max_length, self.config.head_dim)
        weight = self.lm_head.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]
