"""``verify`` on whole bundles: sound ones pass, and what is broken in one is what the report names."""

from __future__ import annotations

import hashlib
import json
import shutil
import wave
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import intertitle
import msgspec
import numpy as np
import onnx
import pytest
import torch
from intertitle.calibration.comparison import Report
from intertitle.calibration.reference import Reference
from intertitle.calibration.verify import check_same_model, verify, verify_bundle
from intertitle.errors import MediaError, OptionError
from intertitle.export.compile import compile_bundle
from intertitle.models import open_checkpoint
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.timing import Stages
from safetensors.torch import load_file, save_file

DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"
VISUAL = ["vision", "frame_connector", "connector"]
TEXT = ["embeddings", "prefill logits", "decode logits"]


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> Path:
    """Two seconds of a falling tone over noise, 16 bit mono at 22.05 kHz."""
    path = tmp_path_factory.mktemp("media") / "tone.wav"
    time = np.arange(44_100) / 22_050
    sound = 0.3 * np.sin(2 * np.pi * (900 - 200 * time) * time)
    sound += 0.05 * np.random.default_rng(0).standard_normal(len(time))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22_050)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture
def check(compiled, data_dir) -> Callable[..., Report]:
    """``check(variant, ...)``: verify its fp32 bundle, or the one given, against its checkpoint on the shipped clip."""

    def run(variant: str, bundle: Path | None = None, media: Iterable[Path] = (DEMO,), **more: Any) -> Report:
        checkpoint = variant.removesuffix("-lora").removesuffix("-keep")
        if variant.endswith("-lora"):
            more = {"adapter": data_dir / variant, **more}
        settings = {"max_new_tokens": 6, **more}
        return verify_bundle(bundle or compiled(variant), data_dir / checkpoint, list(media), **settings)

    return run


def stages(report: Report) -> list[list[str]]:
    return [[stage.stage for stage in clip.stages] for clip in report.clips]


def seal(bundle: Path, manifest: dict[str, Any] | None = None) -> Path:
    """Make ``bundle.json`` true again after its files were changed."""
    manifest = json.loads((bundle / "bundle.json").read_text()) if manifest is None else manifest
    for name, record in manifest["files"].items():
        data = (bundle / name).read_bytes()
        record |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle


def tensors(bundle: Path, graph: str) -> dict[str, np.memmap]:
    """The float32 weights of a graph, to be changed in place."""
    found = {}
    for tensor in onnx.load(bundle / graph, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type == onnx.TensorProto.FLOAT and where:
            file, offset = bundle / where["location"], int(where["offset"])
            found[tensor.name] = np.memmap(file, np.float32, "r+", offset, tuple(tensor.dims))
    return found


# --- sound bundles


def test_a_captioner_that_listens_in_every_mode(check, wav):
    report = check("av-qwen2", media=[DEMO, wav], max_new_tokens=24)
    assert report.verdict == "PASS"
    assert (report.first_divergent, report.notes) == (None, [])
    assert [clip.mode for clip in report.clips] == ["audiovideo", "audio"]
    assert stages(report) == [["pixels", "fbank", *VISUAL, "audio", *TEXT], ["fbank", "audio", *TEXT]]
    for clip in report.clips:
        assert clip.tokens is not None
        assert clip.tokens.equal == clip.tokens.compared > 6
        assert clip.drift is None
        assert all(stage.error <= stage.tolerance <= 2**-7 for stage in clip.stages)
        # Far below the tolerances: what a sound fp32 bundle is off by.
        assert all(stage.error < 1e-5 for stage in clip.stages if stage.stage != "fbank")
    silent = check("av-qwen2", audio=False)
    assert (silent.verdict, silent.clips[0].mode, stages(silent)) == ("PASS", "video", [["pixels", *VISUAL, *TEXT]])


@pytest.mark.parametrize("variant", ["clip-mistral", "clip-mistral-lora", "clip-mixtral", "auroracap-keep"])
def test_captioners_that_only_see(variant, check):
    report = check(variant, max_new_tokens=24)
    assert (report.verdict, report.first_divergent, report.notes) == ("PASS", None, [])
    visual = ["vision", "connector"] if variant == "auroracap-keep" else VISUAL
    assert stages(report) == [["pixels", *visual, *TEXT]]


def test_every_compiled_ratio_of_merging_is_compared(check, compiled, tmp_path):
    report = check("auroracap", max_new_tokens=2)
    assert report.verdict == "PASS"
    shares = [stage for stage in stages(report)[0] if stage.startswith("vision")]
    assert shares == ["vision", "vision, 50%", "vision, 25%", "vision, 10%"]
    # The graph of another share in the place of one.
    bundle = shutil.copytree(compiled("auroracap"), tmp_path / "broken")
    shutil.copy(bundle / "vision.keep0.1.onnx", bundle / "vision.keep0.25.onnx")
    report = check("auroracap", seal(bundle), max_new_tokens=2)
    assert (report.verdict, report.first_divergent) == ("FAIL", "vision")
    failed = [stage.stage for stage in report.clips[0].stages if stage.verdict == "FAIL"]
    assert failed == ["vision, 25%"]


def test_int4_is_the_rounded_model_and_tells_its_distance(check, compiled, data_dir):
    bundle = compiled("clip-mistral", "int4")
    report = check("clip-mistral", bundle, max_new_tokens=8)
    # int8 activations differ between processors, so that a near-tie may fall either way.
    assert report.verdict in ("PASS", "AMBIGUOUS")
    assert report.first_divergent is None
    assert report.weights == report.environment["weights"] == "int4"
    assert (report.environment["block_size"], report.environment["accuracy_level"]) == (32, 4)
    (clip,) = report.clips
    # With its products in float32 the graph is the rounded model as closely as an fp32 one is the original.
    assert all(stage.error < 1e-5 for stage in clip.stages)
    drift = clip.drift
    assert drift is not None
    # What rounding weights does to the model is far more than what rounding activations adds to it.
    assert drift.logits_error > 3 * drift.activations_error
    assert drift.activations_error < 5e-2

    # The same again: the float32 model's greedy caption, in one pass through the int4 graph.
    captioner = intertitle.Captioner.load(bundle)
    encoded = captioner.encoder.encode(captioner.read(DEMO), Stages())
    prompt = captioner.encoder.prompt_embeds(encoded, captioner.manifest.default_instruction)
    original = Reference(open_checkpoint(data_dir / "clip-mistral")).greedy(prompt, 8)
    fed = np.concatenate([prompt, captioner.bundle.embed(original.tokens[:-1])])
    ours = torch.from_numpy(captioner.open_inference(len(fed)).prefill(0, fed, num_logits=8))
    theirs = torch.from_numpy(original.logits)
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
    )
    # The prompts differ in the last bits, which int8 activations make a few percent of the drift.
    assert drift.logits_error == pytest.approx(float((ours - theirs).abs().max() / theirs.abs().max()), rel=0.2)
    assert drift.kl == pytest.approx(float(divergence), rel=0.2)
    assert drift.top1_agreement == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()), abs=0.13)
    mine = captioner.caption(DEMO, decoding=intertitle.Decoding(max_new_tokens=8)).token_ids
    assert drift.compared == 8
    assert drift.equal_tokens == next((i for i in range(8) if mine[i] != original.tokens[i]), 8)


def test_int4_in_every_mode(check, compiled, wav):
    report = check("av-qwen2", compiled("av-qwen2", "int4"), media=[DEMO, wav])
    assert report.verdict in ("PASS", "AMBIGUOUS")
    for clip in report.clips:
        assert clip.drift is not None
        assert all(stage.error < 1e-5 for stage in clip.stages if stage.stage != "fbank")
    assert [clip.mode for clip in report.clips] == ["audiovideo", "audio"]


# --- broken bundles


BROKEN = [
    ("vision", "vision"),
    ("frame_connector", "frame_connector"),
    ("connector", "connector"),
    ("audio", "audio"),
    ("decoder", "prefill logits"),
    ("embedding", "embeddings"),
]


@pytest.mark.parametrize(
    ("variant", "component", "stage"),
    [("av-qwen2", *each) for each in BROKEN]
    + [
        (variant, *each)
        for variant in ("llava-video", "llava-next-video")
        for each in BROKEN
        if each[0] not in ("frame_connector", "audio")
    ],
)
def test_the_component_with_wrong_weights_is_named(variant, component, stage, check, compiled, tmp_path):
    bundle = shutil.copytree(compiled(variant), tmp_path / "broken")
    if component == "embedding":
        record = json.loads((bundle / "bundle.json").read_text())["embedding"]
        assert record["dtype"] == "float32"
        table = np.memmap(bundle / "embedding.bin", np.float32, "r+", shape=tuple(record["shape"]))
        table[:] *= 1.01
    else:
        graph = "decoder.ort.onnx" if component == "decoder" else f"{component}.onnx"
        weights = tensors(bundle, graph)
        # Half of one matrix of them, by one percent (of a whole one a norm behind it would notice nothing).
        largest = max((name for name in weights if weights[name].ndim > 1), key=lambda name: weights[name].size)
        weights[largest][..., ::2] *= 1.01
        weights[largest].flush()
    report = check(variant, seal(bundle))
    assert (report.verdict, report.first_divergent) == ("FAIL", component)
    failed = [result.stage for result in report.clips[0].stages if result.verdict == "FAIL"]
    # Each stage has the reference's input: a wrong component fails alone (a wrong table also looks up wrong tokens).
    assert failed[0] == stage
    allowed = {"decoder": {"decode logits"}, "embedding": {"decode logits"}}
    assert set(failed[1:]) <= allowed.get(component, set())
    assert report.notes == []


def test_the_stage_with_other_weights_is_named(every_variant, compiled, open_variant):
    """In every family and for each of its stages: the reference has other weights there, and nowhere else."""
    captioner = intertitle.Captioner.load(compiled(every_variant))
    reference = Reference(open_variant(every_variant))
    assert verify(captioner, reference, [DEMO], max_new_tokens=2).verdict == "PASS"
    for component in reference.checkpoint.components:
        module = reference.module(component)
        matrices = [weight for weight in module.parameters() if weight.ndim > 1]
        before = {name: value.clone() for name, value in module.state_dict().items()}
        hook = None
        if matrices:
            # Half of one matrix, by two percent (of a whole one a norm behind it would notice nothing).
            max(matrices, key=lambda weight: weight.numel()).data[..., ::2] *= 1.02
        else:
            # A stage without weights is another one if it gives something else.
            hook = module.register_forward_hook(lambda _module, _inputs, output: output * 1.02)
        report = verify(captioner, reference, [DEMO], max_new_tokens=2)
        assert (report.verdict, report.first_divergent) == ("FAIL", component)
        failed = {stage.stage.partition(",")[0] for stage in report.clips[0].stages if stage.verdict == "FAIL"}
        assert failed <= ({"prefill logits", "decode logits"} if component == "decoder" else {component})
        module.load_state_dict(before)
        if hook is not None:
            hook.remove()
    assert verify(captioner, reference, [DEMO], max_new_tokens=2).verdict == "PASS"


def test_swapped_experts_are_no_error_but_wrong_ones_are(check, compiled, tmp_path):
    """int8 activations send a token of the fixture to another expert, and the caption goes its own way."""
    bundle = compiled("clip-mixtral", "int4")
    report = check("clip-mixtral", bundle, max_new_tokens=16)
    assert (report.verdict, report.first_divergent) == ("AMBIGUOUS", None)
    broken = shutil.copytree(bundle, tmp_path / "broken")
    scales = tensors(broken, "decoder.ort.onnx")["decoder.layers.1.mlp.experts.3.down_proj.scales"]
    scales[:] *= 1.01
    scales.flush()
    report = check("clip-mixtral", seal(broken), max_new_tokens=16)
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")


def test_a_small_error_in_int4_weights_is_seen(check, compiled, tmp_path):
    """One percent of one layer: less than what int8 activations do to the logits."""
    bundle = shutil.copytree(compiled("clip-mistral", "int4"), tmp_path / "broken")
    scales = tensors(bundle, "decoder.ort.onnx")["decoder.layers.1.mlp.down_proj.scales"]
    scales[:] *= 1.01
    scales.flush()
    report = check("clip-mistral", seal(bundle))
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")
    (clip,) = report.clips
    assert clip.drift is not None
    error = {stage.stage: stage.error for stage in clip.stages}
    assert 1e-4 < error["prefill logits"] < clip.drift.activations_error


def test_a_wrong_decode_behind_a_right_prefill_is_seen(check, compiled, tmp_path):
    """Rotary tables that are right only as far as the prompt goes."""
    bundle = shutil.copytree(compiled("clip-mistral"), tmp_path / "broken")
    once = intertitle.Decoding(max_new_tokens=1)
    length = intertitle.Captioner.load(bundle).caption(DEMO, decoding=once).prompt_tokens
    tensors(bundle, "decoder.ort.onnx")["decoder.sin"][length:] = 1
    report = check("clip-mistral", seal(bundle))
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")
    failed = [stage.stage for stage in report.clips[0].stages if stage.verdict == "FAIL"]
    assert failed == ["decode logits"]


def test_numbers_that_are_none_make_a_report_that_is_json(check, compiled, tmp_path):
    bundle = shutil.copytree(compiled("av-qwen2", "int4"), tmp_path / "broken")
    scales = tensors(bundle, "decoder.ort.onnx")
    scales["decoder.lm_head.scales"][7] = np.nan
    scales["decoder.lm_head.scales"].flush()
    report = check("av-qwen2", seal(bundle))
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")
    again = json.loads(json.dumps(asdict(report), allow_nan=False))
    by_stage = {stage["stage"]: stage for stage in again["clips"][0]["stages"]}
    assert by_stage["prefill logits"]["relative_error"] is None
    assert by_stage["prefill logits"]["problem"] == "the bundle's output is not finite"
    assert again["clips"][0]["drift"] is None


def test_another_prompt_is_seen(check, compiled, tmp_path):
    bundle = shutil.copytree(compiled("clip-mistral"), tmp_path / "broken")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["pipeline"]["prompts"]["video"]["pieces"][-1]["text"] += "Say: "
    report = check("clip-mistral", seal(bundle, manifest))
    assert (report.verdict, report.first_divergent) == ("FAIL", "embedding")
    (embeddings,) = [stage for stage in report.clips[0].stages if stage.stage == "embeddings"]
    assert embeddings.problem is not None
    assert "shape" in embeddings.problem


def test_other_decoding_defaults_are_seen(check, compiled, tmp_path):
    """Every stage is right, and yet the captions part."""
    bundle = shutil.copytree(compiled("clip-mistral"), tmp_path / "broken")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["generation"]["repetition_penalty"] = 50.0
    report = check("clip-mistral", seal(bundle, manifest), max_new_tokens=32)
    assert (report.verdict, report.first_divergent) == ("FAIL", "greedy tokens")
    assert all(stage.verdict == "PASS" for stage in report.clips[0].stages)


# --- the wrong reference


def test_a_missing_adapter_is_named(check, compiled):
    report = check("clip-mistral", compiled("clip-mistral-lora"))
    # The adapter brings its own connector, which comes before the decoder that it changes.
    assert (report.verdict, report.first_divergent) == ("FAIL", "connector")
    assert report.notes == [
        "the bundle has the adapter clip-mistral-lora merged, the reference none: give it with --adapter"
    ]


def test_an_adapter_too_many_is_named(check, compiled):
    report = check("clip-mistral-lora", compiled("clip-mistral"))
    assert (report.verdict, report.first_divergent) == ("FAIL", "connector")
    assert report.notes == ["the reference has an adapter merged, the bundle none: leave --adapter out"]


def test_another_adapter_is_named(check, compiled, data_dir, tmp_path):
    other = shutil.copytree(data_dir / "clip-mistral-lora", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "adapter_model.safetensors")
    report = check("clip-mistral-lora", adapter=other)
    # Its connector is the same, its decoder is not.
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")
    assert report.notes == [
        "the reference's adapter is not the one that was merged into the bundle (clip-mistral-lora)"
    ]


def test_another_checkpoint_is_named(compiled, data_dir, tmp_path):
    other = shutil.copytree(data_dir / "clip-mistral", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.5
    save_file(weights, other / "model.safetensors")
    report = verify_bundle(compiled("clip-mistral"), other, [DEMO], max_new_tokens=2)
    assert (report.verdict, report.first_divergent) == ("FAIL", "decoder")
    assert report.notes == ["the reference is not the checkpoint that the bundle was compiled from (clip-mistral)"]


@pytest.mark.parametrize(
    ("variant", "checkpoint", "message"),
    [
        ("av-qwen2", "auroracap", "the bundle is a videollama2 captioner, the reference a auroracap one"),
        ("auroracap-keep", "clip-mistral", "token merging"),
        ("clip-mistral", "av-qwen2", "not the same model: image size 56 in the bundle, 70 in the reference"),
    ],
)
def test_another_model_is_refused(variant, checkpoint, message, compiled, data_dir):
    with pytest.raises(OptionError, match=message):
        verify_bundle(compiled(variant), data_dir / checkpoint, [DEMO])


def test_the_stage_that_is_another_one_is_named(compiled, open_variant):
    """The pipelines are compared as data: how a stage is called, what it takes, and what it gives."""
    manifest = Bundle.open(compiled("clip-mistral")).manifest
    reference = Reference(open_variant("clip-mistral"))
    check_same_model(manifest, reference)
    pipeline = manifest.pipeline
    vision, framewise, connector = pipeline.stages
    # An stc_connector's windows, with the padding of none of its relatives.
    unpadded = msgspec.structs.replace(connector, unit=msgspec.structs.replace(connector.unit, padding=0))
    finer = msgspec.structs.replace(vision, tokens=25)
    elsewhere = msgspec.structs.replace(
        connector, inputs=(msgspec.structs.replace(connector.inputs[0], source="vision"),)
    )
    for stages, message in (
        ((vision, framewise, unpadded), "stage 'connector': type window, kernel 2, stride 2, padding 0, of frame_conn"),
        ((finer, framewise, connector), "stage 'vision': type frame, of pixels to 25 tokens of width"),
        ((vision, framewise, elsewhere), "stage 'connector': .* of vision to 9 tokens .* of frame_connector to 9"),
        ((vision, elsewhere), "stages vision, connector in the bundle, vision, frame_connector, connector in the ref"),
    ):
        other = msgspec.structs.replace(manifest, pipeline=msgspec.structs.replace(pipeline, stages=stages))
        with pytest.raises(OptionError, match=f"not the same model: {message}"):
            check_same_model(other, reference)
    faster = msgspec.structs.replace(pipeline.sampling, count=9)
    other = msgspec.structs.replace(manifest, pipeline=msgspec.structs.replace(pipeline, sampling=faster))
    with pytest.raises(OptionError, match="not the same model: sampling rule centered, count 9"):
        check_same_model(other, reference)


def test_media_that_cannot_be_read_are_refused(check, tmp_path, wav):
    with pytest.raises(MediaError, match="only sound"):
        check("clip-mistral", media=[wav])
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match=r"empty\.mp4"):
        check("clip-mistral", media=[tmp_path / "empty.mp4"])


# --- the report


def test_environment_and_progress(check, compiled, data_dir):
    heard: list[str] = []
    report = check("clip-mistral-lora", progress=heard.append, max_new_tokens=1)
    made = Bundle.open(compiled("clip-mistral-lora"))
    environment = report.environment
    manifest = (made.path / "bundle.json").read_bytes()
    assert environment["bundle_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert environment["checkpoint_sha256"] == made.manifest.provenance.checkpoint_sha256
    assert environment["adapter_sha256"] == made.manifest.provenance.adapter_sha256 is not None
    assert (environment["weights"], environment["block_size"], environment["accuracy_level"]) == ("fp32", None, None)
    for package in ("onnxruntime", "torch", "numpy"):
        assert environment[package] == version(package)
    assert environment["intertitle"] == intertitle.__version__
    # One token: nothing is decoded.
    assert stages(report) == [["pixels", *VISUAL, *TEXT[:2]]]
    assert [line.split(": ")[1].split(" ")[0] for line in heard] == [
        "pixels",
        "vision",
        "frame_connector",
        "connector",
        "embeddings",
        "prefill",
        "greedy",
    ]
    assert all(line.startswith(str(DEMO)) for line in heard)
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["environment"] == environment
    assert msgspec.json.encode(asdict(report))


@pytest.mark.parametrize(
    ("target", "weights", "encoders"), [("cuda", "fp16", None), ("cuda", "int4", "int8"), ("cpu", "int4", "int8")]
)
def test_float16_and_int8_are_held_to_what_they_can(target, weights, encoders, check, data_dir, tmp_path):
    """A right bundle of either passes, with the tolerance of its format, and a wrong one of it does not."""
    bundle, half = tmp_path / "bundle", target == "cuda"
    compile_bundle(data_dir / "av-qwen2", bundle, target=target, weights=weights, encoder_weights=encoders)
    report = check("av-qwen2", bundle)
    assert report.verdict == "PASS"
    allowed = {stage.stage: stage.tolerance for stage in report.clips[0].stages}
    assert (allowed["pixels"], allowed["vision"]) == (1e-6, 2e-2 if half else 1e-1)
    assert allowed["decode logits"] == (2e-2 if half else 1e-4)
    # Codes or weights in the order of their mirror image.
    data = np.memmap(bundle / "vision.onnx.data", mode="r+")
    data[len(data) // 2 :] = data[len(data) // 2 :][::-1].copy()
    data.flush()
    report = check("av-qwen2", seal(bundle))
    assert (report.verdict, report.first_divergent) == ("FAIL", "vision")
