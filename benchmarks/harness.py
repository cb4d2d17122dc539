"""Measuring fairly on a noisy machine: alternate the contestants, quote medians, keep the environment beside them."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("intertitle", "onnxruntime", "torch", "transformers", "numpy", "av", "tokenizers")


def environment() -> dict[str, object]:
    """What a number depends on: processor, cores, memory, and the versions of what ran."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "packages": versions,
    }


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every contestant in turn, ``rounds`` times (A B A B), and collect what each returns; warm-up rounds are run
    and dropped."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, contestant in contestants.items():
            figure = contestant()
            if turn >= warmup:
                figures[name].append(figure)
        print(f"round {turn + 1} of {warmup + rounds}", file=sys.stderr, flush=True)
    return figures


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median and range of a[i] / b[i]: rounds share the machine's mood, so their ratio is steadier than they are."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@dataclass(frozen=True)
class Process:
    """A finished command: wall seconds, peak resident bytes, stdout."""

    seconds: float
    peak_bytes: int
    stdout: str


def run_process(command: Sequence[str]) -> Process:
    """Run a command to its end. Raises ``CalledProcessError`` when it fails. stderr passes through (progress)."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    stdout = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise subprocess.CalledProcessError(child.returncode, list(command))
    return Process(seconds, peak_bytes(usage), stdout)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Peak resident memory. Mapped pages of files count while they are resident."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_result(name: str, result: Mapping[str, object], command: str) -> Path:
    """``results/NAME.json``: the figures, the environment, and the command that reproduces them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"command": command, "environment": environment(), **result}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
