from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.models.config import VisionConfig
from intertitle.models.merging import merge_counts, merge_tokens
from intertitle.models.vision import VisionTower

SIZES = dict(hidden_size=48, intermediate_size=80, num_heads=3, image_size=60, patch_size=14)


def dfn5b(keep: float) -> VisionConfig:
    return VisionConfig("clip", 1280, 5120, 32, 16, 378, 14, 1e-5, "quick_gelu", keep=keep)


def transformers_tower(kind: str, act: str):
    transformers = pytest.importorskip("transformers")
    names = {"clip": ("CLIPVisionConfig", "CLIPVisionModel"), "siglip": ("SiglipVisionConfig", "SiglipVisionModel")}
    config_name, model_name = names[kind]
    values = {
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": SIZES["intermediate_size"],
        "num_attention_heads": SIZES["num_heads"],
        "image_size": SIZES["image_size"],
        "patch_size": SIZES["patch_size"],
        "num_hidden_layers": 4,
        "hidden_act": act,
        "layer_norm_eps": 1e-4,
    }
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**values)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(("kind", "act"), [("clip", "quick_gelu"), ("siglip", "gelu_pytorch_tanh"), ("clip", "gelu")])
@pytest.mark.parametrize("select_layer", [-2, -3])
def test_tower_is_transformers_hidden_state(kind, act, select_layer, relative_error):
    oracle = transformers_tower(kind, act)
    tower = VisionTower(
        VisionConfig(kind, num_layers=4, layer_norm_eps=1e-4, hidden_act=act, select_layer=select_layer, **SIZES)
    )
    weights = {name.removeprefix("vision_model."): value for name, value in oracle.state_dict().items()}
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    pixels = torch.randn(2, 3, 60, 60)
    wanted = oracle(pixels, output_hidden_states=True).hidden_states[select_layer]
    wanted = wanted[:, 1:] if kind == "clip" else wanted
    assert relative_error(tower.eval()(pixels), wanted) < 1e-5


def test_only_layers_that_are_read_are_built():
    config = VisionConfig("siglip", num_layers=4, layer_norm_eps=1e-6, hidden_act="gelu", **SIZES)
    names = VisionTower(config).state_dict()
    assert {name.split(".")[2] for name in names if name.startswith("encoder.layers")} == {"0", "1", "2"}
    assert not any("post_layernorm" in name or "head." in name or "class" in name for name in names)


@pytest.mark.parametrize(
    ("keep", "tokens"),
    [(1.0, 729), (0.8, 605), (0.5, 388), (0.4, 326), (0.3, 264), (0.2, 171), (0.1, 109), (0.05, 78), (0.01, 47)],
)
def test_merging_schedule_of_auroracap(keep, tokens):
    """docs/facts.md 2.4, measured on the reference. 0.2 is 18 a layer there (729 * 0.8 / 32 = 18.2)."""
    assert 729 - sum(merge_counts(dfn5b(keep))) == tokens


def test_merging_never_takes_more_than_half():
    counts = merge_counts(VisionConfig("clip", 8, 8, 2, 1, 28, 14, 1e-5, "gelu", select_layer=-1, keep=0.01))
    # 4 patches of which 1 a layer is asked for; 5 tokens, then 4.
    assert counts == (1, 1)
    greedy = merge_counts(VisionConfig("clip", 8, 8, 1, 1, 42, 14, 1e-5, "gelu", select_layer=-1, keep=0.01))
    assert greedy == (4,)  # 8 asked for of 9 patches, but (10 - 1) // 2


def test_merge_by_hand():
    """Tokens 0 (class), 2, 4 look among 1, 3: token 4 is parallel to token 3, and weighs twice as much."""
    x = torch.tensor([[[10.0], [1.0], [2.0], [3.0], [6.0]]])
    size = torch.tensor([[[1.0], [1.0], [1.0], [1.0], [2.0]]])
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 5.0]]])
    merged, sizes = merge_tokens(x, size, metric, 1)
    assert merged.flatten().tolist() == [10.0, 2.0, 1.0, 5.0]
    assert sizes.flatten().tolist() == [1.0, 1.0, 1.0, 3.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 24), st.data())
def test_merging_keeps_the_weighted_sum_and_the_class_token(length, data):
    count = data.draw(st.integers(1, (length - 1) // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(3, length, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (3, length, 1), generator=generator).double()
    metric = torch.randn(3, length, 4, generator=generator, dtype=torch.float64)
    merged, sizes = merge_tokens(x, size, metric, count)
    assert merged.shape == (3, length - count, 5)
    torch.testing.assert_close((merged * sizes).sum(1), (x * size).sum(1))
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    torch.testing.assert_close(merged[:, 0], x[:, 0])


@pytest.mark.parametrize("keep", [None, 0.4])
def test_traced_once_for_any_number_of_frames(keep):
    tower = VisionTower(
        VisionConfig("clip", num_layers=3, layer_norm_eps=1e-5, hidden_act="quick_gelu", keep=keep, **SIZES)
    )
    tower = tower.eval().requires_grad_(False)
    example, other = torch.randn(4, 3, 60, 60), torch.randn(3, 3, 60, 60)
    frames = torch.export.Dim("frames", min=1, max=64)
    traced = torch.export.export(tower, (example,), dynamic_shapes=({0: frames},)).module()
    torch.testing.assert_close(traced(other), tower(other))
    torch.testing.assert_close(traced(other[:1]), tower(other)[:1], rtol=1e-4, atol=1e-5)


def test_frames_do_not_see_each_other(opened, expected):
    tower = opened("auroracap", keep=0.4).load("vision")
    pixels = torch.from_numpy(expected("auroracap")["pixel_values"])
    together = tower(pixels)
    torch.testing.assert_close(together[3:5], tower(pixels[3:5]), rtol=1e-4, atol=1e-5)
