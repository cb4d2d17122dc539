"""int8 encoders of every dialect: the graphs compute with the weights that were rounded, and those are close."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.calibration.formats import ENCODINGS, FEW_WEIGHTS
from intertitle.calibration.quantize import (
    dequantize_int8,
    dequantize_int8_channels,
    quantize_int8,
    quantize_int8_channels,
)
from intertitle.calibration.recipe import component_rules, linear_layers, roundings
from intertitle.calibration.reference import Reference
from intertitle.contract.formats import decide
from intertitle.contract.targets import TARGETS as TARGET_RECORDS
from intertitle.errors import OptionError
from intertitle.export.compile import compile_bundle
from intertitle.models import open_checkpoint
from intertitle.runtime.bundle import Bundle

TARGETS = ["cpu", "cuda", "tensorrt-rtx", "tensorrt-10.3"]
#: Largest error relative to the largest value, against PyTorch with the same rounded weights. On the processor the
#: kernel rounds activations to int8; elsewhere products are in float16.
BOUNDS = {"cpu": 8e-2}


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def run(bundle: Bundle, name: str, value: np.ndarray) -> np.ndarray:
    """A component on the CPU provider, which must not round activations where the graph does not say so."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    graph = str(bundle.file(bundle.manifest.components[name].graph))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: value})[0])


@pytest.fixture(scope="module", params=[*TARGETS[:-1], pytest.param(TARGETS[-1], marks=pytest.mark.slow)])
def bundle(request, data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "bundle"
    compile_bundle(data_dir / "av-qwen2", path, target=request.param, encoder_weights="int8")
    return Bundle.open(path)


def test_encoders_are_the_rounded_model(bundle, data_dir, expected):
    numbers, target = expected("av-qwen2"), bundle.manifest.target
    checkpoint = open_checkpoint(data_dir / "av-qwen2")
    rounded, original = Reference(checkpoint, roundings(bundle.manifest, checkpoint)), Reference(checkpoint)
    features = numbers["vision_features"]
    fbank, pixels = numbers["fbank_video_policy"][np.newaxis], numbers["pixel_values"]
    frames = run(bundle, "frame_connector", features)
    windows = frames.reshape(-1, bundle.manifest.pipeline.stage("connector").unit.kernel, *frames.shape[1:])
    made = {
        "vision": ({"pixels": pixels}, run(bundle, "vision", pixels)),
        "audio": ({"sound": fbank}, run(bundle, "audio", fbank)),
        "frame_connector": ({"vision": features}, frames),
        "connector": ({"frame_connector": frames}, run(bundle, "connector", windows)),
    }
    for name, (given_values, mine) in made.items():
        theirs, exact = rounded.run(name, given_values), original.run(name, given_values)
        error = relative_error(mine, theirs)
        assert error < BOUNDS.get(target, 5e-3), name
        assert relative_error(mine, exact) < 0.12
        if target != "cpu":
            # Without this the line above it could not tell a rounded model from the original.
            assert relative_error(mine, exact) > 2 * error


def test_what_is_quantized(bundle):
    """Linear layers but for squeeze-excite and those of few weights; convolutions, norms and the rest are as before."""
    manifest, dialect = bundle.manifest, bundle.manifest.dialect
    for name in ("vision", "frame_connector", "connector", "audio"):
        component = manifest.components[name]
        assert (component.weights, component.block_size) == ("int8", 128 if dialect == "ort" else None)
        graph = onnx.load(bundle.file(component.graph), load_external_data=False).graph
        counts = Counter(node.op_type for node in graph.node)
        if dialect == "ort":
            nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
            assert all(a.i == 8 for node in nodes for a in node.attribute if a.name == "bits")
        else:
            nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert nodes
        int8 = onnx.TensorProto.UINT8 if dialect == "ort" else onnx.TensorProto.INT8
        codes = [value for value in graph.initializer if value.data_type == int8]
        assert len(codes) == len(nodes)
        assert min(np.prod(value.dims) for value in codes) >= FEW_WEIGHTS
        if name == "frame_connector":
            # Two products of each of the 4 blocks' gates are left.
            assert counts["MatMul"] >= 8
    assert manifest.components["decoder"].weights == "int4"


def test_the_layers_that_are_rounded(data_dir):
    connector = open_checkpoint(data_dir / "av-qwen2").module("connector")
    rules = component_rules("connector", connector, TARGET_RECORDS["cpu"], "int8")
    chosen = [name for name in linear_layers(connector) if decide(rules, "connector", name).format == "int8"]
    assert "s2.b1.conv1.conv" in chosen
    assert any(".se." in name for name in linear_layers(connector))
    assert not any(".se." in name for name in chosen)


def test_formats_that_a_target_does_not_take(data_dir, tmp_path):
    with pytest.raises(OptionError, match="target 'cpu' takes encoder weights fp32 or int8, not 'fp16'"):
        compile_bundle(data_dir / "av-qwen2", tmp_path / "b", encoder_weights="fp16")
    with pytest.raises(OptionError, match="target 'cuda' takes encoder weights fp16 or int8, not 'fp32'"):
        compile_bundle(data_dir / "av-qwen2", tmp_path / "b", target="cuda", encoder_weights="fp32")
    with pytest.raises(OptionError, match="target 'cuda' takes weights int4 or fp16, not 'fp32'"):
        compile_bundle(data_dir / "av-qwen2", tmp_path / "b", target="cuda", weights="fp32")
    assert not (tmp_path / "b").exists()


weights = st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1, 1e3]))


@settings(deadline=None, max_examples=100)
@given(weights)
def test_no_weight_is_off_by_more_than_half_a_step(how):
    rows, width, seed, size = how
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = quantize_int8(weight, 32)
    assert codes.shape == (rows, -(-width // 32), 32)
    step = scales.repeat_interleave(32, dim=1)[:, :width]
    assert ((dequantize_int8(codes, scales, width) - weight).abs() <= step * 0.5001).all()
    codes, factors = quantize_int8_channels(weight)
    assert codes.shape == (width, rows)
    assert (factors > 0).all()
    off = (dequantize_int8_channels(codes, factors) - weight).abs()
    # A float16 scale may be a rounding too small for the largest: 127 steps then end short of it.
    assert (off <= factors.float().unsqueeze(1) * (0.5 + 127 * 2**-11)).all()


def test_a_block_of_zeros_and_what_onnx_runtime_makes_of_it():
    weight = torch.zeros(2, 40)
    weight[1, 0] = 2
    codes, scales = quantize_int8(weight, 32)
    assert (codes == 128).sum() == codes.numel() - 1
    assert scales[0].tolist() == [0, 0]
    rounded = ENCODINGS["int8_nbits"].round(weight, 32)
    assert rounded.tolist() == weight.tolist()
