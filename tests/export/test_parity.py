"""Compiled graphs against the numbers of the original implementations (tests/data/*/expected.npz)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from intertitle.calibration.recipe import roundings
from intertitle.calibration.reference import Reference
from intertitle.contract.pipeline import Sampling
from intertitle.contract.targets import get_target
from intertitle.export.compile import compile_bundle
from intertitle.export.components import component_graph, stage_signature
from intertitle.export.graph_writer import WeightReader, serialize, write_weights
from intertitle.models import open_checkpoint
from intertitle.models.config import ConnectorConfig
from intertitle.models.connectors import connector_parts
from intertitle.models.stages import build_on_meta, run_stage
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.decoding import Decoding, TokenSearch, generate, resolve
from intertitle.runtime.encoder import Encoder, Units
from intertitle.runtime.ort import OrtComponent, OrtDecoder
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Share
from tokenizers import Tokenizer
from tokenizers.models import BPE

ALL = ["av-qwen2", "clip-mistral", "clip-mistral-lora", "clip-mixtral", "auroracap", "auroracap-keep"]
MODES = {
    "av-qwen2": ["video.", "audio.", "audiovideo."],
    "clip-mistral": ["video."],
    "clip-mistral-lora": ["video."],
    "clip-mixtral": ["video."],
    "siglip-phi3": ["video."],
    "av-qwen2-explicit": ["video.", "audio.", "audiovideo."],
    "clip-mistral-explicit": ["video."],
    "auroracap-keep": [""],
}


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def component(bundle: Bundle, name: str) -> OrtComponent:
    return OrtComponent(bundle.file(bundle.manifest.components[name].graph))


def decoder(bundle: Bundle) -> OrtDecoder:
    graph = bundle.file(bundle.manifest.components["decoder"].graph)
    return OrtDecoder(graph, bundle.manifest.decoder, bundle.embed)


@pytest.mark.parametrize("variant", ALL)
def test_encoders(variant, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant)), expected(variant)
    keep = {"auroracap": ".keep1.0", "auroracap-keep": ".keep0.4"}.get(variant, "")
    features = numbers[f"vision_features{keep}"]
    tokens = numbers["video_tokens"][np.newaxis] if not keep else numbers[f"visual_tokens{keep}"]
    encoder = Encoder(bundle, Tokenizer.from_file(str(bundle.file("tokenizer.json"))))
    vision, *connector = bundle.manifest.pipeline.needed("connector")
    found = Units.all_distinct(features)
    for stage in connector:
        found = encoder.run_stage(stage, [found], Stages())
    mine = found.expand().reshape(tokens.shape)
    if variant != "clip-mistral-lora":
        assert relative_error(component(bundle, "vision")(numbers["pixel_values"]), features) < 1e-4
        pixels = Units.all_distinct(numbers["pixel_values"])
        assert relative_error(encoder.run_stage(vision, [pixels], Stages()).expand(), features) < 1e-4
        assert relative_error(mine, tokens) < 1e-4
    else:
        # The adapter's folder replaces the connector's tensors; its prompt holds the tokens that come out.
        start = int(np.argmin(numbers["prompt_ids"]))
        embeds = numbers["video.inputs_embeds"][start : start + tokens.shape[1]]
        assert relative_error(mine[0], embeds) < 1e-4
        assert relative_error(embeds, tokens[0]) > 1e-2


def test_vision_does_not_depend_on_the_batch(compiled, expected):
    pixels = expected("auroracap")["pixel_values"]
    tower = component(Bundle.open(compiled("auroracap-keep")), "vision")
    together, alone = tower(pixels), np.concatenate([tower(pixels[i : i + 1]) for i in range(len(pixels))])
    assert relative_error(together, alone) < 1e-5


def test_ratios_of_merging_share_the_weights(tmp_path, data_dir, expected):
    """Two graphs over one data file, each with the numbers of the original implementation."""
    compiled = compile_bundle(
        data_dir / "auroracap", tmp_path / "bundle", weights="fp32", visual_tokens=(Share(0.4), Share(1.0))
    )
    bundle, numbers = Bundle.open(compiled.path), expected("auroracap")
    vision = bundle.manifest.pipeline.stage("vision")
    assert [(each.keep, each.graph, each.tokens) for each in vision.variants] == [
        (0.4, "vision.onnx", 37),
        (1.0, "vision.keep1.0.onnx", 64),
    ]
    assert sorted(name for name in bundle.manifest.files if name.startswith("vision")) == [
        "vision.keep1.0.onnx",
        "vision.onnx",
        "vision.onnx.data",
    ]
    # Nothing of the second graph was added to the weights.
    single = Bundle.open(compile_bundle(data_dir / "auroracap", tmp_path / "one", visual_tokens=Share(0.4)).path)
    data = "vision.onnx.data"
    assert bundle.manifest.files[data] == single.manifest.files[data]
    # The connector's graph serves both.
    assert bundle.manifest.components["connector"].inputs[0].shape[:2] == ["frames", "tokens"]
    assert single.manifest.components["connector"].inputs[0].shape[:2] == ["frames", 37]
    for ratio in vision.variants:
        graph, keep = OrtComponent(bundle.file(ratio.graph)), f"keep{ratio.keep}"
        features = graph(numbers["pixel_values"])
        assert relative_error(features, numbers[f"vision_features.{keep}"]) < 1e-4
        tokens = component(bundle, "connector")(features)
        assert relative_error(tokens, numbers[f"visual_tokens.{keep}"]) < 1e-4


@pytest.mark.parametrize("kind", ["stc_connector", "stp_connector", "spatial_conv", "spatial_pool", "mlp2x_gelu"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 0, 0, 0], [2, 0, 0, 1, 3]])
def test_every_kind_of_connector_over_repeated_frames(kind, order, tmp_path):
    """Stages traced one by one and run on distinct frames and windows, against all of them in PyTorch."""
    torch.manual_seed(0)
    parts = connector_parts(ConnectorConfig(kind, 8, 8, grid=5))
    names = [part.stage.name for part in parts]
    assert names == (["frame_connector", "connector"] if kind.startswith("st") else ["connector"])
    # What the tower would give, which is not there.
    values = {"vision": torch.randn(4, 25, 8)}
    wanted = {"vision": values["vision"][order]}
    sizes: Any = SimpleNamespace(
        sampling=Sampling(rule="centered", count=4), visual=list, stages=(), units=lambda *_: 4, tokens=lambda *_: 25
    )
    for part in parts:
        stage, name = part.stage, part.stage.name
        module = part.build(part.config).eval().requires_grad_(False)
        state = {key: torch.randn_like(value) * 0.3 for key, value in module.state_dict().items()}
        module.load_state_dict(state)
        signature = stage_signature(stage, sizes, values)
        graph = component_graph(name, build_on_meta(part), signature, get_target("cpu"), "fp32").traced
        with (tmp_path / f"{name}.data").open("wb") as file:
            list(write_weights(graph, file, f"{name}.data", WeightReader(state.__getitem__)))
        (tmp_path / name).write_bytes(serialize(graph))
        values[name] = run_stage(stage, module, values)
        wanted[name] = run_stage(stage, module, wanted)
    # As much of a bundle as the encoder looks at.
    records = {name: SimpleNamespace(graph=name) for name in names}
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(pipeline=sizes, components=records), file=lambda name: tmp_path / name
    )
    encoder = Encoder(bundle, Tokenizer(BPE()))
    found = Units(values["vision"].numpy(), np.array(order))
    for part in parts:
        found = encoder.run_stage(part.stage, [found], Stages())
    assert relative_error(found.expand(), wanted["connector"].numpy()) < 1e-5


def test_audio(compiled, expected):
    bundle, numbers = Bundle.open(compiled("av-qwen2")), expected("av-qwen2")
    tokens = component(bundle, "audio")(numbers["fbank_video_policy"][np.newaxis])
    assert relative_error(tokens[0], numbers["audio_tokens"]) < 1e-4


@pytest.mark.parametrize(("variant", "mode"), [(v, m) for v, modes in MODES.items() for m in modes])
def test_greedy_tokens(variant, mode, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant)), expected(variant)
    embeds, tokens = numbers[f"{mode}inputs_embeds"], numbers[f"{mode}greedy_tokens"].tolist()
    inference = decoder(bundle).open(1, len(embeds) + 48)
    logits = inference.prefill(0, embeds)[0]
    assert relative_error(logits, numbers[f"{mode}last_logits"]) < 1e-4
    settings = resolve(Decoding(max_new_tokens=len(tokens)), bundle.manifest.generation)
    assert [token.id for token in generate(inference, logits, TokenSearch(settings))] == tokens


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap"])
def test_int4_graph_is_the_rounded_model(variant, compiled, expected, data_dir):
    """int4 graphs against PyTorch with the same rounded weights: what is left is the kernel's int8 activations."""
    numbers = expected(variant)
    embeds = numbers[next(name for name in numbers if name.endswith("inputs_embeds"))]
    bundle = Bundle.open(compiled(variant, "int4"))
    mine = decoder(bundle).open(1, len(embeds)).prefill(0, embeds)
    checkpoint = open_checkpoint(data_dir / variant)
    rounded = Reference(checkpoint, roundings(bundle.manifest, checkpoint)).open(1, len(embeds)).prefill(0, embeds)
    original = Reference(open_checkpoint(data_dir / variant)).open(1, len(embeds)).prefill(0, embeds)
    assert relative_error(mine, rounded) < 5e-2
    # Without this the line above could not tell a rounded model from the original.
    assert relative_error(mine, original) > 2 * relative_error(mine, rounded)


def test_rows_of_different_length_share_a_step(compiled):
    """The seam's promise: rows prefilled apart, in chunks, stepped together, equal rows run alone."""
    opened = decoder(Bundle.open(compiled("av-qwen2")))
    random = np.random.default_rng(0)
    prompts = [random.standard_normal((length, 128)).astype(np.float32) for length in (700, 9, 300)]
    tokens = random.integers(0, 369, (4, 3))

    def alone(row: int) -> list[np.ndarray]:
        inference = opened.open(1, 800)
        return [inference.prefill(0, prompts[row])[0]] + [inference.step(t[row : row + 1])[0].copy() for t in tokens]

    together = opened.open(3, 800)
    firsts = [together.prefill(row, prompt)[0] for row, prompt in enumerate(prompts)]
    steps = [together.step(t).copy() for t in tokens]
    for row in range(3):
        expected_row = alone(row)
        assert relative_error(firsts[row], expected_row[0]) < 1e-5
        for step, logits in enumerate(steps):
            assert relative_error(logits[row], expected_row[step + 1]) < 1e-5


def test_prefill_in_pieces_gives_the_logits_of_every_position(compiled):
    opened = decoder(Bundle.open(compiled("av-qwen2")))
    embeds = np.random.default_rng(1).standard_normal((1100, 128)).astype(np.float32)
    one_by_one = opened.open(1, 1100)
    expected_rows = [one_by_one.prefill(0, embeds[:1090])[0]]
    expected_rows += [one_by_one.prefill(0, embeds[i : i + 1])[0] for i in range(1090, 1100)]
    whole = opened.open(1, 1100).prefill(0, embeds, num_logits=11)
    assert relative_error(whole, np.stack(expected_rows)) < 1e-5
    across_chunks = opened.open(1, 1100).prefill(0, embeds, num_logits=600)
    assert across_chunks.shape[0] == 600
    assert relative_error(across_chunks[-11:], whole) < 1e-5


def test_truncate_and_rearrange(compiled):
    opened = decoder(Bundle.open(compiled("clip-mistral")))
    random = np.random.default_rng(2)
    prompt = random.standard_normal((20, 128)).astype(np.float32)
    inference = opened.open(2, 40)
    inference.prefill(0, prompt)
    inference.rearrange({1: 0})
    first = inference.step(np.array([5, 9])).copy()
    inference.truncate(0, 20)
    inference.truncate(1, 20)
    second = inference.step(np.array([9, 5]))
    assert relative_error(first[0], second[1]) < 1e-6
    assert relative_error(first[1], second[0]) < 1e-6
