from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from intertitle.errors import CheckpointError
from intertitle.models.config import ConnectorConfig
from intertitle.models.connectors import Bottleneck, ConvSampler, PoolSampler, build_connector, group
from intertitle.models.sources import from_conv1x1, from_conv3d


def connector(kind: str, grid: int = 4, frames: int = 4, in_size: int = 8, out_size: int = 8, **more):
    return build_connector(ConnectorConfig(kind, in_size, out_size, grid, frames, **more)).eval()


@pytest.mark.parametrize(
    ("grid", "frames", "padded", "unpadded"),
    [(24, 8, 845, 576), (24, 16, 1521, 1152), (27, 8, 980, 676), (27, 16, 1764, 1352)],
)
def test_token_counts_of_released_checkpoints(grid, frames, padded, unpadded):
    """docs/facts.md 1.3, measured end to end on the reference."""
    with torch.device("meta"):
        features = torch.zeros(frames, grid * grid, 8)
        counts = {
            kind: connector(kind, grid, frames)(features).shape for kind in ("stc_connector", "stc_connector_v35")
        }
    assert counts == {"stc_connector": (1, padded, 8), "stc_connector_v35": (1, unpadded, 8)}


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
    assert connector(kind, grid=5, frames=5)(torch.randn(5, 25, 8)).shape == (1, tokens, 8)


@pytest.mark.parametrize(
    ("kind", "in_size", "out_size", "millions"),
    [("stc_connector", 1024, 4096, 489.2), ("stc_connector_v35", 1152, 3584, 376.889248)],
)
def test_parameters_of_released_connectors(kind, in_size, out_size, millions):
    with torch.device("meta"):
        module = connector(kind, 24, 8, in_size, out_size)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("kernel", "padding"), [((2, 2, 2), 0), ((2, 2, 2), 1), ((1, 2, 2), 1)])
def test_conv_sampler_is_conv3d(kernel, padding):
    weight, bias, x = torch.randn(6, 6, *kernel), torch.randn(6), torch.randn(5, 7, 4, 6)
    sampler = ConvSampler(6, kernel, padding)
    source = from_conv3d("w", tuple(sampler.linear.weight.shape), kernel)
    assert source.shapes == (tuple(weight.shape),)
    sampler.load_state_dict({"linear.weight": source.build(weight), "linear.bias": bias})
    wanted = F.silu(F.conv3d(x.permute(3, 0, 1, 2).unsqueeze(0), weight, bias, stride=kernel, padding=padding))
    torch.testing.assert_close(sampler(x), wanted[0].permute(1, 2, 3, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2)])
def test_pool_sampler_is_avg_pool3d(kernel):
    x = torch.randn(5, 7, 4, 6)
    wanted = F.silu(F.avg_pool3d(x.permute(3, 0, 1, 2), kernel)).permute(1, 2, 3, 0)
    torch.testing.assert_close(PoolSampler(kernel)(x), wanted)


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
    module, features = connector("stc_connector_v35", grid=4, frames=6), torch.randn(6, 16, 8)
    pairs = torch.cat([module(pair) for pair in features.split(2)], dim=1)
    torch.testing.assert_close(module(features), pairs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize(
    "kind", ["stc_connector", "stc_connector_v35", "stp_connector", "spatial_conv", "spatial_pool"]
)
def test_frames_and_windows_can_be_computed_apart(kind, frames):
    """Each frame alone, then each window alone, is the whole (an odd frame at the end falls away, or meets zeros)."""
    if frames == 1 and kind in ("stc_connector_v35", "stp_connector"):
        pytest.skip("one frame fills no window")
    module, features = connector(kind, grid=5, frames=frames), torch.randn(frames, 25, 8)
    wanted = module(features)
    framewise = module.frame_part()
    assert (framewise is None) == kind.startswith("spatial_")
    x = features if framewise is None else torch.cat([framewise(frame[None]) for frame in features])
    windows, part = group(x, module.time_kernel, module.time_padding), module.slot_part()
    tokens = torch.cat([part(window[None]) for window in windows])
    torch.testing.assert_close(tokens.flatten(0, 1)[None], wanted, rtol=1e-4, atol=1e-5)


def test_group_is_the_windows_of_a_convolution_over_time():
    """Conv1d with a kernel of ones that tells its inputs apart: frames are powers of ten."""
    x = 10.0 ** torch.arange(5)
    for kernel, padding in ((2, 1), (2, 0), (1, 1), (3, 1)):
        wanted = F.conv1d(x[None, None], torch.ones(1, 1, kernel), stride=kernel, padding=padding)
        torch.testing.assert_close(group(x[:, None], kernel, padding).sum((1, 2)), wanted[0, 0])


def test_mlp_pools_over_time_unless_per_frame():
    features = torch.randn(4, 16, 8)
    pooled, framewise = connector("mlp2x_gelu"), connector("mlp2x_gelu", per_frame=True)
    framewise.load_state_dict(pooled.state_dict())
    assert framewise(features).shape == (4, 16, 8)
    torch.testing.assert_close(pooled(features), framewise(features.mean(0, keepdim=True)))


def test_unknown_and_impossible_kinds_are_refused():
    with pytest.raises(CheckpointError, match="'identity'"):
        connector("identity")
    with pytest.raises(CheckpointError, match="spatial_conv"):
        connector("spatial_conv", in_size=8, out_size=16)
