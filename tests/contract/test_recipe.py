"""Recipes: which layer gets which format, that the bundle states it, and that ``verify`` reads it back."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import msgspec
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intertitle.calibration.quantize import dequantize_int4_positive, quantize_int4_positive
from intertitle.calibration.recipe import component_rules, linear_layers, make_recipe, patterns, roundings, roundings_of
from intertitle.contract.formats import FORMATS, Rule, decide
from intertitle.contract.targets import TARGETS
from intertitle.export.compile import compile_bundle
from intertitle.export.components import component_graph
from intertitle.export.trace import Signature
from intertitle.models import open_checkpoint
from intertitle.runtime.bundle import Bundle
from torch import nn


def lines(rules: list[Rule]) -> list[tuple]:
    return [(rule.component, rule.pattern, rule.format, rule.block_size) for rule in rules]


def test_the_recipe_of_int8_encoders(data_dir):
    """Worked out by hand from the fixture's shapes: the gates of squeeze-excite, and BEATs' layers of 4 x 8 weights."""
    source = open_checkpoint(data_dir / "av-qwen2")
    assert lines(make_recipe(source, TARGETS["cpu"], "int4", "int8", 64)) == [
        ("vision", "*", "int8", 128),
        ("frame_connector", "s*.b*.se.fc*", "fp32", None),
        ("frame_connector", "*", "int8", 128),
        ("connector", "s*.b*.se.fc*", "fp32", None),
        ("connector", "*", "int8", 128),
        ("audio", "tower.encoder.layers.*.self_attn.grep_linear", "fp32", None),
        ("audio", "*", "int8", 128),
        ("decoder", "*", "int4", 64),
    ]
    assert lines(make_recipe(source, TARGETS["tensorrt"], "fp16", "fp16")) == [
        (name, "*", "fp16", None) for name in ("vision", "frame_connector", "connector", "audio", "decoder")
    ]


class Mixed(nn.Module):
    """A gate that stays unquantized, a width that 32 does not divide, a small router, and the rest."""

    unquantized_layers = ("gate",)

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(64, 4), nn.Linear(64, 64)
        self.odd, self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.odd(x))
        return self.down(self.gate(x) * self.router(x).softmax(-1).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("target", "format", "expected"),
    [
        ("cpu", "fp32", {}),
        ("cpu", "int4", {"gate": "fp32"}),
        ("cuda", "int4", {"gate": "fp16"}),
        ("cuda", "fp16", {}),
        ("tensorrt", "int4", {"gate": "fp16", "odd": "fp16"}),
        # router, odd and down have fewer than 4096 weights.
        ("cpu", "int8", {"router": "fp32", "gate": "fp32", "odd": "fp32", "down": "fp32"}),
        ("tensorrt", "int8", {"router": "fp16", "gate": "fp16", "odd": "fp16", "down": "fp16"}),
    ],
)
def test_layers_that_are_left_out(target, format, expected):
    with torch.device("meta"):
        module = Mixed()
    rules = component_rules("decoder", module, TARGETS[target], format)
    found = {name: decide(rules, "decoder", name).format for name in linear_layers(module)}
    assert found == dict.fromkeys(found, format) | expected
    assert (rules[-1].pattern, rules[-1].format) == ("*", format)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_each_layer_is_lowered_by_its_rule(target):
    """A component of four formats: the graph has a node of each kind where its rule says so."""
    with torch.device("meta"):
        module = Mixed()
    blocks = 128 if target == "cpu" else None
    recipe = [
        Rule(component="decoder", pattern="router", format="fp32"),
        Rule(component="decoder", pattern="odd", format=TARGETS[target].unquantized("int4")),
        Rule(component="decoder", pattern="down", format="int8", block_size=blocks),
        Rule(component="decoder", pattern="*", format="int4", block_size=64),
    ]
    signature = Signature((torch.zeros(3, 48),), ({0: "rows"},), ("x",), ("y",))
    graph = component_graph("decoder", module, signature, TARGETS[target], "int4", recipe)
    assert {name: (each.layout.format, each.block_size) for name, each in graph.stored.items()} == {
        "gate": ("int4", 64),
        "up": ("int4", 64),
        "down": ("int8", blocks),
    }
    kinds = {weight.entry: weight.dtype.name for weight in graph.traced.weights.values()}
    plain = "FLOAT" if target == "cpu" else "FLOAT16"
    assert (kinds["router.weight"], kinds["odd.weight"]) == ("FLOAT", plain)
    codes = {"cpu": ("qweight", "qweight8", "UINT8", "UINT8"), "tensorrt": ("codes", "codes8", "INT4", "INT8")}[target]
    assert (kinds[f"up.{codes[0]}"], kinds[f"down.{codes[1]}"]) == codes[2:]
    nodes = [node.op_type for node in graph.traced.model.graph]
    assert nodes.count("MatMulNBits" if target == "cpu" else "DequantizeLinear") == 3


def test_a_bundle_states_its_recipe_and_verify_reads_it(data_dir, tmp_path):
    source = open_checkpoint(data_dir / "clip-mistral")
    path = compile_bundle(data_dir / "clip-mistral", tmp_path / "b", target="tensorrt", encoder_weights="int8").path
    manifest = Bundle.open(path).manifest
    assert manifest.recipe == make_recipe(source, TARGETS["tensorrt"], "int4", "int8")
    stated = roundings(manifest, source)
    assert set(stated) == {"vision", "frame_connector", "connector", "decoder"}
    # A bundle without a recipe is from an older version, which decided the same.
    older = msgspec.structs.replace(manifest, recipe=[])
    again = roundings(older, source)
    assert {name: each.recipe for name, each in again.items()} == {name: each.recipe for name, each in stated.items()}
    # The tensors in the graphs are those of the layouts that the recipe gives.
    codes = {"int4": {"codes", "factors"}, "int8": {"codes8", "factors8"}}
    found: dict[str, set[str]] = {}
    for name in source.components:
        graph = onnx.load(path / manifest.components[name].graph, load_external_data=False).graph
        found[name] = {value.name.removeprefix("decoder.") for value in graph.initializer}
    formats = set()
    for part, tensors in found.items():
        for layer in linear_layers(source.module(part)):
            rule = decide(manifest.recipe, part, layer)
            formats.add(rule.format)
            inside = {tensor.removeprefix(f"{layer}.") for tensor in tensors if tensor.startswith(f"{layer}.")}
            assert inside & {"codes", "factors", "codes8", "factors8"} == codes.get(rule.format, set()), (part, layer)
    assert formats == {"int4", "int8", "fp16"}


def test_rounding_leaves_alone_what_the_recipe_leaves_alone():
    module = Mixed()
    before = {name: layer.weight.detach().clone() for name, layer in linear_layers(module).items()}
    recipe = component_rules("decoder", module, TARGETS["tensorrt"], "int4")
    roundings_of("standard", recipe)["decoder"].apply(module)
    for name, layer in linear_layers(module).items():
        if name in ("gate", "odd"):
            assert torch.equal(layer.weight, before[name]), name
        else:
            assert torch.equal(layer.weight, dequantize_int4_positive(*quantize_int4_positive(before[name], 32))), name
    assert roundings_of("ort", component_rules("decoder", module, TARGETS["cuda"], "fp16")) == {}


names = st.lists(
    st.from_regex(r"(a|layers|b1)(\.([0-9]{1,2}|x|fc[12])){0,3}", fullmatch=True), unique=True, max_size=12
)


@given(names, st.data())
def test_patterns_match_what_was_chosen_and_nothing_else(layers, data):
    chosen = [name for name in layers if data.draw(st.booleans())]
    found = patterns(chosen, [name for name in layers if name not in chosen])
    assert len(found) <= len(chosen)
    for name in layers:
        assert any(fnmatchcase(name, pattern) for pattern in found) == (name in chosen)


def test_few_patterns_for_many_layers():
    layers = [f"layers.{index}.{part}" for index in range(40) for part in ("gate", "up")]
    assert patterns([name for name in layers if name.endswith("gate")], []) == ["layers.*.gate"]
    others = ["layers.3.gate"]
    assert len(patterns([name for name in layers if name.endswith("gate") and name not in others], others)) == 39


def test_the_recipe_is_in_the_bundle_s_json(data_dir, tmp_path):
    path = compile_bundle(data_dir / "clip-mistral", tmp_path / "b", weights="int4", block_size=64).path
    written = json.loads((path / "bundle.json").read_text())["recipe"]
    assert written[-1] == {"component": "decoder", "pattern": "*", "format": "int4", "block_size": 64}
    assert {rule["format"] for rule in written} <= set(FORMATS)
