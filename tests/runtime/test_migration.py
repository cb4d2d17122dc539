"""Bundles that were written before schema version 3 open and caption as they did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intertitle import Captioner, Decoding, Share
from intertitle.contract.pipeline import EachOf, EachUnit, Ids, OneSound, Text, Tokens, Window
from intertitle.errors import BundleError
from intertitle.runtime.bundle import Bundle, parse_manifest

OLD = Path(__file__).parents[1] / "data" / "version-2"
TOKENS: dict[str, dict[str, list[int]]] = json.loads((OLD / "tokens.json").read_text())
HOW = Decoding(max_new_tokens=24)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in TOKENS.items() for mode in modes])
def test_the_same_tokens_as_the_runtime_of_version_2(
    name: str, mode: str, expected: Callable[[str], dict[str, np.ndarray]]
):
    numbers = expected(name)
    how, media = HOW, {}
    if mode != "audio":
        media["frames"] = numbers["frames_uint8"]
    if mode.startswith("audio"):
        media |= {"waveform": numbers["audio_int16"], "sample_rate": 16000}
    if mode == "contrast":
        how = Decoding(max_new_tokens=24, contrast="temporal")
    if mode == "share 0.4":
        media["visual_tokens"] = Share(0.4)
    captioner = Captioner.load(OLD / name, device="cpu")
    assert captioner.caption(decoding=how, **media).token_ids == TOKENS[name][mode]  # type: ignore[arg-type]


def test_windows_and_sound_become_stages():
    pipeline = Bundle.open(OLD / "av-qwen2").manifest.pipeline
    units = {stage.name: stage.unit for stage in pipeline.stages}
    assert units == {
        "vision": EachUnit(),
        "frame_connector": EachUnit(),
        "connector": Window(2, 2),
        "audio": OneSound(),
    }
    assert [pipeline.tokens(name) for name in units] == [25, 25, 4, 1496]
    assert [type(piece) for piece in pipeline.prompts["audiovideo"].pieces] == [Text, Tokens, Tokens, Text]


def test_ratios_become_variants():
    pipeline = Bundle.open(OLD / "auroracap").manifest.pipeline
    assert [(each.keep, each.graph, each.tokens) for each in pipeline.stage("vision").variants] == [
        (1.0, "vision.onnx", 64),
        (0.4, "vision.keep0.4.onnx", 37),
    ]
    bos, _, frames, _ = pipeline.prompts["video"].pieces
    assert (bos, frames) == (Ids((1,)), EachOf("connector", separator=" "))
    assert pipeline.framewise


@pytest.mark.parametrize(
    "path", [("visual",), ("preprocessing", "image"), ("components", "vision"), ("prompts", "video")]
)
def test_what_was_never_a_manifest_of_version_2(path: tuple[str, ...]):
    tree: dict[str, Any] = json.loads((OLD / "av-qwen2" / "bundle.json").read_text())
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    for wrong in (None, 7, [], "x"):
        inner[path[-1]] = wrong
        with pytest.raises(BundleError) as caught:
            parse_manifest(json.dumps(tree).encode(), "bundle.json")
        assert str(caught.value).startswith("bundle.json: not a bundle manifest")
