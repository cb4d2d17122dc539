"""Experts against the router's numbers of the original implementation and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from intertitle.models.config import DecoderConfig
from intertitle.models.decoder import Decoder, Router, SparseMLP, choose_experts
from torch import Tensor

LAYERS = 3


@pytest.fixture(scope="module")
def heard(opened, expected) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Router logits, chosen experts and their weights of each layer, for the fixture's prompt."""
    checkpoint, embeds = opened("clip-mixtral"), expected("clip-mixtral")["video.inputs_embeds"]
    decoder, length, scores = checkpoint.load("decoder"), len(embeds), list[Tensor]()
    assert isinstance(decoder, Decoder)
    hooks = [
        module.register_forward_hook(lambda _, __, output: scores.append(output))
        for module in decoder.modules()
        if isinstance(module, Router)
    ]
    with torch.no_grad():
        at = torch.tensor([length - 1])
        past = decoder.empty_cache(1, length)
        decoder(torch.from_numpy(embeds)[None], at.int(), torch.tensor(length).int(), at[None], past)
    for hook in hooks:
        hook.remove()
    assert len(scores) == LAYERS
    return [(each, *reversed(choose_experts(each, 2))) for each in scores]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_router(layer, heard, expected, relative_error):
    scores, chosen, weights = heard[layer]
    numbers = expected("clip-mixtral")
    assert relative_error(scores, numbers[f"video.router_logits.layer{layer}"]) < 1e-5
    np.testing.assert_array_equal(chosen, numbers[f"video.router_topk.layer{layer}"])
    assert relative_error(weights, numbers[f"video.router_weights.layer{layer}"]) < 1e-5


def test_transformers_has_the_same_layer(relative_error):
    """With three of five experts, too: the numbers of the fixture are those of two of eight."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    theirs_config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=5, num_experts_per_tok=3, num_attention_heads=4
    )
    config = DecoderConfig(32, 48, 1, 4, 4, 8, 10, 1e-5, 1e4, 16, num_experts=5, experts_per_token=3)
    torch.manual_seed(0)
    mine, theirs = SparseMLP(config), modeling.MixtralSparseMoeBlock(theirs_config)
    state = {name: torch.randn_like(value) * 0.2 for name, value in mine.state_dict().items()}
    mine.load_state_dict(state)
    # transformers 5 stacks the experts, gate and up one below the other.
    experts = range(5)
    theirs.load_state_dict(
        {
            "gate.weight": state["gate.weight"],
            "experts.gate_up_proj": torch.stack(
                [torch.cat([state[f"experts.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in experts]
            ),
            "experts.down_proj": torch.stack([state[f"experts.{e}.down_proj.weight"] for e in experts]),
        }
    )
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        out = theirs(x)
        assert relative_error(mine(x), out[0] if isinstance(out, tuple) else out) < 1e-6
