"""The GPU script from end to end on the processor, and a part of it that fails."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from intertitle.benchmarks import gpu, harness, hollow


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def run(*options: str):
    arguments = ["--device", "cpu", "--size", "tiny", "--rows", "1", "--rows", "2", "--tokens", "6", "--rounds", "1"]
    return CliRunner().invoke(gpu.main, [*arguments, *options], catch_exceptions=False)


def test_dry_run(results):
    done = run("--no-peers")
    assert done.exit_code == 0, done.output
    record = json.loads((results / "gpu.json").read_text())
    assert record["parity shipped fp32"]["logits_error"] < 1e-4
    assert record["parity shipped fp32"]["greedy_agreement"] == 1.0
    assert record["parity shipped fp32"]["vision_error"] < 1e-4
    for weights in ("fp32", "int4"):
        assert record[f"{weights} stages"]["new_tokens"] <= 6
        assert set(record[f"{weights} decode"]["step_seconds"]) == {"1", "2"}
        assert record[f"{weights} decode"]["of_floor"] > 0
        assert record[f"{weights} decode"]["contrast_over_greedy"]["logits"] > 0
        assert set(record[f"{weights} decode"]["loop_seconds"]["logits"]) == {"1", "2"}


def test_a_part_that_fails_costs_no_other(results, compiled, tmp_path, monkeypatch):
    """On bundles that came without their weights: nothing is compiled, and there is no checkpoint."""
    for weights in ("fp32", "int4"):
        for name in ("shipped", "tiny"):
            arguments = [str(compiled("av-qwen2", weights)), str(tmp_path / "given" / f"{name}-{weights}")]
            assert CliRunner().invoke(hollow.main, arguments, catch_exceptions=False).exit_code == 0
    monkeypatch.setattr(gpu, "write_checkpoint", None)
    monkeypatch.setattr(gpu, "compile_bundle", None)
    monkeypatch.setattr(gpu, "parity", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu._Captioning, "stages", lambda self: 1 / 0)
    assert run("--no-peers", "--bundles", str(tmp_path / "given")).exit_code == 0
    record = json.loads((results / "gpu.json").read_text())
    assert record["parity shipped int4"] == {"failed": "ZeroDivisionError: division by zero"}
    assert "failed" in record["int4 stages"]
    assert "step_seconds" in record["int4 decode"]


@pytest.mark.slow
def test_pytorch_beside_it(results):
    assert run().exit_code == 0
    record = json.loads((results / "gpu.json").read_text())
    for kind in ("eager", "compiled"):
        assert set(record[f"pytorch {kind}"]["step_seconds"]) == {"1", "2"}
        assert record["summary"][f"int4 over pytorch {kind}"] > 0
