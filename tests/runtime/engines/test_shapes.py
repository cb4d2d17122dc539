"""The sizes that engines are built for, worked out by hand. No TensorRT is needed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from intertitle.contract.manifest import Component, Manifest
from intertitle.contract.pipeline import EachOf, EachUnit, PromptLayout, Stage, StageInput, Text, Variant, Window
from intertitle.contract.records import TensorSpec
from intertitle.runtime.engines.shapes import Limits, default_limits, profiles

LIMITS = Limits(max_length=128, rows=4, chunk=100)


@pytest.fixture
def manifest(manifest_json: dict[str, Any]) -> Manifest:
    """Of 8 frames with 5 tokens each, each of which is a window; a sound of 1496 tokens; captions of 16."""
    made = msgspec.convert(manifest_json, Manifest)
    return msgspec.structs.replace(made, decoder=msgspec.structs.replace(made.decoder, context_length=8192))


def with_stages(manifest: Manifest, *stages: Stage, **more: Any) -> Manifest:
    pipeline = msgspec.structs.replace(manifest.pipeline, stages=stages, **more)
    return msgspec.structs.replace(manifest, pipeline=pipeline)


def component(*shape: int | str) -> Component:
    spec = TensorSpec("x", "float32", list(shape))
    return Component(graph="x.onnx", weights="fp32", parameters=0, inputs=[spec], outputs=[spec])


def stage(name: str, source: str, unit: Any, tokens: int | None, *variants: Variant) -> Stage:
    inputs = (StageInput("x", source),)
    return Stage(name=name, unit=unit, inputs=inputs, output="x", tokens=tokens, variants=variants)


def test_the_longest_prompt(manifest):
    # Seen and heard: 8 x 5 and 1496 tokens, 256 of text, and a caption of 16, in rows of whole 64.
    assert default_limits(manifest).max_length == 1856 >= 8 * 5 + 1496 + 256 + 16 > 1856 - 64
    # Each frame with 10 bytes of its own text, and with its time in the instruction.
    each = EachOf("connector", before="Frame{index}", after="\n", separator=" ")
    layout = PromptLayout((Text("{times}"), each))
    alone = msgspec.structs.replace(manifest.pipeline, prompts={"video": layout})
    prompt = 8 * (5 + len("Frame{index}\n ") + 8) + 256 + 16
    assert default_limits(msgspec.structs.replace(manifest, pipeline=alone)).max_length == 512 >= prompt > 512 - 64


def test_the_largest_variant_counts(manifest):
    variants = [Variant(keep=keep, graph=f"{keep}", tokens=tokens) for keep, tokens in ((0.5, 50), (1.0, 100))]
    tower = stage("tower", "pixels", EachUnit(), 50, *variants)
    tokens = stage("connector", "tower", EachUnit(), None)
    found = with_stages(manifest, tower, tokens, prompts={"video": PromptLayout((EachOf("connector"),))})
    assert default_limits(found).max_length == 1088 >= 8 * 100 + 256 + 16 > 1088 - 64
    # One graph serves every number of tokens, the usual one is that of the default.
    (profile,) = profiles("connector", component("frames", "tokens", 7), found, LIMITS)
    assert profile == {"x": ((1, 50, 7), (8, 50, 7), (8, 100, 7))}
    (profile,) = profiles("tower", component("frames", 3, 8, 8), found, LIMITS)
    assert profile == {"x": ((1, 3, 8, 8), (8, 3, 8, 8), (8, 3, 8, 8))}


def test_windows_and_what_comes_behind_them(manifest):
    # Windows of 3 of 8 frames and two empty ones, 2 apart: at 0, 2, 4 and 6.
    found = with_stages(
        manifest,
        stage("vision", "pixels", EachUnit(), 5),
        stage("joined", "vision", Window(3, 2, 1), 6),
        stage("connector", "joined", EachUnit(), 6),
    )
    (profile,) = profiles("joined", component("slots", 3, 5, 7), found, LIMITS)
    assert profile == {"x": ((1, 3, 5, 7), (4, 3, 5, 7), (4, 3, 5, 7))}
    # What runs for each window has as many of them.
    (profile,) = profiles("connector", component("frames", 6, 7), found, LIMITS)
    assert profile == {"x": ((1, 6, 7), (4, 6, 7), (4, 6, 7))}


def test_a_sound_has_no_profile(manifest):
    assert profiles("audio", manifest.components["audio"], manifest, LIMITS) == []


def test_the_decoder_has_two(manifest):
    prompt, step = profiles("decoder", manifest.components["decoder"], manifest, LIMITS)
    assert prompt["inputs_embeds"] == ((1, 1, 4), (1, 100, 4), (1, 100, 4))
    assert step["inputs_embeds"] == ((1, 1, 4), (1, 1, 4), (4, 1, 4))
    assert prompt["past.0.key"] == ((1, 1, 128, 2),) * 3
