"""What ``compile`` writes: the manifest, the operators, where the weights lie, and nothing when it fails."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from intertitle.benchmarks.harness import run_process
from intertitle.calibration.quantize import dequantize_int4
from intertitle.contract.formats import LAYOUTS
from intertitle.contract.manifest import Manifest
from intertitle.contract.pipeline import EachUnit, OneSound, Window
from intertitle.errors import CheckpointError, IntertitleError, OptionError, TargetError
from intertitle.export import compile as compile_module
from intertitle.export.compile import compile_bundle
from intertitle.export.dialects.layers import Stored
from intertitle.export.graph_writer import WeightReader, payload_size, serialize, write_weights
from intertitle.export.trace import TracedGraph, Weight
from intertitle.models import random_checkpoint
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.ort import OrtDecoder
from intertitle.runtime.prompt import Slot, build_prompt
from intertitle.runtime.viewing import Count, Share
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

LAYERS = 3
INT4 = [("av-qwen2", "int4"), ("clip-mistral", "int4")]
FP32 = [("av-qwen2", "fp32"), ("clip-mistral", "fp32"), ("auroracap-keep", "fp32")]


def manifest_of(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def decoder_of(bundle: Path) -> onnx.GraphProto:
    return onnx.load(bundle / "decoder.ort.onnx", load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def location(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


# --- the manifest


@pytest.mark.parametrize(
    ("variant", "units", "tokens", "keep"),
    # 4 windows of 2 of 8 frames with 2 x 2 of 5 x 5 patches; 5 of 8 frames and 2 empty ones, 3 x 3 of the padded 6 x 6.
    [("av-qwen2", 4, 4, None), ("clip-mistral", 5, 9, None), ("auroracap-keep", 8, 37, 0.4)],
)
def test_visual_tokens(variant, units, tokens, keep, compiled, expected):
    pipeline = manifest_of(compiled(variant)).pipeline
    places = pipeline.sampling.count
    assert (places, pipeline.units("connector", places), pipeline.tokens("connector")) == (8, units, tokens)
    merging = pipeline.merging
    assert (None if merging is None else [variant.keep for variant in merging.variants]) == (keep and [keep])
    numbers = expected(variant)
    shape = numbers[f"visual_tokens.keep{keep}" if keep else "video_tokens"].shape
    assert units * tokens == np.prod(shape[:-1])


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("av-qwen2", {"video": "prompt_ids", "audio": "audio.prompt_ids", "audiovideo": "prompt_ids"}),
        ("clip-mistral", {"video": "prompt_ids"}),
        ("auroracap-keep", {"video": "prompt_ids"}),
    ],
)
def test_prompts_and_tokenizer_give_the_ids_of_the_fixture(variant, keys, compiled, expected):
    bundle = Bundle.open(compiled(variant))
    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    pipeline = bundle.manifest.pipeline
    assert set(pipeline.prompts) == set(keys)
    units = {stage.name: pipeline.units(stage.name, 8) for stage in pipeline.stages}
    for mode, key in keys.items():
        pieces = pipeline.prompts[mode].pieces
        built = build_prompt(tokenizer, pieces, bundle.manifest.default_instruction, units)
        # The reference has one negative number for what stands between two texts.
        ids: list[int | None] = []
        for part in built:
            ids += part if isinstance(part, list) else [] if ids[-1:] == [None] else [None]
        assert sum(isinstance(part, Slot) for part in built) == {"audiovideo": 2}.get(mode, max(1, ids.count(None)))
        assert ids == [token if token >= 0 else None for token in expected(variant)[key].tolist()]


def test_manifest_of_a_captioner_that_listens(compiled, data_dir):
    manifest = manifest_of(compiled("av-qwen2", "int4"))
    assert (manifest.name, manifest.family) == ("av-qwen2", "videollama2")
    assert (manifest.target, manifest.dialect, manifest.weights) == ("cpu", "ort", "int4")
    assert list(manifest.components) == ["vision", "frame_connector", "connector", "audio", "decoder"]
    pipeline = manifest.pipeline
    units = {stage.name: stage.unit for stage in pipeline.stages}
    each, window = EachUnit(), Window(2, 2, 0)
    assert units == {"vision": each, "frame_connector": each, "connector": window, "audio": OneSound()}
    assert list(units) == list(manifest.components)[:-1]
    sources = {stage.name: [value.source for value in stage.inputs] for stage in pipeline.stages}
    assert sources["connector"] == ["frame_connector"]
    assert (sources["vision"], sources["audio"]) == (["pixels"], ["sound"])
    assert all(not stage.variants for stage in pipeline.stages)
    # Of clip-mistral the connector is an stc_connector, which pads.
    assert manifest_of(compiled("clip-mistral")).pipeline.stage("connector").unit == Window(2, 2, 1)
    config = json.loads((data_dir / "av-qwen2" / "config.json").read_text())
    decoder = manifest.decoder
    assert decoder.num_layers == config["num_hidden_layers"] == LAYERS
    assert decoder.num_kv_heads == config["num_key_value_heads"]
    assert decoder.head_dim * config["num_attention_heads"] == decoder.hidden_size == config["hidden_size"]
    assert (decoder.vocab_size, decoder.context_length) == (config["vocab_size"], config["max_position_embeddings"])
    audio = pipeline.sound
    assert audio is not None
    # docs/facts.md 1.4: 30 s at 16 kHz, 2998 frames of 128 bins, patches of 16 x 16.
    assert (audio.sample_rate, audio.num_samples) == (16_000, 480_000)
    assert (audio.num_frames, audio.num_mel_bins, pipeline.tokens("audio")) == (2998, 128, 187 * 8)
    assert pipeline.sampling.count == config["num_frames"]
    assert manifest_of(compiled("clip-mistral")).pipeline.sound is None
    # No generation_config.json: transformers' defaults, and the reference's own (docs/facts.md 1.7).
    assert manifest.generation.eos_token_ids == (config["eos_token_id"],)
    assert (manifest.generation.repetition_penalty, manifest.generation.top_k) == (1.0, 50)
    made = manifest.provenance
    assert (made.checkpoint, made.adapter, made.adapter_sha256) == ("av-qwen2", None, None)
    assert {"torch", "onnx", "python"} <= set(made.tools)
    assert made.tools["torch"] == torch.__version__


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_components_say_what_they_hold(weights, compiled, data_dir):
    bundle = compiled("av-qwen2", weights)
    components = manifest_of(bundle).components
    assert [(name, part.weights, part.block_size) for name, part in components.items()] == [
        ("vision", "fp32", None),
        ("frame_connector", "fp32", None),
        ("connector", "fp32", None),
        ("audio", "fp32", None),
        ("decoder", weights, 32 if weights == "int4" else None),
    ]
    tensors = load_file(data_dir / "av-qwen2" / "model.safetensors")
    decoder = [name for name in tensors if name.startswith(("model.layers.", "model.norm.", "lm_head."))]
    assert components["decoder"].parameters == sum(tensors[name].numel() for name in decoder)
    for name, part in components.items():
        graph = onnx.load(bundle / part.graph, load_external_data=False).graph
        for ours, theirs in ((part.inputs, graph.input), (part.outputs, graph.output)):
            assert [value.name for value in ours] == [value.name for value in theirs]
            shapes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in theirs]
            assert [list(value.shape) for value in ours] == shapes, name
    assert components["vision"].inputs[0].shape == ["frames", 3, 70, 70]
    assert components["frame_connector"].outputs[0].shape == ["frames", 25, 128]
    assert components["connector"].inputs[0].shape == ["slots", 2, 25, 128]
    connector = [name for name in tensors if name.startswith("model.mm_projector.")]
    parts = components["frame_connector"].parameters + components["connector"].parameters
    assert parts == sum(tensors[name].numel() for name in connector)
    past = [value for value in components["decoder"].inputs if value.name.startswith("past.")]
    assert len(past) == 2 * LAYERS
    assert all(value.shape == ["rows", 2, "max_length", 32] for value in past)


def test_adapter_in_the_provenance(compiled):
    plain, merged = (manifest_of(compiled(variant)).provenance for variant in ("clip-mistral", "clip-mistral-lora"))
    assert merged.checkpoint_sha256 == plain.checkpoint_sha256
    assert merged.adapter == "clip-mistral-lora"
    assert re.fullmatch("[0-9a-f]{64}", merged.adapter_sha256 or "")


def test_what_is_said_while_and_after_compiling(tmp_path):
    """Progress and result; and, of a checkpoint with a generation_config.json (Qwen2-7B-Instruct's), its settings."""
    checkpoint = random_checkpoint.write_checkpoint(tmp_path / "checkpoint", "tiny")
    steps: list[tuple[str, int, int]] = []
    result = compile_bundle(checkpoint, tmp_path / "bundle", progress=lambda *step: steps.append(step))
    manifest = result.manifest
    # The default of the target.
    assert manifest.weights == "int4"
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert list(manifest.generation.eos_token_ids) == generation["eos_token_id"]
    assert manifest.generation.repetition_penalty == generation["repetition_penalty"] == 1.05
    assert manifest.generation.top_k == generation["top_k"] == 20
    # The reference's own, whatever the file says (docs/facts.md 1.7).
    assert (manifest.generation.temperature, manifest.generation.top_p) == (0.2, 0.9)
    assert manifest.embedding.dtype == "bfloat16"

    assert result.path == tmp_path / "bundle"
    on_disk = {name: record.size for name, record in manifest.files.items()}
    assert sum(result.component_bytes.values()) == sum(on_disk.values())
    decoder = on_disk["decoder.ort.onnx"] + on_disk["decoder.ort.onnx.data"]
    assert result.component_bytes["decoder"] == decoder
    names = ["vision", "frame_connector", "connector", "audio", "decoder"]
    assert list(result.component_bytes) == [*names, "embedding", "tokenizer"]
    labels = list(dict.fromkeys(label for label, _, _ in steps))
    assert labels == [
        "reading the checkpoint",
        *(f"tracing {name}" for name in names),
        *(f"writing {name}" for name in ("embedding", *names)),
        "closing",
    ]
    written = [(done, total) for label, done, total in steps if label.startswith(("writing", "closing"))]
    assert len({total for _, total in written}) == 1
    assert written == sorted(written)
    assert written[-1][0] == written[-1][1] > 0
    # A step for every tensor, not one for every component.
    assert len(written) > 200


# --- the graphs


@pytest.mark.parametrize(("variant", "weights"), [*INT4, *FP32])
def test_attention_is_one_operator_a_layer(variant, weights, compiled):
    graph = decoder_of(compiled(variant, weights))
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == LAYERS
    for layer, node in enumerate(attention):
        assert node.domain == "com.microsoft"
        assert attributes(node)["do_rotary"] == 1
        # int4: query, key and value come packed from one product.
        assert [bool(name) for name in node.input[1:3]] == [weights == "fp32"] * 2
        assert list(node.input[3:7]) == [f"past.{layer}.key", f"past.{layer}.value", "lengths", "total_length"]
        assert list(node.output[1:]) == [f"present.{layer}.key", f"present.{layer}.value"]
    counts = Counter(node.op_type for node in graph.node)
    # Every norm but the first and the last (which sees the asked positions only) takes a residual sum in.
    assert (counts["RMSNormalization"], counts["SkipSimplifiedLayerNormalization"]) == (2, 2 * LAYERS - 1)
    assert counts["Add"] == (1 if weights == "int4" else counts["Add"])
    # The cache is written by the operator: no copy of it anywhere, no mask, no rotary arithmetic.
    assert not {"Softmax", "Slice", "Where", "Cos", "Sin", "Transpose", "ScatterND"} & set(counts)
    # Gate and up are one int4 product, taken apart once.
    assert counts["Split"] == (LAYERS if weights == "int4" else 0)
    touched = [node.op_type for node in graph.node if any(name.startswith("past.") for name in node.input)]
    assert touched == ["GroupQueryAttention"] * LAYERS
    # What is left outside the layers picks the asked positions: the same few nodes whatever the depth.
    assert counts["Concat"] + counts["Expand"] + counts["Cast"] + counts["Unsqueeze"] <= 4
    assert counts["Shape"] == 0


@pytest.mark.parametrize(("variant", "weights"), INT4)
def test_every_product_of_an_int4_decoder_is_matmulnbits(variant, weights, compiled):
    graph = decoder_of(compiled(variant, weights))
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    # Query, key and value; output; gate and up; down: four a layer.
    assert len(products) == 4 * LAYERS + 1
    assert "decoder.lm_head.qweight" in products[-1].input
    for node in products:
        found = attributes(node)
        assert (found["bits"], found["block_size"], found["accuracy_level"]) == (4, 32, 4)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & {node.op_type for node in graph.node}


@pytest.mark.parametrize(("variant", "weights"), FP32)
def test_no_weight_is_transposed_at_run_time(variant, weights, compiled):
    bundle = compiled(variant, weights)
    for part in manifest_of(bundle).components.values():
        graph = onnx.load(bundle / part.graph, load_external_data=False).graph
        initializers = {tensor.name for tensor in graph.initializer}
        transposed = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in initializers]
        assert transposed == [], part.graph
    products = [node for node in decoder_of(bundle).node if node.op_type == "MatMul"]
    assert len(products) == 7 * LAYERS + 1


@pytest.mark.parametrize(("variant", "weights"), [*INT4, *FP32])
def test_large_tensors_lie_on_pages_beside_the_graph(variant, weights, compiled):
    bundle = compiled(variant, weights)
    for part in manifest_of(bundle).components.values():
        size = (bundle / str(part.data)).stat().st_size
        spans = []
        for tensor in onnx.load(bundle / part.graph, load_external_data=False).graph.initializer:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            expected = int(np.prod(tensor.dims)) * dtype.itemsize
            where = location(tensor)
            if not where:
                assert expected < 4096, tensor.name
                continue
            assert where["location"] == part.data
            offset, length = int(where["offset"]), int(where["length"])
            assert length == expected
            assert offset % (4096 if length >= 4096 else 64) == 0, tensor.name
            spans.append((offset, offset + length))
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] == size
        # A 7 B decoder has a graph of some hundred kilobytes: no table, no weight in it.
        assert (bundle / part.graph).stat().st_size < 100_000


@pytest.mark.parametrize(("variant", "weights"), [*INT4[:1], *FP32[:1]])
def test_graphs_are_valid_and_tell_nothing_of_the_machine(variant, weights, compiled, repo_dir):
    bundle = compiled(variant, weights)
    own = [str(repo_dir), str(Path.home()), sys.prefix, str(bundle.parent)]
    for file in bundle.iterdir():
        if file.suffix in (".onnx", ".json"):
            content = file.read_bytes()
            for text in (*own, "site-packages", "Traceback", ".py", "stack_trace"):
                assert text.encode() not in content, f"{text} in {file.name}"
        if file.suffix == ".onnx":
            onnx.checker.check_model(str(file))
            model = onnx.load(file, load_external_data=False)
            assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
            assert not any(value.metadata_props for value in (*model.graph.value_info, *model.graph.initializer))
            assert not model.functions


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def stored_int4(ours: dict, layer: str, theirs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one of the checkpoint's layers: rows of a fused product, or a product of its own."""
    parent, _, name = layer.rpartition(".")
    for fused, parts in FUSED.items():
        if name in parts:
            sizes = [len(theirs[f"model.{parent}.{part}.weight"]) for part in parts]
            start = sum(sizes[: parts.index(name)])
            rows = slice(start, start + sizes[parts.index(name)])
            return tuple(torch.from_numpy(ours[f"{parent}.{fused}.{part}"][rows]) for part in ("qweight", "scales"))
    return tuple(torch.from_numpy(ours[f"{layer}.{part}"]) for part in ("qweight", "scales"))


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_stored_weights_are_those_of_the_checkpoint(weights, compiled, data_dir):
    """Straight from the files: every linear layer of the decoder, the norms, and the embedding table."""
    bundle = compiled("clip-mistral", weights)
    theirs = load_file(data_dir / "clip-mistral" / "model.safetensors")
    model = onnx.load(bundle / "decoder.ort.onnx")
    ours = {t.name.removeprefix("decoder."): numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    compared = 0
    for name, value in theirs.items():
        entry = name.removeprefix("model.")
        if not entry.startswith(("layers.", "norm.", "lm_head.")):
            continue
        compared += 1
        if value.ndim == 1:
            assert np.array_equal(ours[entry], value.numpy())
        elif weights == "fp32":
            assert np.array_equal(ours[f"{entry}.T"], value.numpy().T)
        else:
            codes, scales = stored_int4(ours, entry.removesuffix(".weight"), theirs)
            rounded = dequantize_int4(codes, scales, value.shape[1])
            assert (rounded - value).abs().max() <= scales.abs().max()
            assert 0.05 < (rounded - value).norm() / value.norm() < 0.12
    assert compared == 9 * LAYERS + 2
    table = Bundle.open(bundle).embed(np.arange(369))
    assert np.array_equal(table, theirs["model.embed_tokens.weight"].numpy())


def test_a_bfloat16_checkpoint_with_tied_embeddings(tmp_path, data_dir):
    """The table keeps its dtype, the output head is made of it, and the checkpoint's files stay as they are."""
    checkpoint = shutil.copytree(data_dir / "clip-mistral", tmp_path / "checkpoint")
    tensors = {name: value.bfloat16() for name, value in load_file(checkpoint / "model.safetensors").items()}
    table = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    before = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    bundle = compile_bundle(checkpoint, tmp_path / "bundle", weights="int4").path
    assert hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest() == before
    opened = Bundle.open(bundle)
    assert opened.manifest.embedding.dtype == "bfloat16"
    assert np.array_equal(opened.embed(np.arange(369)), table.float().numpy())
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle / "decoder.ort.onnx").graph.initializer}
    codes, scales = (torch.from_numpy(stored[f"decoder.lm_head.{part}"].copy()) for part in ("qweight", "scales"))
    error = (dequantize_int4(codes, scales, 128) - table.float()).norm() / table.float().norm()
    assert 0.05 < float(error) < 0.12


# --- refused


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"weights": "int3"}, OptionError, "takes weights int4 or fp32, not 'int3'"),
        ({"weights": ""}, OptionError, "not ''"),
        ({"target": "toaster"}, TargetError, "unknown target 'toaster'; known: cpu"),
        ({"visual_tokens": Share(0.5)}, OptionError, "no token merging"),
        ({"visual_tokens": (Share(1.0), Share(0.5))}, OptionError, "no token merging"),
        ({"visual_tokens": ()}, OptionError, "no share"),
        ({"adapter": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_what_cannot_be_asked_for(options, kind, message, tmp_path, data_dir):
    with pytest.raises(kind, match=message):
        compile_bundle(data_dir / "clip-mistral", tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0.5, 1, Count(1), (Share(0.5), Count(256)), "50%"])
def test_a_budget_that_is_no_share(budget, tmp_path, data_dir):
    with pytest.raises(OptionError, match="a bundle holds shares of visual tokens"):
        compile_bundle(data_dir / "auroracap", tmp_path / "bundle", visual_tokens=budget)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_kept_before_anything_is_read(tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OptionError, match="exists"):
        compile_bundle(tmp_path / "no-checkpoint", tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="no-checkpoint is not a folder"):
        compile_bundle(tmp_path / "no-checkpoint", tmp_path / "other")


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.embed_tokens.weight"])
def test_nothing_is_left_after_an_error_in_the_middle(tensor, tmp_path, data_dir):
    checkpoint = shutil.copytree(data_dir / "clip-mistral", tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[tensor][-1, -1] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors")
    output = tmp_path / "output"
    output.mkdir()
    steps: list[str] = []
    with pytest.raises(CheckpointError, match=rf"the tensor {re.escape(tensor)} holds NaN") as caught:
        compile_bundle(checkpoint, output / "bundle", progress=lambda label, *_: steps.append(label))
    assert "\n" not in str(caught.value)
    # The output head is the last tensor of all; the table is read before anything is written.
    assert steps[-1] == ("writing decoder" if tensor == "lm_head.weight" else "tracing decoder")
    assert list(output.iterdir()) == []


def test_an_old_bundle_survives_a_failed_overwrite(tmp_path, compiled, data_dir, monkeypatch):
    bundle = shutil.copytree(compiled("clip-mistral"), tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}

    def fail(*_):
        raise IntertitleError("the disk is full")

    monkeypatch.setattr(compile_module, "_write_component", fail)
    with pytest.raises(IntertitleError, match="full"):
        compile_bundle(data_dir / "clip-mistral", bundle, weights="fp32", overwrite=True)
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


# --- streaming


def traced(weights: dict[str, Weight], computed: dict[str, np.ndarray] | None = None) -> TracedGraph:
    """A graph of initializers only."""
    graph = ir.Graph([], [], nodes=[], name="test")
    for name, weight in weights.items():
        graph.initializers[name] = ir.Value(
            name=name,
            shape=ir.Shape(weight.shape),
            type=ir.TensorType(weight.dtype),
            const_value=ir.LazyTensor(lambda: None, dtype=weight.dtype, shape=ir.Shape(weight.shape), name=name),
        )
    for name, value in (computed or {}).items():
        constant = ir.tensor(value, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=constant.shape, type=ir.TensorType(constant.dtype), const_value=constant
        )
    return TracedGraph(ir.Model(graph, ir_version=10), weights)


class Sink:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: memoryview) -> None:
        self.data += bytes(data)


def test_weights_are_written_one_at_a_time():
    """However many layers there are, at most the tensor at hand and the one before are in memory."""
    layers = 12
    weights = {}
    for layer in range(layers):
        weights[f"{layer}.norm"] = Weight(f"{layer}.norm", ir.DataType.FLOAT, (64,))
        weights[f"{layer}.qweight"] = Weight(f"{layer}.qweight", ir.DataType.UINT8, (96, 2, 16))
        weights[f"{layer}.scales"] = Weight(f"{layer}.scales", ir.DataType.FLOAT, (96, 2))
        weights[f"{layer}.T"] = Weight(f"{layer}.other", ir.DataType.FLOAT, (64, 96), transposed=True)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    asked: list[str] = []
    most = 0

    def tensor(entry: str) -> torch.Tensor:
        nonlocal most
        generator = torch.Generator().manual_seed(len(asked))
        asked.append(entry)
        value = torch.randn((64,) if entry.endswith("norm") else (96, 64), generator=generator)
        alive.add(value)
        most = max(most, len(alive))
        return value

    graph, sink = traced(weights), Sink()
    stored = Stored(LAYOUTS["int4_nbits"], 32)
    reader = WeightReader(tensor, {str(layer): stored for layer in range(layers)})
    written = list(write_weights(graph, sink, "data", reader))
    assert most <= 2
    # One reading of a weight for its codes and scales together.
    assert asked == [f"{layer}.{leaf}" for layer in range(layers) for leaf in ("norm", "weight", "other")]
    assert len(written) == len(weights)
    assert sum(written) == len(sink.data) <= payload_size(graph)


def test_what_the_trace_computed_is_written_too():
    table = np.arange(3000, dtype=np.float32).reshape(60, 50)
    small = np.arange(5, dtype=np.int64)
    graph, sink = traced({"w": Weight("w", ir.DataType.FLOAT, (3,))}, {"table": table, "small": small}), Sink()
    with pytest.raises(RuntimeError, match="the weights of w have not been written"):
        serialize(graph)
    list(write_weights(graph, sink, "data", WeightReader(lambda _: torch.ones(3))))
    proto = onnx.load_from_string(serialize(graph))
    where = {tensor.name: location(tensor) for tensor in proto.graph.initializer}
    assert where["small"] == {}
    start = int(where["table"]["offset"])
    assert start % 4096 == 0
    assert np.array_equal(np.frombuffer(sink.data[start:], np.float32).reshape(60, 50), table)


def test_a_tensor_of_the_wrong_shape_is_an_error():
    graph = traced({"w": Weight("w", ir.DataType.FLOAT, (2, 3))})
    with pytest.raises(ValueError, match=r"w: shape \(3, 2\) where the graph has \(2, 3\)"):
        list(write_weights(graph, Sink(), "data", WeightReader(lambda _: torch.ones(3, 2))))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_peak_memory_does_not_grow_with_depth(weights, tmp_path, monkeypatch):
    """4 and 24 layers of 25 MB each: what is added to the checkpoint is not added to the peak.

    A layer's nodes take 2 MB while they are traced, whatever its width: that is most of what the peak does grow by.
    """
    tiny = random_checkpoint.SIZES["tiny"]
    peak, size = {}, {}
    for layers in (4, 24):
        decoder = replace(
            tiny.decoder,
            hidden_size=1024,
            intermediate_size=3072,
            num_layers=layers,
            num_heads=16,
            num_kv_heads=4,
            head_dim=64,
        )
        deep = replace(tiny, decoder=decoder, audio=replace(tiny.audio, out_size=1024), shard_bytes=10**9)
        monkeypatch.setitem(random_checkpoint.SIZES, "deep", deep)
        checkpoint, bundle = tmp_path / f"checkpoint-{layers}", tmp_path / f"bundle-{layers}"
        random_checkpoint.write_checkpoint(checkpoint, "deep")
        size[layers] = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        command = [sys.executable, "-m", "intertitle.cli", "compile", str(checkpoint), "-o", str(bundle), "-q"]
        peak[layers] = run_process([*command, "--weights", weights]).peak_bytes
        shutil.rmtree(checkpoint)
        shutil.rmtree(bundle)
    added = size[24] - size[4]
    assert added > 450e6
    assert peak[24] - peak[4] < added / 4


@pytest.mark.parametrize("block_size", [64, 128])
def test_a_larger_block_size_is_stored_and_runs(block_size, tmp_path, data_dir):
    bundle = compile_bundle(data_dir / "clip-mistral", tmp_path / "b", weights="int4", block_size=block_size).path
    assert manifest_of(bundle).components["decoder"].block_size == block_size
    products = [node for node in decoder_of(bundle).node if node.op_type == "MatMulNBits"]
    assert {attributes(node)["block_size"] for node in products} == {block_size}
    opened = Bundle.open(bundle)
    decoder = OrtDecoder(opened.file("decoder.ort.onnx"), opened.manifest.decoder, opened.embed)
    logits = decoder.open(1, 8).prefill(0, np.ones((8, 128), np.float32))
    exact = Bundle.open(compile_bundle(data_dir / "clip-mistral", tmp_path / "f", weights="fp32").path)
    reference = OrtDecoder(exact.file("decoder.ort.onnx"), exact.manifest.decoder, exact.embed)
    theirs = reference.open(1, 8).prefill(0, np.ones((8, 128), np.float32))
    assert 1e-3 < np.abs(logits - theirs).max() / np.abs(theirs).max() < 0.6


@pytest.mark.parametrize(("weights", "block_size"), [("fp32", 32), ("int4", 48)])
def test_block_sizes_that_cannot_be(weights, block_size, tmp_path, data_dir):
    with pytest.raises(OptionError, match="block size"):
        compile_bundle(data_dir / "clip-mistral", tmp_path / "b", weights=weights, block_size=block_size)
