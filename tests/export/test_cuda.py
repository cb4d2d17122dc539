"""Graphs for ONNX Runtime's CUDA provider, on its CPU provider against the original implementations and PyTorch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from intertitle.calibration.quantize import dequantize_int4, quantize_int4
from intertitle.calibration.reference import Reference, TorchInference
from intertitle.export.dialects.half import narrow_activations
from intertitle.models import open_checkpoint
from intertitle.models.decoder import Decoder
from intertitle.runtime.backends import OrtBackend
from intertitle.runtime.bundle import Bundle

VARIANTS = ["av-qwen2", "clip-mistral", "auroracap-keep", "clip-mixtral", "clip-mistral-explicit"]
#: Largest error relative to the largest value; measured at 2.0e-3 or less.
BOUND = 5e-3


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def compare_steps(mine: Any, theirs: Any, embeds: np.ndarray) -> float:
    """The largest error of a prefill, two one-token steps and several tokens at once."""
    first = len(embeds) - 4
    worst = relative_error(mine.prefill(0, embeds[:first], num_logits=5), theirs.prefill(0, embeds[:first], 5))
    for token in (1, 7):
        worst = max(worst, relative_error(mine.step(np.array([token])), theirs.step(np.array([token]))))
    return max(worst, relative_error(mine.prefill(0, embeds[first:], 4), theirs.prefill(0, embeds[first:], 4)))


def prompts(numbers: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [numbers[name] for name in numbers if name.endswith("inputs_embeds")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_components(variant, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant, "fp16", "cuda")), expected(variant)
    backend, keep = OrtBackend(bundle), {"auroracap-keep": ".keep0.4"}.get(variant, "")
    features = numbers[f"vision_features{keep}"]
    vision = backend.component("vision", "vision.onnx")
    assert relative_error(vision(numbers["pixel_values"]), features) < BOUND
    if variant == "av-qwen2":
        audio = backend.component("audio", "audio.onnx")
        assert relative_error(audio(numbers["fbank_video_policy"][None])[0], numbers["audio_tokens"]) < BOUND
        frames = backend.component("frame_connector", "frame_connector.onnx")(features)
        windows = frames.reshape(-1, bundle.manifest.pipeline.stage("connector").unit.kernel, *frames.shape[1:])
        mine = backend.component("connector", "connector.onnx")(windows)
        assert relative_error(mine.reshape(numbers["video_tokens"].shape), numbers["video_tokens"]) < BOUND
    if keep:
        mine = backend.component("connector", "connector.onnx")(features)
        assert relative_error(mine, numbers[f"visual_tokens{keep}"]) < BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_steps(variant, compiled, expected, data_dir):
    bundle = Bundle.open(compiled(variant, "fp16", "cuda"))
    reference = Reference(open_checkpoint(data_dir / variant.removesuffix("-keep").removesuffix("-explicit")))
    assert bundle.manifest.cache_dtype == "float16"
    for embeds in prompts(expected(variant)):
        mine, theirs = (each.open(1, len(embeds) + 8) for each in (OrtBackend(bundle).decoder(), reference))
        assert compare_steps(mine, theirs, embeds) < BOUND


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_int4_is_the_rounded_model(variant, compiled, expected, data_dir):
    bundle, embeds = Bundle.open(compiled(variant, "int4", "cuda")), prompts(expected(variant))[0]
    checkpoint = open_checkpoint(data_dir / variant)
    module, block = checkpoint.load("decoder"), bundle.manifest.components["decoder"].block_size
    assert isinstance(module, Decoder)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = dequantize_int4(*quantize_int4(layer.weight.data, block or 0), layer.in_features)
    rounded = TorchInference(module, bundle.embed, 1, len(embeds) + 8)
    original = Reference(checkpoint).open(1, len(embeds) + 8)
    decoder = OrtBackend(bundle).decoder()
    assert compare_steps(decoder.open(1, len(embeds) + 8), rounded, embeds) < BOUND
    # Without this the line above could not tell a rounded model from the original.
    assert compare_steps(decoder.open(1, len(embeds) + 8), original, embeds) > 4 * BOUND


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_what_the_decoder_is_made_of(weights, compiled):
    graph = onnx.load(compiled("av-qwen2", weights, "cuda") / "decoder.ort.onnx", load_external_data=False).graph
    counts, layers = Counter(node.op_type for node in graph.node), 3
    product = "MatMulNBits" if weights == "int4" else "MatMul"
    assert (counts["GroupQueryAttention"], counts[product]) == (layers, 5 * layers + 1)
    assert counts["SkipSimplifiedLayerNormalization"] + counts["RMSNormalization"] == 2 * layers + 1
    # A bias (of query, key and value) is a sum of its own: the kernel of some versions does not know it as an input.
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "MatMulNBits")
    assert counts["Add"] == layers + 1
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["inputs_embeds"] == types["logits"] == single
    assert types["past.0.key"] == types["present.2.value"] == half
    # One buffer can be bound to both: nothing stands between a cache and the attention that writes it.
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            caches = [name for name in node.input if name.startswith("past.")]
            assert [name.replace("past", "present") for name in caches] == list(node.output[1:])
    held = {value.name: value for value in graph.initializer}
    for node in graph.node:
        kinds = {held[name].data_type for name in node.input if name in held} - {onnx.TensorProto.UINT8}
        if node.op_type in (product, "GroupQueryAttention"):
            assert kinds <= {half}, node.op_type
        if "Normalization" in node.op_type:
            assert kinds == {single}
    # Into a layer's products and out of them, but for those between which attention or the gate is; and the head's.
    assert counts["Cast"] == 4 * layers + 2
    # The rotary tables are float16 in the file: no cast of them in every step.
    made = {name for node in graph.node if node.op_type == "Cast" for name in node.input}
    assert not made & set(held)


def test_products_of_the_encoders_are_float16(compiled):
    for component in ("vision", "frame_connector", "connector", "audio"):
        graph = onnx.load(compiled("av-qwen2", "fp16", "cuda") / f"{component}.onnx", load_external_data=False).graph
        taken = {name for node in graph.node if node.op_type in ("MatMul", "Conv") for name in node.input}
        weights = [value for value in graph.initializer if value.name in taken and len(value.dims) > 1]
        assert weights
        assert {value.data_type for value in weights} == {onnx.TensorProto.FLOAT16}


def test_gelu_between_products_is_narrowed(compiled):
    """The towers': none of their GELUs is left between two casts."""
    for component in ("vision", "audio"):
        graph = onnx.load(compiled("av-qwen2", "fp16", "cuda") / f"{component}.onnx", load_external_data=False).graph
        cast = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
        readers = {name: node for node in graph.node for name in node.input}
        gelus = [node for node in graph.node if node.op_type == "Gelu"]
        assert gelus
        assert not [n for n in gelus if n.input[0] in cast and readers[n.output[0]].op_type == "Cast"]


def test_narrowing_leaves_what_has_other_readers():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float16[4] x) => (float16[4] a, float16[4] b, float[4] c) {
        wide = Cast<to=1>(x)
        g1 = Gelu(wide)
        n1 = Cast<to=10>(g1)
        a = Neg(n1)
        g2 = Gelu<approximate="tanh">(wide)
        n2 = Cast<to=10>(g2)
        b = Neg(n2)
        c = Neg(g2)
    }"""
    plain = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.from_proto(plain)
    assert narrow_activations(model) == 1
    narrowed = ir.to_proto(model)
    assert Counter(node.op_type for node in narrowed.graph.node) == {"Cast": 2, "Gelu": 2, "Neg": 3}
    x = np.array([-2, -0.5, 0.1, 3], np.float16)
    results = [
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for proto in (plain, narrowed)
    ]
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-3)
