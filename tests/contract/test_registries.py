"""The registries fit each other and the code that they describe: every combination that a user may ask for has a place
to run, operators to be written in, and an encoder and a decoder of its weights."""

from __future__ import annotations

import sys
from itertools import product

import msgspec
import pytest
import torch
from intertitle.calibration.formats import ENCODINGS
from intertitle.contract.devices import DEVICES
from intertitle.contract.dialects import DIALECTS
from intertitle.contract.formats import FORMATS, LAYOUTS, MATMUL_TYPE, FormatName, Rule, block_size_of, decide
from intertitle.contract.targets import TARGETS, get_target
from intertitle.errors import OptionError, TargetError
from intertitle.export.dialects import forms
from intertitle.export.dialects.layers import QuantizedLinear
from intertitle.runtime import backends
from torch import nn

TAKEN = [
    (target, name)
    for target in TARGETS.values()
    for name in dict.fromkeys(target.decoder_formats + target.encoder_formats)
]


def test_every_record_has_its_name():
    for registry in (TARGETS, DEVICES, DIALECTS, FORMATS, LAYOUTS):
        assert registry
        assert {name: record.name for name, record in registry.items()} == {name: name for name in registry}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_runs_somewhere(target):
    assert target.devices
    assert set(target.devices) <= set(DEVICES)
    assert target.dialect in DIALECTS
    # A bundle runs on the device that it was compiled for before all others.
    assert target.devices[0] == target.name
    for device in target.devices:
        # Engines are of TensorRT, and everything else is not.
        assert (DEVICES[device].runtime == "tensorrt") == target.engines


def test_every_device_opens_and_runs_a_target():
    assert {device.runtime for device in DEVICES.values()} == set(backends._OPENERS)
    assert {name for target in TARGETS.values() for name in target.devices} == set(DEVICES)
    assert all(device.install and device.needs and device.modules for device in DEVICES.values())
    assert backends.AUTO not in DEVICES


def test_every_dialect_is_of_a_target_and_has_operators():
    assert {target.dialect for target in TARGETS.values()} == set(DIALECTS) == set(forms.DIALECTS)
    assert {name: forms.DIALECTS[name].opset for name in DIALECTS} == {"ort": 23, "standard": 24, "plain": 21}


@pytest.mark.parametrize(("target", "name"), TAKEN, ids=[f"{target.name}-{name}" for target, name in TAKEN])
def test_every_format_of_a_target(target, name):
    """It is lowered by the dialect of the target, and stored as its layout says."""
    layout, size = DIALECTS[target.dialect].layout(name), target.block_size(name)
    assert layout.format == name
    assert layout.blocks == (size is not None)
    dtype = getattr(torch, target.matmul_type(name))
    with torch.device("meta"):
        linear = nn.Linear(256, 24)
    lowered = forms.DIALECTS[target.dialect].matmuls[name](linear, size, dtype)
    held = {key: value for key, value in lowered.state_dict().items() if key != "bias"}
    assert tuple(held) == layout.tensors
    # What the encoder makes of a weight is what the graph holds, but for its transposition and type.
    encoded = ENCODINGS[layout.name].encode(torch.randn(24, 256), size)
    assert [tuple(tensor.shape) for tensor in encoded] == [tuple(tensor.shape) for tensor in held.values()]
    kinds = [target.matmul_type(name) if kind == MATMUL_TYPE else kind for kind in layout.types]
    # PyTorch has no int4; ``half.finish`` sets the type in the graph.
    kinds = ["int8" if kind == "int4" else kind for kind in kinds]
    assert [str(tensor.dtype) for tensor in held.values()] == [f"torch.{kind}" for kind in kinds]
    assert isinstance(lowered, QuantizedLinear) == FORMATS[name].quantized
    if FORMATS[name].quantized:
        assert (lowered.stored.layout, lowered.stored.block_size) == (layout, size)


def test_names_of_stored_tensors_tell_the_layout():
    """``half.finish`` finds the int4 codes by their name."""
    quantized = [layout for layout in LAYOUTS.values() if FORMATS[layout.format].quantized]
    names = [name for layout in quantized for name in layout.tensors]
    assert len(set(names)) == len(names)
    assert "weight" not in names


def test_layouts_and_encodings_are_the_same():
    assert set(ENCODINGS) == set(LAYOUTS)
    assert {layout.format for layout in LAYOUTS.values()} == set(FORMATS)
    for dialect in DIALECTS.values():
        assert set(dialect.layouts) == set(FORMATS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_decode_undoes_encode(name):
    """Each weight comes back within half a step of its scale, whichever dtype the checkpoint has."""
    encoding, weight = ENCODINGS[name], torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    # Steps of the coarsest code, as a share of the largest weight of a block: an int4 step is at most 1/7 of it.
    bound = {"fp32": 0, "fp16": 2**-11, "int4": 1 / 7, "int8": 1 / 2 / 127 * 1.01}[encoding.layout.format]
    before = weight.clone()
    rounded = encoding.round(weight, 32)
    assert torch.equal(weight, before)
    assert rounded.dtype == torch.float32
    assert float((rounded - weight).abs().max() / weight.abs().max()) <= bound
    assert len(encoding.encode(weight, 32)) == len(encoding.layout.tensors)
    assert torch.equal(encoding.round(weight.half(), 32), encoding.round(weight.half().float(), 32))


def test_a_layout_with_blocks_needs_their_size():
    for name, encoding in ENCODINGS.items():
        if LAYOUTS[name].blocks:
            with pytest.raises(ValueError, match="no block size"):
                encoding.encode(torch.ones(2, 32))


def test_defaults_of_each_target():
    """Written by hand: what the command line has promised since the first release."""
    assert {name: target.check_weights(None, None) for name, target in TARGETS.items()} == {
        "cpu": ("int4", "fp32"),
        "cuda": ("int4", "fp16"),
        "tensorrt-rtx": ("int4", "fp16"),
        "tensorrt": ("int4", "fp16"),
        "tensorrt-10.3": ("int4", "fp16"),
    }
    assert TARGETS["cpu"].check_weights("fp32", None) == ("fp32", "fp32")
    assert TARGETS["tensorrt"].check_weights("fp32", None) == ("fp32", "fp32")
    assert TARGETS["tensorrt"].check_weights("fp16", "fp32") == ("fp16", "fp32")
    assert TARGETS["cuda"].check_weights("fp16", "int8") == ("fp16", "int8")
    # The type of what is not quantized, and of the cache.
    kinds = {(target.name, name): target.matmul_type(name) for target, name in TAKEN}
    assert {pair for pair, kind in kinds.items() if kind == "float32"} == {
        *product(["cpu"], ["fp32", "int4", "int8"]),
        *product(["tensorrt-rtx", "tensorrt", "tensorrt-10.3"], ["fp32"]),
    }
    assert (TARGETS["cpu"].unquantized("int8"), TARGETS["cuda"].unquantized("int8")) == ("fp32", "fp16")


def test_what_a_target_refuses():
    with pytest.raises(TargetError, match="unknown target 'npu'; known: cpu, cuda, tensorrt-rtx, tensorrt"):
        get_target("npu")
    with pytest.raises(OptionError, match="target 'cpu' takes weights int4 or fp32, not 'fp16'"):
        TARGETS["cpu"].check_weights("fp16", None)
    with pytest.raises(OptionError, match="target 'cuda' takes encoder weights fp16 or int8, not 'fp32'"):
        TARGETS["cuda"].check_weights(None, "fp32")
    assert TARGETS["cpu"].check_block_size("int4", None) == 32
    assert TARGETS["cpu"].check_block_size("int4", 128) == 128
    assert TARGETS["cpu"].check_block_size("fp32", None) is None
    for name, size in (("int4", 48), ("fp32", 32)):
        with pytest.raises(OptionError, match=f"for int4 weights, one of 32, 64, 128: not {size} for {name}"):
            TARGETS["cpu"].check_block_size(name, size)


RECIPE = [
    Rule(component="vision", pattern="*", format="fp16"),
    Rule(component="decoder", pattern="*.gate", format="fp32"),
    Rule(component="decoder", pattern="layers.1?.mlp.*", format="int8", block_size=128),
    Rule(component="decoder", pattern="*", format="int4", block_size=32),
]


@pytest.mark.parametrize(
    ("component", "layer", "expected"),
    [
        ("vision", "layers.0.gate", ("fp16", None)),
        ("decoder", "layers.0.mlp.gate", ("fp32", None)),
        ("decoder", "layers.12.mlp.gate", ("fp32", None)),
        ("decoder", "layers.12.mlp.up", ("int8", 128)),
        ("decoder", "layers.2.mlp.up", ("int4", 32)),
        ("decoder", "gate", ("int4", 32)),
        ("decoder", "Layers.12.mlp.up", ("int4", 32)),
    ],
)
def test_the_first_rule_that_matches_decides(component, layer, expected):
    rule = decide(RECIPE, component, layer)
    assert (rule.format, rule.block_size) == expected


def test_a_recipe_without_a_rule():
    with pytest.raises(LookupError, match="no rule for the layer projector of audio"):
        decide(RECIPE, "audio", "projector")
    assert [block_size_of(RECIPE, name) for name in ("vision", "decoder", "audio")] == [None, 32, None]


def test_names_of_formats_in_a_manifest():
    for name in FORMATS:
        assert msgspec.json.decode(f'"{name}"', type=FormatName) == name
    for name in ("fp8", "int44", "xint4", ""):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(f'"{name}"', type=FormatName)
    rule = msgspec.json.decode(msgspec.json.encode(RECIPE[2]), type=Rule)
    assert rule == RECIPE[2]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"component": "vision", "pattern": "*", "format": "fp8"}, type=Rule)


def test_the_contract_is_light(repo_dir):
    """It imports msgspec, the standard library, itself and the errors."""
    import ast

    paths = sorted((repo_dir / "contract").rglob("*.py"))
    assert len(paths) >= 5
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 or (node.level == 2 and node.module == "errors"), path
                continue
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top == "msgspec" or top in sys.stdlib_module_names, (path, name)
