"""From tower features to visual tokens: the connector (``mm_projector_type``) families.

Everything is channels-last, so that a 1x1 convolution is a ``Linear``, a channel norm is a ``LayerNorm`` over the last
axis and the strided 3-D convolution of the sampler is one ``Linear`` over a window's values: the heavy layers are then
all matmuls, for speed and for weight quantization. Only the depthwise 3x3 is a convolution.

Sources: VideoLLaMA2 ``model/projector.py`` and ``model/videollama2_arch.py`` (connectors, pooling over time, padding),
timm 1.0.3 ``models/regnet.py`` (the RegStage block; docs/facts.md 1.3 has the measured constants). Documented there:
the average pooling of ``stp_connector`` is 2x2x2 without padding; ``spatial_conv`` is a 1x2x2 convolution that inherits
padding 1 on all three axes, so it adds an empty time slot at either end; ``spatial_pool`` is a 1x2x2 average; both
``spatial_*`` have no RegStages and feed tower features straight into layers of decoder width. The reference pools only
``linear`` and ``mlp2x_gelu`` over time and refuses other depths; that ``mlpNx_gelu`` pools alike is our assumption.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import ConnectorConfig

REGSTAGE_DEPTH = 4
NORM_EPS = 1e-5


def build_mlp(kind: str, in_size: int, out_size: int) -> nn.Module:
    """``linear`` (one Linear) or ``mlpNx_gelu`` (N Linears with exact GELU between, named 0, 2, ...)."""
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind == "linear":
        return nn.Linear(in_size, out_size)
    if match is None:
        raise CheckpointError(f"projector type {kind!r} is not supported")
    layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(out_size, out_size)]
    return nn.Sequential(*layers)


class MLPConnector(nn.Module):
    """A projector per token, over each frame (``per_frame``) or over the mean of all frames."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.per_frame = config.per_frame
        self.mlp = build_mlp(config.kind, config.in_size, config.out_size)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` -> tokens ``[N, P, out]`` per frame, ``[1, P, out]`` pooled."""
        return self.mlp(features if self.per_frame else features.mean(0, keepdim=True))


class Convolution(nn.Module):
    """A 1x1 convolution over the channel axis, or a depthwise 3x3, then a channel norm. x ``[N, H, W, C]``."""

    def __init__(self, in_size: int, out_size: int, *, depthwise: bool = False) -> None:
        super().__init__()
        self.depthwise = depthwise
        if depthwise:
            self.conv = nn.Conv2d(in_size, out_size, 3, padding=1, groups=in_size, bias=False)
        else:
            self.conv = nn.Linear(in_size, out_size, bias=False)
        self.bn = nn.LayerNorm(out_size, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.depthwise else self.conv(x)
        return self.bn(x)


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate computed from their mean over the image."""

    #: A recipe (``calibration/recipe.py``) leaves these in a float type: an error of the gate scales whole channels.
    unquantized_layers = ("fc1", "fc2")

    def __init__(self, size: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, reduced)
        self.fc2 = nn.Linear(reduced, size)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean((1, 2), keepdim=True))))
        return x * gate.sigmoid()


class Bottleneck(nn.Module):
    """RegNet block: 1x1, depthwise 3x3, squeeze-excite, 1x1, each convolution with its norm, and a shortcut."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.conv1 = Convolution(in_size, out_size)
        self.conv2 = Convolution(out_size, out_size, depthwise=True)
        # The reduced width comes from the block's input channels (timm's se_ratio 0.25), not from the gated ones.
        self.se = SqueezeExcite(out_size, round(in_size * 0.25))
        self.conv3 = Convolution(out_size, out_size)
        self.downsample = Convolution(in_size, out_size) if in_size != out_size else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.silu(self.conv1(x))
        x = self.se(F.silu(self.conv2(x)))
        return F.silu(self.conv3(x) + shortcut)


class RegStage(nn.Module):
    """Blocks ``b1`` to ``b4``. x ``[N, H, W, C]``; images do not see each other."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        for i in range(REGSTAGE_DEPTH):
            self.add_module(f"b{i + 1}", Bottleneck(in_size if i == 0 else out_size, out_size))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


def group(x: Tensor, kernel: int, padding: int) -> Tensor:
    """Frames ``[T, ...]`` in the windows of a convolution over time: ``[(T + 2 padding) // kernel, kernel, ...]``.

    Zero frames are added in front and behind; what does not fill a window at the end is dropped.
    """
    empty = x.new_zeros(padding, *x.shape[1:])
    x = torch.cat((empty, x, empty))
    return x[: len(x) // kernel * kernel].unflatten(0, (-1, kernel))


def patches(x: Tensor, kernel: tuple[int, int], padding: int) -> Tensor:
    """Non-overlapping windows of ``x [S, kt, H, W, C]`` over height and width: ``[S, h, w, kt * kh * kw, C]``.

    Zero padding on all four sides first; what does not fill a window at the end is dropped.
    """
    if padding:
        x = F.pad(x, (0, 0) + (padding,) * 4)
    slots, kt, height, width, channels = x.shape
    kh, kw = kernel
    h, w = height // kh, width // kw
    x = x[:, :, : h * kh, : w * kw].reshape(slots, kt, h, kh, w, kw, channels)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(slots, h, w, kt * kh * kw, channels)


class Sampler(nn.Module):
    """A 3-D window operation whose stride is its kernel, as what it does to one window of time."""

    def __init__(self, kernel: tuple[int, int, int], padding: int) -> None:
        super().__init__()
        self.kernel, self.padding = kernel, padding

    def reduce(self, values: Tensor) -> Tensor:
        """``[..., kt * kh * kw, C]`` -> ``[..., C]``."""
        raise NotImplementedError

    def sample(self, windows: Tensor) -> Tensor:
        """windows ``[S, kt, H, W, C]`` -> ``[S, h, w, C]``; time is already padded and grouped (``group``)."""
        return F.silu(self.reduce(patches(windows, self.kernel[1:], self.padding)))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[T, H, W, C]`` -> ``[t, h, w, C]``."""
        return self.sample(group(x, self.kernel[0], self.padding))


class ConvSampler(Sampler):
    """Conv3d as one Linear of K = kt*kh*kw*C (order t, h, w, channel), then SiLU."""

    def __init__(self, size: int, kernel: tuple[int, int, int], padding: int) -> None:
        super().__init__(kernel, padding)
        self.linear = nn.Linear(kernel[0] * kernel[1] * kernel[2] * size, size)

    def reduce(self, values: Tensor) -> Tensor:
        return self.linear(values.flatten(-2))


class PoolSampler(Sampler):
    """AvgPool3d without padding, then SiLU."""

    def __init__(self, kernel: tuple[int, int, int]) -> None:
        super().__init__(kernel, 0)

    def reduce(self, values: Tensor) -> Tensor:
        return values.mean(-2)


class FramePart(nn.Module):
    """What a spatio-temporal connector does to each frame on its own: its first RegStage."""

    def __init__(self, grid: int, s1: nn.Module) -> None:
        super().__init__()
        self.grid, self.s1 = grid, s1

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` of any frames -> ``[N, P, out]``."""
        return self.s1(features.unflatten(1, (self.grid, self.grid))).flatten(1, 2)


class SlotPart(nn.Module):
    """What a spatio-temporal connector does to each window of time on its own: sampler, second RegStage, readout."""

    def __init__(self, grid: int, sampler: Sampler, s2: nn.Module, readout: nn.Module) -> None:
        super().__init__()
        self.grid, self.sampler, self.s2, self.readout = grid, sampler, s2, readout

    def forward(self, windows: Tensor) -> Tensor:
        """windows ``[S, kt, P, C]`` -> tokens ``[S, h * w, out]``, one time slot each."""
        x = self.sampler.sample(windows.unflatten(2, (self.grid, self.grid)))
        return self.readout(self.s2(x).flatten(1, 2))


class SpatialTemporalConnector(nn.Module):
    """RegStage, sampler, RegStage, two-layer readout; the ``spatial_*`` kinds have no RegStages.

    Only the sampler mixes frames, and only inside its windows: ``frame_part`` and ``slot_part`` with ``group`` between
    them compute the same as ``forward``, frame by frame and window by window.
    """

    def __init__(self, config: ConnectorConfig, sampler: Sampler, *, stages: bool) -> None:
        super().__init__()
        self.grid, self.stages = config.grid, stages
        self.s1 = RegStage(config.in_size, config.out_size) if stages else nn.Identity()
        self.sampler = sampler
        self.s2 = RegStage(config.out_size, config.out_size) if stages else nn.Identity()
        self.readout = build_mlp("mlp2x_gelu", config.out_size, config.out_size)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` of the N frames of one clip -> tokens ``[1, t * h * w, out]``, t outermost."""
        x = features.unflatten(1, (self.grid, self.grid))
        x = self.s2(self.sampler(self.s1(x)))
        return self.readout(x.flatten(0, 2).unsqueeze(0))

    @property
    def time_kernel(self) -> int:
        """Frames in one window."""
        return self.sampler.kernel[0]

    @property
    def time_padding(self) -> int:
        """Zero frames (of ``frame_part``'s output) in front of the first window's frames and behind the last."""
        return self.sampler.padding

    def frame_part(self) -> FramePart | None:
        """The part before the sampler, sharing its modules with this one; ``None`` where there is nothing to do."""
        return FramePart(self.grid, self.s1) if self.stages else None

    def slot_part(self) -> SlotPart:
        """The part from the sampler on, sharing its modules with this one."""
        return SlotPart(self.grid, self.sampler, self.s2, self.readout)


def build_connector(config: ConnectorConfig) -> nn.Module:
    """The connector of ``config.kind``: features ``[N, P, in_size]`` -> tokens ``[blocks, tokens, out_size]``.

    Raises CheckpointError for a kind that is not known, or whose sizes the reference could not run either.
    """
    size = config.out_size
    if config.kind.startswith("spatial_") and config.in_size != size:
        raise CheckpointError(
            f"projector type {config.kind!r} needs a vision tower as wide as the decoder ({size}), not {config.in_size}"
        )
    if config.kind == "stc_connector":
        return SpatialTemporalConnector(config, ConvSampler(size, (2, 2, 2), padding=1), stages=True)
    if config.kind == "stc_connector_v35":
        return SpatialTemporalConnector(config, ConvSampler(size, (2, 2, 2), padding=0), stages=True)
    if config.kind == "stp_connector":
        return SpatialTemporalConnector(config, PoolSampler((2, 2, 2)), stages=True)
    if config.kind == "spatial_conv":
        return SpatialTemporalConnector(config, ConvSampler(size, (1, 2, 2), padding=1), stages=False)
    if config.kind == "spatial_pool":
        return SpatialTemporalConnector(config, PoolSampler((1, 2, 2)), stages=False)
    return MLPConnector(config)
