"""The standard dialect on ONNX Runtime's CPU provider against the original implementations and PyTorch."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from intertitle.calibration.quantize import dequantize_int4_positive, quantize_int4_positive
from intertitle.calibration.reference import Reference, TorchInference
from intertitle.errors import TargetError
from intertitle.export.dialects.half import fold_casts
from intertitle.export.graph_writer import pack_int4
from intertitle.models import open_checkpoint
from intertitle.models.decoder import Decoder
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner

ALL = ["av-qwen2", "clip-mistral", "clip-mistral-lora", "clip-mixtral", "auroracap", "auroracap-keep"]
SOME = ["av-qwen2", "clip-mistral", "auroracap-keep"]

#: Largest error relative to the largest value. float16 was measured at 2.0e-3 or less.
BOUNDS = {"fp32": 1e-4, "fp16": 5e-3}


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def session(bundle: Bundle, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Without it ONNX Runtime rounds the activations of an int4 product to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    graph = bundle.file(bundle.manifest.components[name].graph)
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class StandardDecoder:
    """One row over a static cache, whose outputs become its inputs."""

    def __init__(self, bundle: Bundle, max_length: int) -> None:
        self.session, spec = session(bundle, "decoder"), bundle.manifest.decoder
        self.filled = 0
        self.cache = {
            value.name: np.zeros(
                (1, spec.num_kv_heads, max_length, spec.head_dim), np.float16 if "16" in value.type else np.float32
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past.")
        }

    def __call__(self, embeds: np.ndarray) -> np.ndarray:
        """Logits ``[S, V]`` of all S new tokens."""
        self.filled += len(embeds)
        feeds = {
            "inputs_embeds": embeds[np.newaxis],
            "lengths": np.array([self.filled - 1], np.int32),
            "logits_index": np.arange(len(embeds))[np.newaxis],
        }
        if any(value.name == "position_ids" for value in self.session.get_inputs()):
            feeds["position_ids"] = np.arange(self.filled - len(embeds), self.filled)[np.newaxis]
        logits, *present = self.session.run(None, feeds | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits[0]


def compare_steps(
    bundle: Bundle, reference: TorchInference, embeds: np.ndarray, last: np.ndarray | None = None
) -> float:
    """The largest error of prefill, one-token steps and a step of several tokens; ``last``: logits of the whole."""
    mine, worst = StandardDecoder(bundle, len(embeds) + 3), 0.0
    cuts = [0, len(embeds) - 7, len(embeds) - 6, len(embeds) - 5, len(embeds)]
    for start, stop in pairwise(cuts):
        logits = mine(embeds[start:stop])
        theirs = reference.prefill(0, embeds[start:stop], num_logits=min(stop - start, 5))
        worst = max(worst, relative_error(logits[-len(theirs) :], theirs))
    return worst if last is None else max(worst, relative_error(logits[-1], last))


CASES: list[Any] = [("tensorrt-rtx", v, "fp32") for v in ALL] + [("tensorrt-rtx", v, "fp16") for v in SOME]
CASES += [("tensorrt-rtx", "clip-mixtral", "fp16"), ("tensorrt-10.3", "clip-mixtral", "fp32")]
CASES += [("tensorrt-rtx", "clip-mistral-explicit", "fp16"), ("tensorrt-10.3", "clip-mistral-explicit", "fp32")]
CASES += [("tensorrt-10.3", "av-qwen2", "fp16")]
CASES += [pytest.param("tensorrt-10.3", v, "fp32", marks=pytest.mark.slow) for v in SOME]


@pytest.mark.parametrize(("target", "variant", "weights"), CASES)
def test_components(target, variant, weights, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant, weights, target)), expected(variant)
    keep = {"auroracap": ".keep1.0", "auroracap-keep": ".keep0.4"}.get(variant, "")
    features = numbers[f"vision_features{keep}"]
    if variant != "auroracap" or weights == "fp32":
        (mine,) = session(bundle, "vision").run(None, {"pixel_values": numbers["pixel_values"]})
        assert relative_error(mine, features) < BOUNDS[weights]
    if variant == "av-qwen2":
        (mine,) = session(bundle, "audio").run(None, {"fbank": numbers["fbank_video_policy"][np.newaxis]})
        assert relative_error(mine[0], numbers["audio_tokens"]) < BOUNDS[weights]
        (frames,) = session(bundle, "frame_connector").run(None, {"features": features})
        windows = frames.reshape(-1, bundle.manifest.pipeline.stage("connector").unit.kernel, *frames.shape[1:])
        (mine,) = session(bundle, "connector").run(None, {"windows": windows})
        assert relative_error(mine.reshape(numbers["video_tokens"].shape), numbers["video_tokens"]) < BOUNDS[weights]
    if keep:
        (mine,) = session(bundle, "connector").run(None, {"features": features})
        assert relative_error(mine, numbers[f"visual_tokens{keep}"]) < BOUNDS[weights]


@pytest.mark.parametrize(("target", "variant", "weights"), CASES)
def test_prefill_and_steps(target, variant, weights, compiled, expected, data_dir):
    bundle, numbers = Bundle.open(compiled(variant, weights, target)), expected(variant)
    adapter = data_dir / variant if variant.endswith("lora") else None
    checkpoint = open_checkpoint(data_dir / re.sub("-(lora|keep|explicit)$", "", variant), adapter)
    for name in [name for name in numbers if name.endswith("inputs_embeds")]:
        embeds, last = numbers[name], numbers[name.replace("inputs_embeds", "last_logits")]
        reference = Reference(checkpoint).open(1, len(embeds) + 3)
        # The ratio of merging is in the embeddings: those of the fixture are of 0.4.
        assert compare_steps(bundle, reference, embeds, last) < BOUNDS[weights]


@pytest.mark.parametrize("variant", SOME)
def test_int4_is_the_rounded_model(variant, compiled, expected, data_dir):
    bundle, numbers = Bundle.open(compiled(variant, "int4", "tensorrt-rtx")), expected(variant)
    embeds = numbers[next(name for name in numbers if name.endswith("inputs_embeds"))]
    checkpoint = open_checkpoint(data_dir / variant.removesuffix("-keep"))
    module, block = checkpoint.load("decoder"), bundle.manifest.components["decoder"].block_size
    assert isinstance(module, Decoder)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = dequantize_int4_positive(*quantize_int4_positive(layer.weight.data, block or 0))
    rounded = TorchInference(module, bundle.embed, 1, len(embeds) + 3)
    original = Reference(checkpoint).open(1, len(embeds) + 3)
    assert compare_steps(bundle, rounded, embeds) < BOUNDS["fp16"]
    # Without this the line above could not tell a rounded model from the original.
    assert compare_steps(bundle, original, embeds) > 4 * BOUNDS["fp16"]


def nodes(bundle: Path, component: str) -> onnx.GraphProto:
    graph = Bundle.open(bundle).manifest.components[component].graph
    return onnx.load(bundle / graph, load_external_data=False).graph


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_what_the_decoder_is_made_of(weights, compiled):
    bundle = compiled("av-qwen2", weights, "tensorrt-rtx")
    graph = nodes(bundle, "decoder")
    counts = Counter(node.op_type for node in graph.node)
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    layers, products = 3, 7 * 3 + 1
    assert (counts["Attention"], counts["TensorScatter"], counts["RotaryEmbedding"]) == (layers, 2 * layers, 2 * layers)
    assert (counts["RMSNormalization"], counts["MatMul"]) == (2 * layers + 1, products)
    assert counts["DequantizeLinear"] == (products if weights == "int4" else 0)
    assert len({node.name for node in graph.node}) == len(graph.node)
    assert all(len(node.output) == 1 for node in graph.node if node.op_type == "Attention")
    # A cache is read from an input and its update is the output: one buffer can be bound to both.
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "TensorScatter":
            assert node.input[0].startswith("past.")
            assert node.output[0] == node.input[0].replace("past", "present")
            assert node.output[0] in outputs
    # Casts: in and out of the four products of a layer's input, attention's three operands and its norms' neighbours.
    assert [value.name for value in graph.input][:3] == ["inputs_embeds", "lengths", "logits_index"]
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert types["inputs_embeds"] == types["logits"] == onnx.TensorProto.FLOAT
    assert types["past.0.key"] == types["present.2.value"] == onnx.TensorProto.FLOAT16
    by_type = Counter(value.data_type for value in graph.initializer if len(value.dims) == 2)
    assert by_type[onnx.TensorProto.INT4] == (products if weights == "int4" else 0)
    # Of 2-D tensors only the two rotary tables are float32.
    assert by_type[onnx.TensorProto.FLOAT] == 2
    casts = [node for node in graph.node if node.op_type == "Cast"]
    made = {node.output[0]: node for node in casts}
    to = {node.output[0]: node.attribute[0].i for node in casts}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in casts:
        if to[node.output[0]] == half and node.input[0] in made:
            assert to[node.input[0]] != single, "a value goes to float32 and straight back"
    assert len({(node.input[0], to[node.output[0]]) for node in casts}) == len(casts)


def test_what_a_token_takes_in_the_cache(compiled):
    """Keys and values of 3 layers, 2 heads of 32."""
    whole, half = (Bundle.open(compiled("av-qwen2", weights, "tensorrt-rtx")).manifest for weights in ("fp32", "int4"))
    assert (whole.cache_dtype, whole.cache_bytes) == ("float32", 2 * 3 * 2 * 32 * 4)
    assert (half.cache_dtype, half.cache_bytes) == ("float16", 2 * 3 * 2 * 32 * 2)


@pytest.mark.parametrize("component", ["vision", "frame_connector", "connector", "audio"])
def test_encoders_are_float16_where_the_weights_are(component, compiled):
    graph = nodes(compiled("av-qwen2", "fp16", "tensorrt-rtx"), component)
    counts = Counter(node.op_type for node in graph.node)
    assert not any("Sequence" in name for name in counts)
    assert counts["Attention"] == {"vision": 2, "audio": 2}.get(component, 0)
    products = {value for node in graph.node if node.op_type in ("MatMul", "Conv") for value in node.input}
    weights = [value for value in graph.initializer if value.name in products and len(value.dims) > 1]
    assert weights
    assert all(value.data_type == onnx.TensorProto.FLOAT16 for value in weights)


def test_casts_fold_to_the_same_graph():
    """x -> float32 -> float16 (twice), and float32 -> float16 -> float32, which rounds and stays."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float16[4] x, float[4] y) => (float16[4] a, float16[4] b, float[4] c) {
        wide = Cast<to=1>(x)
        h1 = Cast<to=10>(wide)
        h2 = Cast<to=10>(wide)
        a = Neg(h1)
        b = Abs(h2)
        narrow = Cast<to=10>(y)
        back = Cast<to=1>(narrow)
        c = Neg(back)
    }"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert fold_casts(model) == 2
    proto = ir.to_proto(model)
    assert Counter(node.op_type for node in proto.graph.node) == {"Neg": 2, "Abs": 1, "Cast": 2}
    folded = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x, y = np.array([1, -2, 3, 0.1], np.float16), np.array([0.1, 1e-9, 70000, 3], np.float32)
    a, b, c = (np.asarray(value) for value in folded.run(None, {"x": x, "y": y}))
    assert np.array_equal(a, -x)
    assert np.array_equal(b, abs(x))
    with np.errstate(over="ignore"):
        assert np.array_equal(c, -y.astype(np.float16).astype(np.float32))


def test_int4_is_packed_as_onnx_packs_it():
    codes = np.random.default_rng(0).integers(-8, 8, (5, 3)).astype(np.int8)
    theirs = onnx.helper.make_tensor("x", onnx.TensorProto.INT4, codes.shape, codes.flatten().tolist())
    assert pack_int4(codes).tobytes() == theirs.raw_data or bytes(theirs.int32_data) == pack_int4(codes).tobytes()


def test_the_plain_dialect_is_plain(compiled):
    """Operators that opset 21 has, and int4 in blocks."""
    bundle = compiled("av-qwen2", "int4", "tensorrt-10.3")
    model = onnx.load(bundle / "decoder.plain.onnx", load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21)]
    counts = Counter(node.op_type for node in model.graph.node)
    assert not {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization", "ScatterND"} & set(counts)
    assert counts["DequantizeLinear"] == 7 * 3 + 1
    onnx.checker.check_model(str(bundle / "decoder.plain.onnx"))


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt-10.3"])
def test_a_bundle_for_engines_does_not_run_on_the_processor(target, compiled):
    with pytest.raises(TargetError, match=f"is for {target}; for cpu compile"):
        Captioner.load(compiled("av-qwen2", "int4", target), device="cpu")
