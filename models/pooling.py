"""Frames pooled to fewer tokens, and the learned vector that marks the ends of lines: LLaVA-Video, LLaVA-NeXT-Video.

The tokens of a frame stand in rows of a square grid (docs/facts.md 8.2, 9.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..contract.pipeline import EachUnit, Stage, StageInput
from .config import ConnectorConfig, Part
from .connectors import MLPConnector, build_mlp

PoolMode = Literal["average", "max", "bilinear"]
LineEnd = Literal["row", "frame", "none"]


@dataclass(frozen=True)
class PoolConfig:
    """A projector and the pooling beside it.

    ``pool``: ``average`` and ``max`` take squares of ``stride`` and leave out what fills none, ``bilinear`` resamples
    the grid to ``ceil(side / stride)`` without a filter. ``line_end``: where the learned vector stands.
    """

    projector: ConnectorConfig
    pool: PoolMode
    stride: int = 2
    line_end: LineEnd = "none"


class Pool(nn.Module):
    """Tokens of a square grid to those of a smaller one."""

    def __init__(self, config: PoolConfig) -> None:
        super().__init__()
        self.mode, self.stride, self.grid = config.pool, config.stride, config.projector.grid

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, grid * grid, C]`` -> ``[N, side, side, C]``."""
        x = x.unflatten(1, (self.grid, self.grid))
        if self.mode == "bilinear":
            return _resampled(_resampled(x, 1, self.stride), 2, self.stride)
        side = self.grid // self.stride
        squares = x[:, : side * self.stride, : side * self.stride].unflatten(2, (side, self.stride))
        squares = squares.unflatten(1, (side, self.stride))
        return squares.mean((2, 4)) if self.mode == "average" else squares.amax((2, 4))


def _resampled(x: Tensor, axis: int, stride: int) -> Tensor:
    """An axis of x at ``ceil(length / stride)`` places, between its two neighbours: ``interpolate`` of PyTorch with
    ``align_corners=False``."""
    length = x.shape[axis]
    size = -(-length // stride)
    places = [max((i + 0.5) * length / size - 0.5, 0.0) for i in range(size)]
    lower = [int(place) for place in places]
    upper = [min(place + 1, length - 1) for place in lower]
    shares = [place - below for place, below in zip(places, lower, strict=True)]
    share = torch.tensor(shares, dtype=torch.float32, device=x.device).unflatten(0, (size, *[1] * (x.ndim - 1 - axis)))
    low, high = (x.index_select(axis, torch.tensor(index, device=x.device)) for index in (lower, upper))
    return low * (1 - share) + high * share


class ProjectedPool(MLPConnector):
    """Projector, pooling, line ends: LLaVA-Video (``encode_images``, ``get_2dPool``, ``add_token_per_grid``)."""

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config.projector)
        self.pool, self.line_end = Pool(config), config.line_end
        self.newline = nn.Parameter(torch.zeros(config.projector.out_size)) if config.line_end != "none" else None

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` -> tokens ``[N, p, out]``."""
        x = self.pool(self.mlp(features))
        if self.newline is None:
            return x.flatten(1, 2)
        if self.line_end == "frame":
            x = x.flatten(1, 2)
            return torch.cat((x, self.newline.expand(x.shape[0], 1, -1)), 1)
        return torch.cat((x, self.newline.expand(x.shape[0], x.shape[1], 1, -1)), 2).flatten(1, 2)


class PooledProjector(nn.Module):
    """Pooling, then the projector: LLaVA-NeXT-Video (``vision_resampler``, ``multi_modal_projector``)."""

    def __init__(self, config: PoolConfig) -> None:
        super().__init__()
        projector = config.projector
        self.pool, self.mlp = Pool(config), build_mlp(projector.kind, projector.in_size, projector.out_size)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` -> tokens ``[N, p, out]``."""
        return self.mlp(self.pool(features).flatten(1, 2))


def projected_pool_part(config: PoolConfig) -> Part:
    """The stage ``connector``: projector, pooling, line ends, frame by frame."""
    return Part(_STAGE, ProjectedPool, config)


def pooled_projector_part(config: PoolConfig) -> Part:
    """The stage ``connector``: pooling, then the projector, frame by frame."""
    return Part(_STAGE, PooledProjector, config)


_STAGE = Stage(name="connector", unit=EachUnit(), inputs=(StageInput("features", "vision"),), output="visual_tokens")
