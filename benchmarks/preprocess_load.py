"""Preprocessing 2160p frames on an idle machine and on a busy one.

The 16 frames of a clip of 3840x2160 pixels become the 336x336 ones that a vision tower sees, with the sound of 30 s
beside them. ``busy``: while so many processes compute as fast as they can. A thread that waits for no other takes
``fair_share`` times longer then, if the scheduler is fair: processes over cores. Each figure is that of a process of
its own, which begins with a warm-up.

``--package`` names the folder that holds the package to measure, so that two checkouts can be compared; ``--blas`` how
many threads NumPy's BLAS may use (its own choice without).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from .harness import write_result

FRAMES, WIDTH, HEIGHT = 16, 3840, 2160

_WORK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from intertitle.runtime.preprocess.fbank import kaldi_fbank
from intertitle.runtime.preprocess.image import preprocess_frames
try:
    from intertitle.contract.pipeline import ImagePlan
except ImportError:  # a checkout from before there was such a module
    from intertitle.runtime.preprocess.image import ImageSpec as ImagePlan
rounds, count, width, height = map(int, sys.argv[2:])
rng = np.random.default_rng(0)
frames = np.repeat(rng.integers(0, 256, (1, height, width, 3), np.uint8), count, axis=0)
sound = rng.normal(0, 0.1, 480_000).astype(np.float32)
spec = ImagePlan("shortest_edge", 336, 336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
for turn in range(rounds + 1):
    wall, processor = time.perf_counter(), time.process_time()
    preprocess_frames(frames, spec)
    kaldi_fbank(sound)
    if turn:
        print(time.perf_counter() - wall, time.process_time() - processor, flush=True)
"""


@contextmanager
def load(processes: int) -> Iterator[None]:
    """``processes`` that do nothing but count."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in busy:
            with suppress(OSError):
                each.kill()
            each.wait()


def measure(package: Path, rounds: int, busy: int, blas: int | None) -> dict[str, object]:
    """Seconds, and processor seconds of all threads, of each round."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment.pop(name, None)
        if blas is not None:
            environment[name] = str(blas)
    sizes = [str(each) for each in (rounds, FRAMES, WIDTH, HEIGHT)]
    with load(busy):
        done = subprocess.run(
            [sys.executable, "-c", _WORK, str(package), *sizes],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    seconds, processor = zip(*(map(float, line.split()) for line in done.stdout.splitlines()), strict=True)
    return {
        "busy_processes": busy,
        "median_seconds": round(statistics.median(seconds), 3),
        "median_processor_seconds": round(statistics.median(processor), 3),
        "seconds": [round(each, 3) for each in seconds],
    }


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Rounds of each measurement.")
@click.option("--busy", default=6, show_default=True, help="Busy processes of the load.")
@click.option("--package", type=click.Path(exists=True, path_type=Path), help="The folder that holds another checkout.")
@click.option("--blas", type=click.IntRange(1), help="Threads of NumPy's BLAS.  [default: its own choice]")
@click.option("-o", "--result", default="preprocess_load", show_default=True, help="The name of the file in results/.")
def main(rounds: int, busy: int, package: Path | None, blas: int | None, result: str) -> None:
    """Measure preprocessing, idle and under load."""
    folder = (package or Path(__file__).resolve().parents[2]).resolve()
    idle, loaded = (measure(folder, rounds, count, blas) for count in (0, busy))
    ratio = float(str(loaded["median_seconds"])) / float(str(idle["median_seconds"]))
    figures = {
        "work": f"{FRAMES} frames of {WIDTH}x{HEIGHT} to 336x336, filter banks of 30 s",
        "blas_threads": blas,
        "rounds": rounds,
        "idle": idle,
        "busy": loaded,
        "times_longer_when_busy": round(ratio, 2),
        "fair_share": round(max((busy + 1) / (os.cpu_count() or 1), 1.0), 2),
    }
    for name, measured in (("idle", idle), ("busy", loaded)):
        click.echo(f"{name}: {measured['median_seconds']} s ({measured['median_processor_seconds']} s of processors)")
    click.echo(f"{ratio:.2f} times longer when busy")
    click.echo(write_result(result, figures, "python -m intertitle.benchmarks.preprocess_load"))


if __name__ == "__main__":
    main()
