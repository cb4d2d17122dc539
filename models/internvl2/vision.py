"""InternViT-300M and the pixel shuffle behind it (docs/facts.md 10.1).

Parameter names are the checkpoint's, below ``vision_model.`` and with ``mlp1.`` for the projector. Shapes: N frames, P
patches, D tower width, H decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract.pipeline import PIXELS, EachUnit, Stage, StageInput
from .. import attention
from ..config import Part
from ..connectors import patches

#: Patches on each side of a cell that the pixel shuffle makes one token (``downsample_ratio`` 0.5).
SHUFFLE = 2
PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class TowerConfig:
    """An InternViT. All its layers are used."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    qkv_bias: bool

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ProjectorConfig:
    """From tower features ``[N, grid * grid, in_size]`` to tokens of width ``out_size``."""

    in_size: int
    out_size: int
    grid: int


class Embeddings(nn.Module):
    """The class token and the patches, with their positions added."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.patch_embedding = nn.Conv2d(3, size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.grid**2 + 1, size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.position_embedding


class SelfAttention(nn.Module):
    """Multi-head attention; queries, keys and values come from one matmul."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attention.current().full(query, key, value, self.num_heads))


class MLP(nn.Module):
    """Two layers with exact GELU between."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each scaled channel by channel before it is added."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Encoder(nn.Module):
    """All layers; no norm follows them."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Tower(nn.Module):
    """The last hidden state without the class token."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values ``[N, 3, S, S]`` -> features ``[N, P, D]``."""
        return self.encoder(self.embeddings(pixel_values))[:, 1:]


class Projector(nn.Module):
    """The four patches of a cell side by side, then a norm and two layers."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.grid, joined = config.grid, config.in_size * SHUFFLE**2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(joined, eps=PROJECTOR_EPS),
            nn.Linear(joined, config.out_size),
            nn.GELU(),
            nn.Linear(config.out_size, config.out_size),
        )

    def shuffle(self, features: Tensor) -> Tensor:
        """features ``[N, P, D]`` -> ``[N, P / 4, 4 D]``; a cell's channels are by row, column, channel (``v2``)."""
        cells = patches(features.unflatten(1, (1, self.grid, self.grid)), (SHUFFLE, SHUFFLE), 0)
        return cells.flatten(3).flatten(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, D]`` -> tokens ``[N, P / 4, H]``."""
        return self.mlp1(self.shuffle(features))


def vision_parts(tower: TowerConfig, out_size: int) -> tuple[Part, ...]:
    """The stages ``vision`` and ``connector``, both frame by frame."""
    projector = ProjectorConfig(in_size=tower.hidden_size, out_size=out_size, grid=tower.grid)
    return (
        Part(_stage("vision", "pixel_values", PIXELS, "features"), Tower, tower),
        Part(_stage("connector", "features", "vision", "visual_tokens"), Projector, projector),
    )


def _stage(name: str, takes: str, source: str, output: str) -> Stage:
    return Stage(name=name, unit=EachUnit(), inputs=(StageInput(takes, source),), output=output)
