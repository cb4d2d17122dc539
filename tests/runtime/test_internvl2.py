"""InternVL2 compiled: from raw frames and from a file to the reference's tokens, in every format, on every target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import intertitle
import numpy as np
import pytest
from intertitle.calibration.verify import verify_bundle
from intertitle.export.compile import compile_bundle
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.ort import OrtComponent
from intertitle.runtime.preprocess.frames import sample_indices
from intertitle.runtime.preprocess.image import preprocess_frames
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"
STAGES = ("pixels", "vision", "connector", "embeddings", "prefill logits", "decode logits")
GREEDY = intertitle.Decoding(max_new_tokens=40)


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def test_pixels_and_stages(compiled, expected):
    bundle, numbers = Bundle.open(compiled("internvl2")), expected("internvl2")
    pixels = preprocess_frames(numbers["frames_uint8"], bundle.manifest.pipeline.image)
    assert relative_error(pixels, numbers["pixel_values"]) < 1e-6
    values = {"pixels": numbers["pixel_values"]}
    for stage, wanted in (("vision", numbers["vision_features"]), ("connector", numbers["video_tokens"])):
        graph = OrtComponent(bundle.file(bundle.manifest.components[stage].graph))
        source = bundle.manifest.pipeline.stage(stage).inputs[0].source
        values[stage] = graph(values[source])
        assert relative_error(values[stage].reshape(wanted.shape), wanted) < 1e-5


def test_raw_frames_to_tokens_as_the_reference(compiled, expected):
    numbers = expected("internvl2")
    caption = intertitle.Captioner.load(compiled("internvl2")).caption(frames=numbers["frames_uint8"], decoding=GREEDY)
    assert caption.token_ids == numbers["video.greedy_tokens"].tolist()
    assert caption.prompt_tokens == len(numbers["prompt_ids"])
    assert caption.finish_reason == "length"


def test_an_image_is_one_numbered_frame(compiled, expected):
    bundle, frames = Bundle.open(compiled("internvl2")), expected("internvl2")["frames_uint8"]
    captioner, short = intertitle.Captioner.load(bundle.path), intertitle.Decoding(max_new_tokens=4)
    one = captioner.caption(frames=frames[:1], decoding=short)
    two = captioner.caption(frames=frames[:2], frame_times=[0.0, 1.0], decoding=short)
    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    between = tokenizer.encode("</img>\nFrame2: <img>", add_special_tokens=False).ids
    assert two.prompt_tokens - one.prompt_tokens == len(between) + 9


def test_the_sampling_rule(expected):
    rows = expected("internvl2")["frame_sample"]
    assert len(rows) == 6
    for total, count, *indices in rows.tolist():
        assert sample_indices(total, count, "segments").tolist() == indices


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_file_through_the_command_line(weights, compiled):
    command = [sys.executable, "-m", "intertitle", "caption", str(compiled("internvl2", weights)), str(DEMO)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "12", "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    caption = intertitle.Captioner.load(compiled("internvl2", weights)).caption(
        DEMO, decoding=intertitle.Decoding(max_new_tokens=12)
    )
    assert result["token_ids"] == caption.token_ids
    assert caption.prompt_tokens == 350


@pytest.mark.parametrize(("weights", "encoders"), [("fp32", "fp32"), ("int4", "fp32"), ("int4", "int8")])
def test_verify_on_a_file(weights, encoders, data_dir, tmp_path):
    compile_bundle(data_dir / "internvl2", tmp_path / "bundle", weights=weights, encoder_weights=encoders)
    report = verify_bundle(tmp_path / "bundle", data_dir / "internvl2", [DEMO], max_new_tokens=6)
    (clip,) = report.clips
    assert {stage.stage: stage.verdict for stage in clip.stages} == dict.fromkeys(STAGES, "PASS")
    assert report.first_divergent is None
    assert report.notes == []


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("vision_model.encoder.layers.1.ls2", "vision"),
        ("vision_model.embeddings.class_embedding", "vision"),
        ("mlp1.0.bias", "connector"),
        ("language_model.model.layers.0.attention.wqkv.weight", "decoder"),
        ("language_model.model.tok_embeddings.weight", "embedding"),
    ],
)
def test_verify_names_the_stage_of_a_broken_weight(tensor, stage, compiled, data_dir, tmp_path):
    shutil.copytree(data_dir / "internvl2", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    save_file(tensors | {tensor: tensors[tensor] * 1.5}, tmp_path / "broken" / "model.safetensors")
    report = verify_bundle(compiled("internvl2"), tmp_path / "broken", [DEMO], max_new_tokens=2)
    assert report.first_divergent == stage
