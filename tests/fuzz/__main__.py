"""Run a fuzzer: ``python -m intertitle.tests.fuzz media --count 200000 --keep finds``.

``--repeat SEED`` runs one seed again in this process, with its traceback; ``--file FILE`` takes the file's content for
the mutant of that seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

from . import make_target
from .pool import FAULTS, Report, run_jobs


def main() -> int:
    """Exit code 1 when there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m intertitle.tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=("media", "structured"))
    parser.add_argument("--count", type=int, default=10_000, help="mutants [10000]")
    parser.add_argument("--seed", type=int, default=0, help="the first seed [0]")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="folder for the smallest mutant of each fault")
    parser.add_argument("--repeat", type=int, help="run this seed alone, here")
    parser.add_argument("--file", type=Path, help="with --repeat: the content of the mutant")
    parser.add_argument("--folder", type=Path, help="where originals are made [a temporary folder]")
    options = parser.parse_args()
    # Mutants of media are written and read faster in memory; bundles there are hashed anew each time.
    in_memory = options.kind == "media" and os.access("/dev/shm", os.W_OK)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if in_memory else None) as temporary:
        folder = options.folder or Path(temporary)
        if options.repeat is not None:
            return _repeat(options, folder)
        report = fuzz(options.kind, folder, options.seed, options.count, options.minutes, options.keep)
    print(report)
    return 0 if report.clean else 1


def _repeat(options: argparse.Namespace, folder: Path) -> int:
    target = make_target(options.kind, folder)
    name, content = target.make(options.repeat)
    if options.file:
        name, content = options.file.name, options.file.read_bytes()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / f"{options.repeat}-{name}").write_bytes(content)
    print(f"{name}, {len(content)} bytes")
    target.run(options.repeat, name, content)
    return 0


def fuzz(kind: str, folder: Path, seed: int, count: int, minutes: float = 0.0, keep: Path | None = None) -> Report:
    """Run ``count`` seeds from ``seed`` on; the smallest mutant of each fault goes into ``keep``."""
    target = make_target(kind, folder)
    report, started, told = Report(), time.monotonic(), time.monotonic()
    jobs = ((each, "") for each in itertools.islice(itertools.count(seed), count))
    for answer in run_jobs(kind, jobs, folder):
        answer["name"] = answer["name"] or target.make(answer["seed"])[0]
        fault = report.add(answer)
        if keep is not None and fault is not None:
            _keep(keep, answer, target.make(answer["seed"])[1])
        report.seconds = time.monotonic() - started
        if time.monotonic() - told > 60:
            told = time.monotonic()
            faults = sum(report.outcomes[outcome] for outcome in FAULTS)
            print(f"{sum(report.outcomes.values())} mutants, {faults} faults", file=sys.stderr, flush=True)
        if minutes and report.seconds > minutes * 60:
            break
    return report


def _keep(folder: Path, answer: dict[str, object], content: bytes) -> None:
    place = "".join(letter if letter.isalnum() else "-" for letter in str(answer["place"]))[-60:]
    here = folder / f"{answer['outcome']}-{answer['kind']}-{place}"
    here.mkdir(parents=True, exist_ok=True)
    old = sorted(here.iterdir(), key=lambda path: path.stat().st_size)
    if len(old) >= 3:
        if old[-1].stat().st_size <= len(content):
            return
        old[-1].unlink()
    (here / f"{answer['seed']}-{answer['name']}").write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
