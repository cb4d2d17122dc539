"""The board's report, from a machine that is none."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from intertitle.benchmarks import board
from intertitle.calibration.render import random_scene, write_clip


@pytest.fixture
def sensors(tmp_path):
    monitor = tmp_path / "hwmon" / "hwmon3"
    monitor.mkdir(parents=True)
    for name, text in {"in1_input": "5000", "curr1_input": "1500", "in1_label": "VDD_IN\n", "curr2_input": "7"}.items():
        (monitor / name).write_text(text)
    return monitor.parent


def test_power_is_volts_times_amperes(sensors):
    with board.PowerMeter(sensors, interval=0.01) as meter:
        pass
    assert meter.watts() == {"VDD_IN": 7.5}


def test_every_step_is_taken(compiled, tmp_path, monkeypatch):
    monkeypatch.delenv("INTERTITLE_VIDEO_DECODER", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    write_clip(random_scene(1), clip)
    arguments = [str(compiled("clip-mistral")), str(clip), "--rounds", "2", "--max-new-tokens", "4", "-o", str(report)]
    done = CliRunner().invoke(board.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    steps = json.loads(report.read_text())
    assert {"system", "build", "caption", "caption staged", "frames by pyav", "frames by gstreamer"} <= set(steps)
    caption, staged = steps["caption"]["result"], steps["caption staged"]["result"]
    assert caption["text"] == staged["text"]
    assert caption["new_tokens"] == 4
    assert {"vision", "prefill", "decode"} <= set(caption["stages"])
    # The clip is captioned twice, and the second caption computes its whole prompt, as the first one did.
    assert caption["prompt_tokens_reused"] == staged["prompt_tokens_reused"] == 0
    assert caption["time_to_first_token"] >= caption["stages"]["vision"] + caption["stages"]["prefill"]
    for each in (caption, staged):
        assert each["peak_resident_bytes"] > 40 << 20
    assert steps["frames by pyav"]["result"]["notes"] == []


def test_a_step_that_fails_is_noted(compiled, tmp_path):
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    clip.write_bytes(b"no video")
    done = CliRunner().invoke(board.main, [str(compiled("clip-mistral")), str(clip), "-o", str(report)])
    assert done.exit_code == 0
    assert "failed: caption, caption staged, frames by pyav" in done.output
    assert "no video" not in json.loads(report.read_text())["caption"]["result"]["failed"]
