"""The harness measures what it says."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
from intertitle.benchmarks import harness

#: Touches so many mebibytes, prints, and sleeps.
WORK = "import sys, time; held = bytearray(int(sys.argv[1]) << 20); held[::4096] = b'x' * len(held[::4096]); "


def test_contestants_take_turns_and_the_warm_up_is_dropped(capsys):
    calls: list[str] = []

    def contestant(name: str, figures: list[float]):
        def run() -> float:
            calls.append(name)
            return figures.pop(0)

        return run

    figures = harness.alternate({"a": contestant("a", [9, 1, 2, 3]), "b": contestant("b", [8, 4, 5, 6])}, rounds=3)
    # Every other round backwards.
    assert calls == ["a", "b", "b", "a"] * 2
    assert figures == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert capsys.readouterr().err.splitlines()[-1] == "round 4 of 4"
    calls.clear()
    both = {name: contestant(name, [1, 2, 3]) for name in "ab"}
    assert harness.alternate(both, rounds=2, mirrored=False) == {"a": [2, 3], "b": [2, 3]}
    assert calls == ["a", "b"] * 3
    cold = harness.alternate({"a": contestant("a", [7.0])}, rounds=1, warmup=0)
    assert cold == {"a": [7]}


def test_ratios_are_those_of_the_rounds():
    # The ratio of the medians would be 3 / 3.
    assert harness.paired_ratio([2, 3, 40], [1, 3, 10]) == {"median": 2, "min": 1, "max": 4}
    with pytest.raises(ValueError, match="zip"):
        harness.paired_ratio([1], [1, 2])


def test_a_process_is_measured(capfd):
    code = f"{WORK} print('out'); print('err', file=sys.stderr); time.sleep(0.2)"
    small, large = (harness.run_process([sys.executable, "-S", "-c", code, size]) for size in ("1", "80"))
    assert small.stdout == large.stdout == "out\n"
    assert capfd.readouterr() == ("", "err\nerr\n")
    assert small.seconds >= 0.2
    assert large.peak_bytes - small.peak_bytes == pytest.approx(79 << 20, rel=0.05)


def test_the_peak_of_a_process_is_its_own():
    """What the measuring process holds or once held is no part of it (Linux counts it in ``ru_maxrss``)."""
    held = bytearray(200 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert harness.run_process([sys.executable, "-S", "-c", "pass"]).peak_bytes < 60 << 20
    del held
    assert harness.run_process([sys.executable, "-S", "-c", "pass"]).peak_bytes < 60 << 20


def test_a_process_that_waits_for_another_counts_it():
    inner = f"{WORK} pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}, '100'], check=True)"
    assert harness.run_process([sys.executable, "-S", "-c", outer]).peak_bytes > 100 << 20


def test_a_process_that_fails_is_an_error(capfd):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        harness.run_process([sys.executable, "-S", "-c", "print('so far'); raise SystemExit(3)"])
    assert (failed.value.returncode, failed.value.output) == (3, "so far\n")
    with pytest.raises(subprocess.CalledProcessError) as killed:
        harness.run_process([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.value.returncode == -9
    with pytest.raises(subprocess.CalledProcessError):
        harness.run_process(["there-is-no-such-command"])
    assert "there-is-no-such-command" in capfd.readouterr().err


def test_a_result_carries_its_environment_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    path = harness.write_result("speed", {"seconds": [1.5, 2.5]}, "python -m somewhere")
    assert path == tmp_path / "results" / "speed.json"
    record = json.loads(path.read_text())
    assert record["seconds"] == [1.5, 2.5]
    assert record["command"] == "python -m somewhere"
    environment = record["environment"]
    assert environment["packages"]["numpy"] == version("numpy")
    assert environment["python"] == platform.python_version()
    assert environment["cores"] >= 1
    assert environment["memory_gib"] > 0.5
    assert environment["cpu"] or platform.system() != "Linux" or platform.machine() != "x86_64"
    # Nothing of whoever measured: no host, no user, no path.
    assert platform.node() not in json.dumps(environment)
