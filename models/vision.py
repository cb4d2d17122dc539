"""CLIP and SigLIP vision towers, up to the hidden state that the captioner reads.

Parameter names are those of transformers' ``CLIPVisionModel`` and ``SiglipVisionModel`` below ``vision_model.``. Layers
after the selected hidden state, the final norm and SigLIP's pooling head do not exist here: nothing reads them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.pipeline import PIXELS, EachUnit, Stage, StageInput
from . import attention
from .config import Part, VisionConfig
from .merging import merge_counts, merge_tokens


class Embeddings(nn.Module):
    """Patches (and CLIP's class token) with their positions added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        has_class = config.kind == "clip"
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=not has_class
        )
        self.position_embedding = nn.Embedding(config.num_patches + has_class, config.hidden_size)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if has_class else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(x.shape[0], 1, -1), x), dim=1)
        return x + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Multi-head attention with biases; also returns the keys, which token merging measures similarity on."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self.k_proj(x)
        out = attention.current().full(self.q_proj(x), key, self.v_proj(x), self.num_heads)
        return self.out_proj(out), key


class MLP(nn.Module):
    """Two layers with the tower's activation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_pytorch_tanh" else "none")
        return self.fc2(x)


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, with ``merged`` tokens merged away in between."""

    def __init__(self, config: VisionConfig, merged: int) -> None:
        super().__init__()
        self.num_heads, self.merged = config.num_heads, merged
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        out, key = self.self_attn(self.layer_norm1(x))
        x = x + out
        if self.merged:
            metric = key.unflatten(-1, (self.num_heads, -1)).mean(2)
            x, size = merge_tokens(x, size, metric, self.merged)
        return x + self.mlp(self.layer_norm2(x)), size


class Encoder(nn.Module):
    """The layers that reach the selected hidden state.

    AuroraCap's reference adds log(size) to the logits along the query axis, where softmax cancels it; it is left out.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, merged) for merged in merge_counts(config))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.ones_like(x[..., :1])
        for layer in self.layers:
            x, size = layer(x, size)
        return x


class VisionTower(nn.Module):
    """``hidden_states[select_layer]`` of a CLIP or SigLIP tower, without the class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        # The misspelt name is the checkpoints'.
        self.pre_layrnorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.kind == "clip" else None
        )
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values ``[N, 3, S, S]`` -> features ``[N, T, D]``, T the patches that merging leaves."""
        x = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            x = self.encoder(self.pre_layrnorm(x))
            return x[:, 1:]
        return self.encoder(x)


def tower_part(config: VisionConfig, merges: bool = False) -> Part:
    """The stage ``vision``: pixels ``[N, 3, S, S]`` to ``features [N, P, D]``, frame by frame. ``merges``: its share of
    tokens may be chosen."""
    stage = Stage(name="vision", unit=EachUnit(), inputs=(StageInput("pixel_values", PIXELS),), output="features")
    return Part(stage, VisionTower, config, _keeping if merges else None)


def _keeping(config: VisionConfig, keep: float) -> VisionConfig:
    return replace(config, keep=float(keep))
