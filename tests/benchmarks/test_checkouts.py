"""Two checkouts side by side, here one beside itself."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from intertitle.benchmarks import checkouts, harness


@pytest.mark.slow
def test_a_checkout_beside_itself(compiled, repo_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    options = ["--bundle", str(compiled("av-qwen2", "int4")), "--clips", "2", "--tokens", "4", "--rounds", "2"]
    done = CliRunner().invoke(checkouts.main, [str(repo_dir), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    stages = json.loads((tmp_path / "checkouts.json").read_text())["stages"]
    assert {"batch", "decode", "one_by_one", "prefill", "vision"} <= stages.keys()
    for measured in stages.values():
        ratio = measured["after_over_before"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert measured["before_seconds"] > 0
    # No prompt is reused: each of two captions and the batch computes its prefill.
    assert stages["one_by_one"]["after_seconds"] > stages["prefill"]["after_seconds"] > 0
