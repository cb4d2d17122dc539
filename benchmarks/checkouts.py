"""Is this checkout slower than another one? Both caption the same clips with the same bundle, in alternation.

Each checkout runs in a process of its own: ``checkouts_worker.py``, which uses nothing but the public API. Both share
the machine's mood. This checkout makes the bundle, so both must be able to read its schema. The cache forgets its
prompts before each clip and each batch, so no prefilled prompt is reused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

from ..calibration.render import random_scene, write_clip
from .harness import alternate, paired_ratio, write_result
from .random_bundle import random_bundle

_WORKER = Path(__file__).with_name("checkouts_worker.py")


class Worker:
    """A checkout in a process of its own. A round is one line to it and one line of JSON back."""

    def __init__(self, checkout: Path, links: Path, bundle: Path, clips: Path, tokens: int) -> None:
        # A folder that holds the checkout under the package's name comes before any installed one.
        links.mkdir()
        (links / "intertitle").symlink_to(checkout.resolve())
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(bundle), str(clips), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(links)},
        )
        self.rounds: list[dict[str, float]] = []

    def round(self) -> float:
        """Run one round, keep its seconds by stage, and return those of all of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise click.ClickException(f"the worker ended with exit code {self._process.wait()}")
        self.rounds.append(json.loads(answer))
        return self.rounds[-1]["one_by_one"] + self.rounds[-1]["batch"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle of both.  [default: random, 0.5b, int4]")
@click.option("--clips", "count", default=8, show_default=True, help="Clips of a round.")
@click.option("--tokens", default=64, show_default=True, help="New tokens of each caption.")
@click.option("--rounds", default=7, show_default=True, help="Rounds of each checkout, after one that is not counted.")
@click.option("-o", "--result", default="checkouts", show_default=True, help="The name of the file in results/.")
def main(before: Path, bundle: Path | None, count: int, tokens: int, rounds: int, result: str) -> None:
    """Measure this checkout against the one in the folder BEFORE, for example a git worktree of an older commit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = bundle or random_bundle(folder, "0.5b")
        clips = folder / "clips"
        clips.mkdir()
        for seed in range(count):
            write_clip(random_scene(seed), clips / f"{seed}.mp4")
        here = Path(__file__).parent.parent
        workers = {
            name: Worker(checkout, folder / name, bundle, clips, tokens)
            for name, checkout in (("before", before), ("after", here))
        }
        contestants: dict[str, Callable[[], float]] = {name: worker.round for name, worker in workers.items()}
        alternate(contestants, rounds)
        for worker in workers.values():
            worker.close()
    figures = {}
    old, new = (worker.rounds[-rounds:] for worker in workers.values())
    for name in sorted(set(old[0]) & set(new[0])):
        seconds = {"before": [one[name] for one in old], "after": [one[name] for one in new]}
        figures[name] = {
            "after_over_before": paired_ratio(seconds["after"], seconds["before"]),
            **{f"{which}_seconds": median(values) for which, values in seconds.items()},
        }
        ratio = figures[name]["after_over_before"]
        click.echo(f"{name:14} {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    shape = {"clips": count, "new_tokens": tokens, "rounds": rounds, "stages": figures}
    click.echo(write_result(result, shape, "python -m intertitle.benchmarks.checkouts BEFORE"))


if __name__ == "__main__":
    main()
