from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from intertitle.contract.pipeline import Window
from intertitle.errors import CheckpointError
from intertitle.models.config import ConnectorConfig
from intertitle.models.connectors import Bottleneck, ConvSampler, PoolSampler, connector_parts, mlp_part
from intertitle.models.sources import from_conv1x1, from_conv3d
from intertitle.models.stages import run_stages, windows
from torch import Tensor, nn


class Connector:
    """The stages of a connector, with random weights."""

    def __init__(self, kind: str, grid: int = 4, in_size: int = 8, out_size: int = 8) -> None:
        self.parts = connector_parts(ConnectorConfig(kind, in_size, out_size, grid))
        self.modules = {part.stage.name: part.build(part.config).eval() for part in self.parts}

    def __call__(self, features: Tensor) -> Tensor:
        """features ``[T, P, in]`` -> tokens ``[units, n, out]``."""
        stages = [part.stage for part in self.parts]
        return run_stages(stages, self.modules.__getitem__, {"vision": features})["connector"]


@pytest.mark.parametrize(
    ("grid", "frames", "padded", "unpadded"),
    [(24, 8, 845, 576), (24, 16, 1521, 1152), (27, 8, 980, 676), (27, 16, 1764, 1352)],
)
def test_token_counts_of_released_checkpoints(grid, frames, padded, unpadded):
    """docs/facts.md 1.3, measured end to end on the reference."""
    with torch.device("meta"):
        features = torch.zeros(frames, grid * grid, 8)
        counts = {
            kind: Connector(kind, grid)(features).flatten(0, 1).shape for kind in ("stc_connector", "stc_connector_v35")
        }
    assert counts == {"stc_connector": (padded, 8), "stc_connector_v35": (unpadded, 8)}


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("stp_connector", 2 * 2 * 2),
        ("spatial_conv", 7 * 3 * 3),  # padded on all axes: (5 + 2) / 1, (5 + 2) // 2
        ("spatial_pool", 5 * 2 * 2),
        ("mlp2x_gelu", 25),
        ("mlp3x_gelu", 25),
        ("linear", 25),
    ],
)
def test_token_counts_of_the_other_kinds(kind, tokens):
    assert Connector(kind, grid=5)(torch.randn(5, 25, 8)).flatten(0, 1).shape == (tokens, 8)


@pytest.mark.parametrize(
    ("kind", "in_size", "out_size", "millions"),
    [("stc_connector", 1024, 4096, 489.2), ("stc_connector_v35", 1152, 3584, 376.889248)],
)
def test_parameters_of_released_connectors(kind, in_size, out_size, millions):
    with torch.device("meta"):
        modules = Connector(kind, 24, in_size, out_size).modules.values()
    assert sum(p.numel() for module in modules for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("kernel", "padding"), [((2, 2, 2), 0), ((2, 2, 2), 1), ((1, 2, 2), 1)])
def test_conv_sampler_is_conv3d(kernel, padding):
    weight, bias, x = torch.randn(6, 6, *kernel), torch.randn(6), torch.randn(5, 7, 4, 6)
    sampler = ConvSampler(6, kernel, padding)
    source = from_conv3d("w", tuple(sampler.linear.weight.shape), kernel)
    assert source.shapes == (tuple(weight.shape),)
    sampler.load_state_dict({"linear.weight": source.build(weight), "linear.bias": bias})
    wanted = F.silu(F.conv3d(x.permute(3, 0, 1, 2).unsqueeze(0), weight, bias, stride=kernel, padding=padding))
    given = windows(x, Window(kernel[0], kernel[0], padding))
    torch.testing.assert_close(sampler(given), wanted[0].permute(1, 2, 3, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2)])
def test_pool_sampler_is_avg_pool3d(kernel):
    x = torch.randn(5, 7, 4, 6)
    wanted = F.silu(F.avg_pool3d(x.permute(3, 0, 1, 2), kernel)).permute(1, 2, 3, 0)
    torch.testing.assert_close(PoolSampler(kernel)(windows(x, Window(kernel[0], kernel[0]))), wanted)


def test_bottleneck_is_the_channels_first_regnet_block():
    """The block written channels-first with plain convolutions, from the formula in docs/facts.md 1.3."""
    torch.manual_seed(0)
    block, x = Bottleneck(8, 12), torch.randn(2, 5, 5, 8)
    shapes = {
        "conv1.conv": (12, 8),
        "conv3.conv": (12, 12),
        "se.fc1": (2, 12),
        "se.fc2": (12, 2),
        "downsample.conv": (12, 8),
    }
    state = {name: torch.randn_like(value) * 0.3 for name, value in block.state_dict().items()}
    kernels = {name: state[f"{name}.weight"].reshape(*shape, 1, 1) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        assert torch.equal(from_conv1x1(name, shape).build(kernels[name]), state[f"{name}.weight"])
    block.load_state_dict(state)

    def norm(y, name):
        mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        y = (y - mean) / torch.sqrt(var + 1e-5)
        return y * state[f"{name}.bn.weight"].view(1, -1, 1, 1) + state[f"{name}.bn.bias"].view(1, -1, 1, 1)

    z = x.permute(0, 3, 1, 2)
    y = F.silu(norm(F.conv2d(z, kernels["conv1.conv"]), "conv1"))
    y = F.silu(norm(F.conv2d(y, state["conv2.conv.weight"], padding=1, groups=12), "conv2"))
    gate = F.conv2d(y.mean((2, 3), keepdim=True), kernels["se.fc1"], state["se.fc1.bias"])
    y = y * F.conv2d(F.silu(gate), kernels["se.fc2"], state["se.fc2.bias"]).sigmoid()
    y = norm(F.conv2d(y, kernels["conv3.conv"]), "conv3")
    wanted = F.silu(y + norm(F.conv2d(z, kernels["downsample.conv"]), "downsample"))
    torch.testing.assert_close(block(x), wanted.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_v35_mixes_time_only_within_pairs():
    """The windows of an even number of frames can be computed pair by pair (docs/facts.md 1.3)."""
    connector, features = Connector("stc_connector_v35", grid=4), torch.randn(6, 16, 8)
    pairs = torch.cat([connector(pair) for pair in features.split(2)])
    torch.testing.assert_close(connector(features), pairs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize(
    "kind", ["stc_connector", "stc_connector_v35", "stp_connector", "spatial_conv", "spatial_pool"]
)
def test_windows_computed_apart_are_a_3d_convolution_of_the_clip(kind, frames):
    """Each frame alone, then each window alone, is the whole as the reference computes it: a 3-D convolution or pooling
    over the clip between the stages (an odd frame at the end falls away, or meets zeros)."""
    kernel = (1 if kind.startswith("spatial") else 2, 2, 2)
    padding = 1 if kind in ("stc_connector", "spatial_conv") else 0
    if frames + 2 * padding < kernel[0]:
        pytest.skip("one frame fills no window")
    connector, features = Connector(kind, grid=5), torch.randn(frames, 25, 8)
    assert ("frame_connector" in connector.modules) == (not kind.startswith("spatial_"))
    x = connector.modules.get("frame_connector", nn.Identity())(features).unflatten(1, (5, 5))
    last = connector.modules["connector"]
    clip = x.permute(3, 0, 1, 2)[None]
    if kind in ("stp_connector", "spatial_pool"):
        clip = F.avg_pool3d(clip, kernel)
    else:
        linear = last.sampler.linear
        weight = linear.weight.unflatten(1, (*kernel, 8)).permute(0, 4, 1, 2, 3)
        clip = F.conv3d(clip, weight, linear.bias, stride=kernel, padding=padding)
    slots = F.silu(clip)[0].permute(1, 2, 3, 0)
    wanted = last.readout(last.s2(slots).flatten(1, 2))
    torch.testing.assert_close(connector(features), wanted, rtol=1e-4, atol=1e-5)


def test_windows_are_those_of_a_convolution_over_time():
    """Conv1d with a kernel of ones that tells its inputs apart: frames are powers of ten."""
    x = 10.0 ** torch.arange(5)
    for kernel, stride, padding in ((2, 2, 1), (2, 2, 0), (1, 1, 1), (3, 3, 1), (3, 1, 1), (3, 2, 0), (8, 8, 0)):
        window = Window(kernel, stride, padding)
        if kernel > 5 + 2 * padding:
            assert window.count(5) == 0
            continue
        wanted = F.conv1d(x[None, None], torch.ones(1, 1, kernel), stride=stride, padding=padding)
        found = windows(x[:, None], window)
        assert len(found) == window.count(5)
        torch.testing.assert_close(found.sum((1, 2)), wanted[0, 0])


def test_mlp_pools_over_time_unless_it_is_of_each_frame():
    features, pooled = torch.randn(4, 16, 8), Connector("mlp2x_gelu")
    part = mlp_part(ConnectorConfig("mlp2x_gelu", 8, 8, 4))
    framewise = part.build(part.config).eval()
    framewise.load_state_dict(pooled.modules["connector"].state_dict())
    each = run_stages([part.stage], lambda _: framewise, {"vision": features})["connector"]
    assert each.shape == (4, 16, 8)
    torch.testing.assert_close(pooled(features), framewise(features.mean(0, keepdim=True)))


def test_unknown_and_impossible_kinds_are_refused():
    with pytest.raises(CheckpointError, match="'identity'"):
        Connector("identity")
    with pytest.raises(CheckpointError, match="spatial_conv"):
        Connector("spatial_conv", in_size=8, out_size=16)
