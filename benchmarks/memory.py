"""Resident memory over a long batch: ``python -m intertitle.benchmarks.memory --clips 500``.

A few rendered clips of different length come again and again, with and without sound, so that rows and buffers of
different sizes are taken and given back. What should stay flat is the resident memory from the first tenth of the run
on; what the batch may hold at most beside weights and cache is stated in the result, computed from the sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from ..calibration.render import random_scene, write_clip
from ..runtime.batching import READ_AHEAD, BatchItem
from ..runtime.captioner import DEFAULT_ROWS, Captioner
from ..runtime.decoding import Decoding
from .harness import write_result
from .random_bundle import random_bundle


def resident_bytes() -> int:
    """Resident memory of this process now, of its own pages (mapped files aside). Linux."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write_clips(folder: Path) -> list[Path]:
    """Six clips of 1 to 6 s, three of them silent in effect of their scene, three sizes of picture."""
    paths = []
    for seed, size in enumerate([(96, 64), (320, 240), (640, 360)] * 2):
        paths.append(folder / f"{seed}.mp4")
        write_clip(random_scene(seed, size=size, seconds=1.0 + seed), paths[-1])
    return paths


def curve(captioner: Captioner, paths: list[Path], count: int, how: Decoding, rows: int) -> list[int]:
    """Resident bytes after every caption of a batch of ``count`` clips."""

    def items() -> Iterator[BatchItem]:
        for index in range(count):
            yield BatchItem(paths[index % len(paths)], prompt=None if index % 3 else f"What is seen in clip {index}?")

    sizes = []
    for result in captioner.caption_batch(items(), decoding=how, rows=rows):
        if result.error is not None:
            raise result.error
        sizes.append(resident_bytes())
    return sizes


def growth(sizes: list[int]) -> float:
    """Bytes a caption by which the memory grows, a line through all but the first tenth."""
    settled = sizes[len(sizes) // 10 :]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def bound(captioner: Captioner, rows: int) -> dict[str, int]:
    """What a batch may hold beside the weights: the cache, and the clips and prompts of rows and reading ahead."""
    scheduler = captioner._loaded.scheduler
    assert scheduler is not None
    decoder, inference = captioner.manifest.decoder, scheduler.inference
    prompt = 4 * decoder.hidden_size * inference.max_length
    frames = 3 * 640 * 360 * captioner.manifest.pipeline.sampling.count
    return {
        "cache": captioner.manifest.cache_bytes * inference.rows * inference.max_length,
        "prompts": prompt * (rows + 1),
        "clips": frames * (rows + READ_AHEAD + 1),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure this bundle.  [default: random, tiny, int4]")
@click.option("--clips", "count", default=500, show_default=True, help="The number of clips.")
@click.option("--tokens", default=24, show_default=True, help="New tokens of each measurement.")
@click.option("--rows", default=DEFAULT_ROWS, show_default=True, help="Captions generated together.")
@click.option("-o", "--result", default="memory", show_default=True, help="The name of the file in results/.")
def main(bundle: Path | None, count: int, tokens: int, rows: int, result: str) -> None:
    """Run a batch of many clips and watch the memory."""
    with tempfile.TemporaryDirectory() as scratch:
        captioner = Captioner.load(bundle or random_bundle(Path(scratch), "tiny"))
        paths = write_clips(Path(scratch))
        sizes = curve(captioner, paths, count, Decoding(max_new_tokens=tokens), rows)
        settled = sizes[len(sizes) // 10 :]
        figures = {
            "shape": f"{captioner.manifest.name}, {captioner.manifest.weights}",
            "clips": count,
            "rows": rows,
            "resident_mb": {
                "after_a_tenth": round(settled[0] / 1e6, 1),
                "median": round(float(np.median(settled)) / 1e6, 1),
                "max": round(max(sizes) / 1e6, 1),
                "end": round(sizes[-1] / 1e6, 1),
            },
            "growth_bytes_a_clip": round(growth(sizes)),
            "bound_bytes": bound(captioner, rows),
            "resident_every_25": sizes[::25],
        }
    click.echo(f"{figures}\n{write_result(result, figures, 'python -m intertitle.benchmarks.memory')}")


if __name__ == "__main__":
    main()
