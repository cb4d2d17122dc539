"""Measuring fairly on a noisy machine: alternate the contestants, quote medians, keep the environment beside them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: ``ru_maxrss`` counts kibibytes on Linux, bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_PACKAGES = ("intertitle", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "av", "tokenizers")


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


def alternate(
    contestants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1, mirrored: bool = True
) -> dict[str, list[float]]:
    """Run every contestant once a round, ``rounds`` times, and collect what each returns; warm-up rounds are run and
    dropped. The order is A B B A, or A B A B if it is not ``mirrored``."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        # Every other round backwards, so that nobody always runs in the wake of the same neighbour.
        for name, contestant in list(contestants.items())[:: -1 if mirrored and turn % 2 else 1]:
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
    """A finished command: wall seconds, peak resident bytes, stdout.

    Mapped pages of files count as resident; so does the largest of the processes that the command waited for.
    """

    seconds: float
    peak_bytes: int
    stdout: str


#: Linux counts the memory of the process that starts another one into the peak of the started one (``exec`` keeps the
#: high-water mark of the address space that it leaves). A small process in between keeps ours out of the figure.
_LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
os.write(int(sys.argv[1]), f"{time.perf_counter() - started} {usage.ru_maxrss} {child.returncode}".encode())
"""


def run_process(command: Sequence[str], quiet: bool = False) -> Process:
    """Run a command to its end. Raises ``CalledProcessError`` when it fails. stderr passes through (progress);
    ``quiet``: it does not, and the error has it."""
    read, write = os.pipe()
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(write), *command]
    with os.fdopen(read) as figures:
        try:
            stderr = subprocess.PIPE if quiet else None
            finished = subprocess.run(
                launcher, stdout=subprocess.PIPE, stderr=stderr, text=True, pass_fds=(write,), check=False
            )
        finally:
            os.close(write)
        # Nothing is written when the command could not be started; the launcher's own traceback says why.
        seconds, peak, code = (figures.read() or f"0 0 {finished.returncode}").split()
    if int(code) != 0:
        raise subprocess.CalledProcessError(int(code), list(command), finished.stdout, finished.stderr)
    return Process(float(seconds), int(peak) * _RSS_UNIT, finished.stdout)


def write_result(name: str, result: Mapping[str, object], command: str) -> Path:
    """``results/NAME.json``: the figures, the environment, and the command that reproduces them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"command": command, "environment": environment(), **result}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
