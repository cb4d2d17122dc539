"""VideoLLaMA2-8x7B and -72B at their true sizes: checkpoints whose weights are holes, and what becomes of them.

Names and shapes are checked whole. Graphs are traced at a few layers; a layer more adds the same to each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from intertitle.contract.targets import get_target
from intertitle.export.components import captioner_parts, component_graph
from intertitle.export.graph_writer import payload_size
from intertitle.models import CaptionerCheckpoint, open_checkpoint
from intertitle.models.random_checkpoint import SIZES, write_checkpoint
from intertitle.models.stages import measured

#: Parameters as the releases state them (72.71 B and 46.70 B with the embedding; docs/facts.md), in the decoder, and of
#: the connector in millions.
RELEASES = {"videollama2-72b": (72.71e9, 1934.7e6), "videollama2-8x7b": (46.70e9, 489.2e6)}


@pytest.fixture(scope="module")
def hollow(tmp_path_factory) -> Callable[[str], CaptionerCheckpoint]:
    """``hollow(size)``: the whole checkpoint, opened. It takes no room on the disk."""
    opened: dict[str, CaptionerCheckpoint] = {}

    def make(size: str) -> CaptionerCheckpoint:
        if size not in opened:
            path = write_checkpoint(tmp_path_factory.mktemp("large") / size, SIZES[size], hollow=True)
            opened[size] = open_checkpoint(path)
        return opened[size]

    return make


def parameters(checkpoint: CaptionerCheckpoint, *components: str) -> int:
    return sum(value.numel() for name in components for value in checkpoint.module(name).parameters())


@pytest.mark.parametrize("size", RELEASES)
def test_names_shapes_and_parameters_are_the_release(size, hollow):
    checkpoint, (decoder, connector) = hollow(size), RELEASES[size]
    config = checkpoint.config.decoder
    table = config.vocab_size * config.hidden_size
    assert abs(parameters(checkpoint, "decoder") + table - decoder) < 0.005 * 1e9
    assert abs(parameters(checkpoint, "frame_connector", "connector") - connector) < 0.05 * 1e6
    files = list(checkpoint.path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 2 * decoder
    assert sum(file.stat().st_blocks for file in files) * 512 < 64e6
    assert measured(checkpoint.config, ()).tokens("connector") * 5 == 845


def shallow(checkpoint: CaptionerCheckpoint, layers: int) -> CaptionerCheckpoint:
    decoder = replace(checkpoint.config.decoder, num_layers=layers)
    return CaptionerCheckpoint(checkpoint.checkpoint, replace(checkpoint.config, decoder=decoder))


def decoder_bytes(checkpoint: CaptionerCheckpoint, layers: int, weights: str) -> int:
    """What the traced decoder of a few layers will write."""
    few, target = shallow(checkpoint, layers), get_target("cpu")
    for part in captioner_parts(few, measured(few.config, ()), torch.float32):
        if part.name == "decoder":
            return payload_size(component_graph("decoder", part.module, part.signature, target, weights).traced)
    raise AssertionError


@pytest.mark.parametrize(("size", "least", "most"), [("videollama2-72b", 44e9, 46e9), ("videollama2-8x7b", 28e9, 30e9)])
def test_the_size_of_an_int4_decoder(size, least, most, hollow):
    """4 bits a weight and a float32 scale for 32 of them: 0.625 bytes."""
    checkpoint, layers = hollow(size), hollow(size).config.decoder.num_layers
    one, two = (decoder_bytes(checkpoint, count, "int4") for count in (1, 2))
    whole = one + (layers - 1) * (two - one)
    assert least < whole < most
    assert math.isclose(whole, 0.625 * parameters(checkpoint, "decoder"), rel_tol=0.01)
