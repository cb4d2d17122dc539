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
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.pipeline import EachUnit, Stage, StageInput, Unit, WholeClip, Window
from ..errors import CheckpointError
from .config import ConnectorConfig, Part

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
    """A projector for each token of each frame."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.mlp = build_mlp(config.kind, config.in_size, config.out_size)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` -> tokens ``[N, P, out]``."""
        return self.mlp(features)


class PooledConnector(MLPConnector):
    """A projector for the mean of all frames."""

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` -> tokens ``[1, P, out]``."""
        return self.mlp(features.mean(0, keepdim=True))


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
    """A 3-D window operation whose stride is its kernel, as what it does to one window of time.

    ``padding``: zeros on all four sides of a frame. Those in front of the clip and behind it are the stage's.
    """

    def __init__(self, kernel: tuple[int, int, int], padding: int) -> None:
        super().__init__()
        self.kernel, self.padding = kernel, padding

    def reduce(self, values: Tensor) -> Tensor:
        """``[..., kt * kh * kw, C]`` -> ``[..., C]``."""
        raise NotImplementedError

    def forward(self, windows: Tensor) -> Tensor:
        """windows ``[S, kt, H, W, C]`` -> ``[S, h, w, C]``."""
        return F.silu(self.reduce(patches(windows, self.kernel[1:], self.padding)))


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
    """What a spatio-temporal connector does to each frame alone: its first RegStage."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.grid, self.s1 = config.grid, RegStage(config.in_size, config.out_size)

    def forward(self, features: Tensor) -> Tensor:
        """features ``[N, P, in]`` of any frames -> ``[N, P, out]``."""
        return self.s1(features.unflatten(1, (self.grid, self.grid))).flatten(1, 2)


@dataclass(frozen=True)
class _Geometry:
    """A spatio-temporal connector: how its sampler pools, and whether RegStages stand around it."""

    kernel: tuple[int, int, int]
    padding: int
    pools: bool
    stages: bool


_GEOMETRIES = {
    "stc_connector": _Geometry((2, 2, 2), 1, pools=False, stages=True),
    "stc_connector_v35": _Geometry((2, 2, 2), 0, pools=False, stages=True),
    "stp_connector": _Geometry((2, 2, 2), 0, pools=True, stages=True),
    "spatial_conv": _Geometry((1, 2, 2), 1, pools=False, stages=False),
    "spatial_pool": _Geometry((1, 2, 2), 0, pools=True, stages=False),
}


class SlotPart(nn.Module):
    """What a spatio-temporal connector does to each window of time alone: sampler, second RegStage, readout."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        how, size = _GEOMETRIES[config.kind], config.out_size
        self.grid = config.grid
        self.sampler = PoolSampler(how.kernel) if how.pools else ConvSampler(size, how.kernel, how.padding)
        self.s2 = RegStage(size, size) if how.stages else nn.Identity()
        self.readout = build_mlp("mlp2x_gelu", size, size)

    def forward(self, windows: Tensor) -> Tensor:
        """windows ``[S, kt, P, C]`` -> tokens ``[S, h * w, out]``, one time slot each."""
        x = self.sampler(windows.unflatten(2, (self.grid, self.grid)))
        return self.readout(self.s2(x).flatten(1, 2))


def connector_parts(config: ConnectorConfig, source: str = "vision") -> tuple[Part, ...]:
    """The stages of the connector of ``config.kind``, from the features of the stage ``source``; the last is
    ``connector``.

    A spatio-temporal connector mixes frames only in the windows of its sampler. Raises CheckpointError for a kind that
    is not known, or whose sizes the reference could not run either.
    """
    how = _GEOMETRIES.get(config.kind)
    if how is None:
        build_mlp(config.kind, 1, 1)  # refuses an unknown kind
        return (Part(_stage("connector", WholeClip(), "features", source), PooledConnector, config),)
    if not how.stages and config.in_size != config.out_size:
        raise CheckpointError(
            f"projector type {config.kind!r} needs a vision tower as wide as the decoder ({config.out_size}), not "
            f"{config.in_size}"
        )
    parts = []
    if how.stages:
        stage = _stage("frame_connector", EachUnit(), "features", source, output="frame_tokens")
        parts.append(Part(stage, FramePart, config))
        source = stage.name
    window = Window(how.kernel[0], how.kernel[0], how.padding)
    return (*parts, Part(_stage("connector", window, "windows", source), SlotPart, config))


def mlp_part(config: ConnectorConfig, source: str = "vision") -> Part:
    """The stage ``connector`` that projects each token of each frame."""
    return Part(_stage("connector", EachUnit(), "features", source), MLPConnector, config)


def _stage(name: str, unit: Unit, takes: str, source: str, output: str = "visual_tokens") -> Stage:
    return Stage(name=name, unit=unit, inputs=(StageInput(takes, source),), output=output)
