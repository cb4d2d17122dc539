"""Two checkouts side by side, here one beside itself."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from intertitle.benchmarks import checkouts, harness


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["one bundle", "each compiles"])
def test_a_checkout_beside_itself(given, compiled, repo_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    options = ["--clips", "2", "--tokens", "4", "--rounds", "2", "--size", "tiny"]
    options += ["--bundle", str(compiled("av-qwen2", "int4"))] if given else []
    done = CliRunner().invoke(checkouts.main, [str(repo_dir), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "checkouts.json").read_text())
    assert record["same_tokens"]
    stages = record["stages"]
    assert list(stages)[:5] == ["decode_step", "prefill", "encoding", "batch", "one_by_one"]
    assert {"decode", "vision"} <= stages.keys()
    for measured in stages.values():
        ratio = measured["after_over_before"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert measured["before_seconds"] > 0
    # No prompt is reused: each of two captions and the batch computes its prefill.
    assert stages["one_by_one"]["after_seconds"] > 2 * stages["prefill"]["after_seconds"] > 0


def test_ratios_are_of_the_same_round():
    """By hand: a machine that is twice as slow in the second round changes no ratio."""
    old, new = ([dict.fromkeys(checkouts._MAIN, seconds) for seconds in rounds] for rounds in ([1, 2, 4], [3, 6, 8]))
    figure = checkouts.compare([{**one, "x": 1.0} for one in old], new)["prefill"]
    assert figure == {
        "after_over_before": {"median": 3.0, "min": 2.0, "max": 3.0},
        "before_seconds": 2,
        "after_seconds": 6,
    }
