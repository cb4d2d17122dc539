"""What a board does, step by step, into one report: ``python -m intertitle.benchmarks.board BUNDLE CLIP``.

Needs neither PyTorch nor ONNX. Notes the system (release, power mode, clocks, memory), builds the bundle's engines,
captions the clip and notes stages, memory and, where the board has sensors for it, power; then the clip's frames by
PyAV and by GStreamer. A step that fails is noted with its reason, and the next one is taken. See docs/jetson.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click

from .harness import environment, run_process

_COMMANDS = {
    "power_mode": ["nvpmodel", "-q"],
    "clocks": ["jetson_clocks", "--show"],
    "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
}
_FILES = {"release": "/etc/nv_tegra_release", "model": "/proc/device-tree/model", "memory": "/proc/meminfo"}


class PowerMeter:
    """Mean watts of every sensor (INA3221 over hwmon: millivolts times milliamperes) inside a ``with`` block."""

    def __init__(self, root: Path = Path("/sys/class/hwmon"), interval: float = 0.1) -> None:
        self._sensors: dict[str, tuple[Path, Path]] = {}
        for monitor in sorted(root.glob("hwmon*")):
            for current in sorted(monitor.glob("curr*_input")):
                number = current.name.removeprefix("curr").removesuffix("_input")
                volts, label = monitor / f"in{number}_input", monitor / f"in{number}_label"
                if volts.exists():
                    name = label.read_text().strip() if label.exists() else f"{monitor.name}.{number}"
                    self._sensors[name] = volts, current
        self._interval, self._stop = interval, threading.Event()
        self._samples: dict[str, list[float]] = {name: [] for name in self._sensors}

    def __enter__(self) -> PowerMeter:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watts(self) -> dict[str, float]:
        """By sensor; empty where there are none."""
        return {name: round(statistics.mean(values), 3) for name, values in self._samples.items() if values}

    def _watch(self) -> None:
        while True:
            for name, (volts, current) in self._sensors.items():
                self._samples[name].append(int(volts.read_text()) * int(current.read_text()) / 1e6)
            if self._stop.wait(self._interval):
                return


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("clip", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--device", default="auto", show_default=True, help="auto is the device that the bundle was compiled for."
)
@click.option("--rounds", default=3, show_default=True, help="Rounds of each measurement.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens of each caption.")
@click.option(
    "-o", "--report", "path", type=click.Path(path_type=Path), default=Path("board-report.json"), show_default=True
)
def main(bundle: Path, clip: Path, device: str, rounds: int, max_new_tokens: int, path: Path) -> None:
    """Take every step with BUNDLE and CLIP and write the report."""
    report: dict[str, Any] = {"command": " ".join(sys.argv), "environment": environment()}

    def step(name: str, take: Callable[[], Any]) -> None:
        click.echo(f"{name} …", err=True)
        started = time.perf_counter()
        try:
            result = take()
        except Exception as error:  # one step that fails must not cost the others
            result = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        report[name] = {"seconds": round(time.perf_counter() - started, 2), "result": result}
        path.write_text(json.dumps(report, indent=1) + "\n")

    step("system", _system)
    step("idle power", lambda: _idle(2.0))
    step("build", lambda: _build(bundle))
    step("caption", lambda: _caption(bundle, clip, device, rounds, max_new_tokens, staged=False))
    step("caption staged", lambda: _caption(bundle, clip, device, min(rounds, 2), max_new_tokens, staged=True))
    for decoder in ("pyav", "gstreamer"):
        step(f"frames by {decoder}", lambda decoder=decoder: _frames(clip, decoder, rounds))
    failed = [
        name for name, value in report.items() if isinstance(value, dict) and "failed" in (value.get("result") or {})
    ]
    click.echo(f"{path}: {'every step was taken' if not failed else 'failed: ' + ', '.join(failed)}")


def _system() -> dict[str, str]:
    found = {}
    for name, file in _FILES.items():
        if Path(file).exists():
            found[name] = Path(file).read_text(errors="replace").strip("\0\n")[:2000]
    for name, command in _COMMANDS.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            found[name] = (done.stdout or done.stderr).strip()[:2000]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[name] = f"not to be had: {error}"
    return found


def _idle(seconds: float) -> dict[str, float]:
    with PowerMeter() as meter:
        time.sleep(seconds)
    return meter.watts()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intertitle.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _build(bundle: Path) -> str:
    if json.loads((bundle / "bundle.json").read_bytes())["dialect"] == "ort":
        return "not needed"
    done = _run("build", str(bundle))
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def _caption(bundle: Path, clip: Path, device: str, rounds: int, tokens: int, staged: bool) -> dict[str, Any]:
    """In a process of its own. No prompt is reused, so the prefill and the time to the first token are whole.

    ``peak_resident_bytes``: the most that the process held, mapped files included. ``available_bytes_taken``: by how
    much the machine's available memory fell at most. Where processor and GPU share memory it contains the GPU's part,
    but it also contains what other processes took or gave back, and it leaves mapped files out.
    """
    options = ["--device", device, "--rounds", str(rounds), "--max-new-tokens", str(tokens)]
    module = "intertitle.benchmarks.cold_captions"
    command = [sys.executable, "-m", module, str(bundle), str(clip), *options, *(["--staged"] if staged else [])]
    before, done, samples = _available(), threading.Event(), list[int]()

    def look() -> None:
        while not done.wait(0.02):
            samples.append(_available())

    with PowerMeter() as meter:
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            process = run_process(command, quiet=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(error.stderr.strip().splitlines()[-1]) from error
        finally:
            done.set()
            watcher.join()
    records = [json.loads(line) for line in process.stdout.splitlines()]
    # Of the later ones: the first loads.
    later = records[1:] or records
    stages = {name: statistics.median(each["timings"].get(name, 0) for each in later) for name in later[0]["timings"]}
    return {
        "text": records[0]["text"],
        "new_tokens": len(records[0]["token_ids"]),
        "prompt_tokens": records[0]["prompt_tokens"],
        "prompt_tokens_reused": max(each["prompt_tokens_reused"] for each in later),
        "stages": {name: round(seconds, 4) for name, seconds in stages.items()},
        "time_to_first_token": round(sum(seconds for name, seconds in stages.items() if name != "decode"), 4),
        "load_seconds": round(records[0]["timings"].get("load", 0), 3),
        "peak_resident_bytes": process.peak_bytes,
        "available_bytes_taken": before - min(samples, default=before),
        "watts": meter.watts(),
    }


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _frames(clip: Path, decoder: str, rounds: int) -> dict[str, Any]:
    """Seconds to open the clip and read 16 frames spread over it."""
    import numpy as np

    from ..runtime.media import open_media

    seconds, notes = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        with mock.patch.dict(os.environ, INTERTITLE_VIDEO_DECODER=decoder), open_media(clip) as media:
            media.read_frames(np.linspace(0, media.num_frames - 1, 16).astype(int))
            notes = media.notes
        seconds.append(time.perf_counter() - started)
    return {"seconds": round(statistics.median(seconds), 4), "notes": notes}


if __name__ == "__main__":
    main()
