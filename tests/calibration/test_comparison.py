"""Errors, near-ties, drift and verdicts, on values worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from intertitle.calibration.comparison import (
    ClipResult,
    Report,
    StageResult,
    TokenResult,
    compare_stage,
    compare_tokens,
    compared_parts,
    conclude,
    measure_drift,
    tolerance,
)
from intertitle.calibration.reference import GreedyCaption
from intertitle.contract.formats import FORMATS
from intertitle.contract.manifest import Manifest
from intertitle.contract.pipeline import EachUnit, ImagePlan, OneSound, Pipeline, Sampling, Stage, StageInput
from msgspec import convert

THEIRS = np.array([[2.0, -4.0, 1.0]], np.float32)


def caption(tokens: list[int], *rows: list[float]) -> GreedyCaption:
    return GreedyCaption(tokens, np.array(rows, np.float32))


def test_error_is_relative_to_the_largest_magnitude_of_the_reference():
    mine = THEIRS + np.array([[0.0, 0.1, -0.2]], np.float32)
    result = compare_stage("prefill logits", mine, THEIRS)
    assert result.relative_error == result.error == pytest.approx(0.05)
    assert (result.verdict, result.problem) == ("FAIL", None)
    assert compare_stage("vision", THEIRS, THEIRS) == StageResult("vision", 0.0, 1e-4, "PASS")


@pytest.mark.parametrize(
    ("target", "weights", "allowed"),
    [
        ("cpu", "fp32", 1e-4),
        # Compared with float32 matmuls.
        ("cpu", "int4", 1e-4),
        ("cpu", "int8", 1e-1),
        ("cuda", "fp16", 2e-2),
        # Kernels for float16 matmuls round no activations to int8.
        ("cuda", "int4", 2e-2),
        ("cuda", "int8", 2e-2),
        ("tensorrt", "int8", 2e-2),
        ("tensorrt", "fp32", 1e-4),
    ],
)
def test_tolerance_of_a_component(target, weights, allowed, manifest_json):
    manifest_json["target"] = target
    for name in ("vision", "decoder"):
        manifest_json["components"][name]["weights"] = weights
    manifest = convert(manifest_json, Manifest)
    assert tolerance("vision, ratio 0.5", manifest) == tolerance("decode logits", manifest) == allowed
    assert tolerance("pixels", manifest) == 1e-6


@pytest.mark.parametrize(
    ("mine", "problem"),
    [
        (np.zeros((1, 4), np.float32), "the shape is [1, 4], the reference's [1, 3]"),
        (np.array([[2.0, np.nan, 1.0]], np.float32), "the bundle's output is not finite"),
        (np.array([[np.inf, -4.0, 1.0]], np.float32), "the bundle's output is not finite"),
    ],
)
def test_what_has_no_error_fails_and_is_valid_json(mine, problem):
    result = compare_stage("audio", mine, THEIRS)
    assert (result.verdict, result.problem, result.relative_error) == ("FAIL", problem, None)
    assert result.error == float("inf")
    report = Report("FAIL", "audio", "fp32", [ClipResult("clip", "audio", [result])])
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["clips"][0]["stages"][0]["relative_error"] is None


def test_equal_tokens_pass():
    theirs = caption([2, 0], [0, 0, 1], [1, 0, 0])
    assert compare_tokens([2, 0], theirs, 1.0, FORMATS["fp32"].near_tie) == TokenResult(2, 2, None, "PASS")


@pytest.mark.parametrize(
    ("runner_up", "weights", "verdict"),
    [
        # The largest score is 10: a margin of up to 1e-3 is a near-tie in fp32, up to 0.5 with int8 activations.
        (9.9995, "fp32", "AMBIGUOUS"),
        (9.99, "fp32", "FAIL"),
        (9.99, "int4", "AMBIGUOUS"),
        (9.4, "int4", "FAIL"),
    ],
)
def test_a_near_tie_is_ambiguous(runner_up, weights, verdict):
    theirs = caption([1, 2, 0], [0, 1, 0], [0, runner_up, 10], [1, 0, 0])
    result = compare_tokens([1, 1, 1], theirs, 1.0, FORMATS[weights].near_tie)
    assert (result.compared, result.equal, result.verdict) == (3, 1, verdict)
    assert result.margin == pytest.approx(10 - runner_up, rel=1e-3)


def test_the_margin_is_that_of_the_scores_after_the_penalty():
    # Token 1 has been used: at a penalty of 2 its 10 counts as 5, and -1 counts as -2.
    theirs = caption([1, 2], [0, 1, 0], [-20, 10, 5])
    tie = compare_tokens([1, 1], theirs, 2.0, FORMATS["fp32"].near_tie)
    assert (tie.margin, tie.verdict) == (0, "AMBIGUOUS")
    theirs = caption([1, 2], [0, 1, 0], [-20, -1, -2])
    assert compare_tokens([1, 1], theirs, 2.0, FORMATS["fp32"].near_tie).margin == 0


@pytest.mark.parametrize("mine", [[1], [1, 2, 2]])
def test_a_caption_that_ends_elsewhere_fails(mine):
    theirs = caption([1, 2], [0, 1, 0], [0, 0, 1])
    assert compare_tokens(mine, theirs, 1.0, FORMATS["int4"].near_tie) == TokenResult(
        max(len(mine), 2), min(len(mine), 2), None, "FAIL"
    )


def test_drift_by_hand():
    """Two positions, two tokens: at the first both agree, at the second 3:1 has become 1:3."""
    original = caption([0, 0], [0, 0], [math.log(3), 0])
    logits = np.array([[7, 7], [0, math.log(3)]], np.float32)
    drift = measure_drift(logits, [0, 1, 1], original, activations_error=0.25)
    assert drift.activations_error == 0.25
    assert drift.logits_error == pytest.approx(7 / math.log(3))
    # KL(3/4, 1/4 || 1/4, 3/4) = (3/4 - 1/4) ln 3, and 0 at the first position.
    assert drift.kl == pytest.approx(0.5 * math.log(3) / 2, abs=1e-7)
    assert drift.top1_agreement == 0.5
    assert (drift.equal_tokens, drift.compared) == (1, 2)


def test_drift_is_the_divergence_that_torch_computes():
    random = np.random.default_rng(0)
    ours, theirs = (random.standard_normal((6, 50)).astype(np.float32) * 20 for _ in range(2))
    drift = measure_drift(ours, [], GreedyCaption([0] * 6, theirs), 0.0)
    log_ours, log_theirs = (torch.from_numpy(x).double().log_softmax(1) for x in (ours, theirs))
    expected = torch.nn.functional.kl_div(log_ours, log_theirs, log_target=True, reduction="batchmean")
    assert drift.kl == pytest.approx(float(expected))


def stage(name: str, verdict: str) -> StageResult:
    return StageResult(name, 0.0, 1.0, verdict)


@pytest.mark.parametrize(
    ("stages", "tokens", "conclusion"),
    [
        ([], ["PASS", "PASS"], ("PASS", None)),
        ([], ["PASS", "AMBIGUOUS"], ("AMBIGUOUS", None)),
        ([], ["AMBIGUOUS", "FAIL"], ("FAIL", "greedy tokens")),
        (["decode logits"], ["AMBIGUOUS", "PASS"], ("FAIL", "decoder")),
        # The order of the data decides, not that of the clips or of the results.
        (["prefill logits", "embeddings"], ["FAIL", "FAIL"], ("FAIL", "embedding")),
        (["audio", "connector"], ["PASS", "PASS"], ("FAIL", "connector")),
        (["vision", "pixels"], ["PASS", "PASS"], ("FAIL", "preprocessing")),
    ],
)
def test_conclusion(stages, tokens, conclusion):
    stages_of_it = [
        ("vision", EachUnit(), "pixels"),
        ("connector", EachUnit(), "vision"),
        ("audio", OneSound(), "sound"),
    ]
    pipeline = Pipeline(
        sampling=Sampling(rule="centered", count=2),
        image=ImagePlan("exact", 4, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        stages=tuple(
            Stage(name=name, unit=unit, inputs=(StageInput("x", source),), output="y", tokens=1)
            for name, unit, source in stages_of_it
        ),
        prompts={},
    )
    clips = [ClipResult(str(i), "video", tokens=TokenResult(1, 1, None, t)) for i, t in enumerate(tokens)]
    clips[0].stages = [stage("vision", "PASS"), *(stage(name, "FAIL") for name in stages[:1])]
    clips[1].stages = [*(stage(name, "FAIL") for name in stages[1:]), stage("decode logits", "PASS")]
    assert conclude(clips, compared_parts(pipeline)) == conclusion
