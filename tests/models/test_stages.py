"""Stages as data: how many units run, how many tokens each gets, and what runs for what."""

from __future__ import annotations

import pytest
import torch
from intertitle.contract.pipeline import (
    EachUnit,
    ImagePlan,
    OneSound,
    Pipeline,
    Sampling,
    Stage,
    StageInput,
    WholeClip,
    Window,
)
from intertitle.models.stages import measured, run_stages


@pytest.mark.parametrize(("name", "connector"), [("clip-mistral", 9), ("av-qwen2", 4), ("auroracap", 64)])
def test_tokens_of_the_fixtures(name, connector, opened, expected):
    """What the reference's connector gives the fixture's clip, slot by slot."""
    pipeline, numbers = measured(opened(name).config), expected(name)
    places = len(numbers["pixel_values"])
    total = pipeline.tokens("connector") * pipeline.units("connector", places)
    reference = numbers["visual_tokens.keep1.0"] if name == "auroracap" else numbers["video_tokens"]
    wanted = reference.size // reference.shape[-1]
    assert (pipeline.tokens("connector"), total) == (connector, wanted)
    if name == "av-qwen2":
        assert pipeline.tokens("audio") == len(numbers["audio_tokens"])


def test_variants_are_those_of_the_merging_stage(opened, expected):
    keeps = (0.4, 1.0)
    pipeline = measured(opened("auroracap").config, keeps)
    merging = pipeline.merging
    assert merging is not None
    assert [(variant.keep, variant.graph) for variant in merging.variants] == [
        (0.4, "vision.onnx"),
        (1.0, "vision.keep1.0.onnx"),
    ]
    for keep, variant in zip(keeps, merging.variants, strict=True):
        wanted = expected("auroracap")[f"visual_tokens.keep{keep}"].shape[1]
        assert variant.tokens == pipeline.tokens("connector", variant) == wanted
    assert pipeline.stage("connector").tokens is None
    assert measured(opened("av-qwen2").config, keeps).merging is None


@pytest.mark.parametrize(
    ("unit", "counts"),
    [
        (EachUnit(), [0, 1, 2, 5]),
        (WholeClip(), [1, 1, 1, 1]),
        (OneSound(), [1, 1, 1, 1]),
        (Window(2, 2), [0, 0, 1, 2]),
        (Window(2, 2, 1), [1, 1, 2, 3]),
        (Window(3, 1), [0, 0, 0, 3]),
    ],
)
def test_units_of_a_stage(unit, counts):
    """Of 0, 1, 2 and 5 units of its input, counted by hand."""
    assert [unit.count(units) for units in (0, 1, 2, 5)] == counts


@pytest.mark.parametrize(
    ("units", "least"),
    [
        ([EachUnit()], 1),
        ([WholeClip()], 1),
        ([Window(2, 2)], 2),
        ([Window(2, 2, 1)], 1),
        ([Window(2, 2), Window(2, 2)], 4),
        # Three pairs; of one pair, if there is an empty one on both sides.
        ([Window(2, 2), Window(3, 1)], 6),
        ([Window(2, 2), Window(3, 1, 1)], 2),
        ([Window(2, 2), WholeClip()], 2),
        ([Window(9, 9)], 9),
    ],
)
def test_least_places_of_a_chain(units, least):
    """Counted by hand; one more than the clip's eight where even they are too few."""
    stages = [
        Stage(name=f"s{i}", unit=unit, inputs=(StageInput("x", f"s{i - 1}" if i else "pixels"),), output="y")
        for i, unit in enumerate(units)
    ]
    pipeline = Pipeline(
        sampling=Sampling(rule="centered", count=8),
        image=ImagePlan("exact", 4, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        stages=tuple(stages),
        prompts={},
    )
    assert pipeline.least_places() == least
    assert all(pipeline.unit_counts(least).values())
    assert not all(count for name, count in pipeline.unit_counts(least - 1).items() if name != "sound")


def test_only_what_a_stage_needs_runs(opened):
    checkpoint, asked = opened("av-qwen2"), []
    pipeline = checkpoint.config.pipeline

    def load(name):
        asked.append(name)
        return checkpoint.load(name)

    found = run_stages(pipeline.needed("connector"), load, {"pixels": torch.zeros(4, 3, 70, 70)})
    assert asked == ["vision", "frame_connector", "connector"]
    assert found["connector"].shape == (2, 4, 128)
    assert [stage.name for stage in pipeline.needed("audio")] == ["audio"]
    assert [stage.name for stage in pipeline.needed("audio", "vision")] == ["vision", "audio"]
