"""Is this checkout slower than another one? Both caption the same clips with the same captioner, in alternation.

Each checkout compiles the same random checkpoint with its own compiler and runs in a process of its own:
``checkouts_worker.py``, which uses nothing but the public API. Both share the machine's mood. With ``--bundle`` both
open that bundle, so both must be able to read its schema. The cache forgets its prompts before each clip and each
batch, so no prefilled prompt is reused.

Measured are the seconds of a decode step (``decode_step``), of a clip's ``prefill`` and ``encoding``, of all clips as
one ``batch`` and ``one_by_one``; then the stages, those of all clips together.
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
from typing import Any

import click

from ..calibration.render import random_scene, write_clip
from ..models.random_checkpoint import SIZES, write_checkpoint
from .harness import alternate, paired_ratio, write_result

_WORKER = Path(__file__).with_name("checkouts_worker.py")


#: What is reported first.
_MAIN = ("decode_step", "prefill", "encoding", "batch", "one_by_one")


class Checkout:
    """A checkout whose package is what a process imports."""

    def __init__(self, checkout: Path, links: Path) -> None:
        # A folder that holds the checkout under the package's name comes before any installed one.
        links.mkdir()
        (links / "intertitle").symlink_to(checkout.resolve())
        self.environment = {**os.environ, "PYTHONPATH": str(links)}

    def compile(self, checkpoint: Path, bundle: Path, weights: str) -> Path:
        """The bundle that its own compiler makes."""
        command = [sys.executable, "-m", "intertitle.cli", "compile", str(checkpoint), "-o", str(bundle), "--quiet"]
        subprocess.run([*command, "--weights", weights], env=self.environment, stdout=subprocess.DEVNULL, check=True)
        return bundle


class Worker:
    """A checkout at work. A round is one line to it and one line of JSON back."""

    def __init__(self, checkout: Checkout, bundle: Path, clips: Path, tokens: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(bundle), str(clips), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=checkout.environment,
        )
        self.rounds: list[dict[str, float]] = []
        self.said: set[str] = set()

    def round(self) -> float:
        """Run one round, keep its seconds by stage, and return those of all of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise click.ClickException(f"the worker ended with exit code {self._process.wait()}")
        found = json.loads(answer)
        self.rounds.append(found["seconds"])
        self.said.add(found["tokens"])
        return self.rounds[-1]["one_by_one"] + self.rounds[-1]["batch"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle of both.  [default: each compiles its own]")
@click.option(
    "--size", type=click.Choice(list(SIZES)), default="0.5b", show_default=True, help="The random checkpoint."
)
@click.option("--weights", default="int4", show_default=True, help="The decoder's weights.")
@click.option("--clips", "count", default=8, show_default=True, help="Clips of a round.")
@click.option("--tokens", default=64, show_default=True, help="New tokens of each caption.")
@click.option("--rounds", default=7, show_default=True, help="Rounds of each checkout, after one that is not counted.")
@click.option("-o", "--result", default="checkouts", show_default=True, help="The name of the file in results/.")
def main(
    before: Path, bundle: Path | None, size: str, weights: str, count: int, tokens: int, rounds: int, result: str
) -> None:
    """Measure this checkout against the one in the folder BEFORE, for example a git worktree of an older commit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = {"before": before, "after": Path(__file__).parent.parent}
        checkouts = {name: Checkout(path, folder / name) for name, path in places.items()}
        if bundle is None:
            checkpoint = write_checkpoint(folder / "checkpoint", size)
            bundles = {
                name: each.compile(checkpoint, folder / f"bundle-{name}", weights) for name, each in checkouts.items()
            }
        else:
            bundles = dict.fromkeys(checkouts, bundle)
        clips = folder / "clips"
        clips.mkdir()
        for seed in range(count):
            write_clip(random_scene(seed), clips / f"{seed}.mp4")
        workers = {name: Worker(each, bundles[name], clips, tokens) for name, each in checkouts.items()}
        contestants: dict[str, Callable[[], float]] = {name: worker.round for name, worker in workers.items()}
        alternate(contestants, rounds, mirrored=False)
        for worker in workers.values():
            worker.close()
    figures = compare(workers["before"].rounds[-rounds:], workers["after"].rounds[-rounds:])
    for name, figure in figures.items():
        ratio, seconds = figure["after_over_before"], [figure[f"{which}_seconds"] for which in workers]
        click.echo(
            f"{name:16} {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}), "
            f"{seconds[0]:.5f} s before, {seconds[1]:.5f} s after"
        )
    same = workers["before"].said == workers["after"].said
    click.echo("both say the same" if same else "they do not say the same: their work may differ")
    shape: dict[str, Any] = {"size": size if bundle is None else bundle.name, "weights": weights}
    shape |= {"clips": count, "new_tokens": tokens, "rounds": rounds, "same_tokens": same, "stages": figures}
    click.echo(write_result(result, shape, "python -m intertitle.benchmarks.checkouts BEFORE"))


def compare(old: list[dict[str, float]], new: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of everything that both have measured: the medians, and the ratio of each pair of rounds (median and range)."""
    shared = set(old[0]) & set(new[0])
    figures = {}
    for name in [*_MAIN, *sorted(shared - set(_MAIN))]:
        before, after = ([one[name] for one in rounds] for rounds in (old, new))
        figures[name] = {
            "after_over_before": paired_ratio(after, before),
            "before_seconds": median(before),
            "after_seconds": median(after),
        }
    return figures


if __name__ == "__main__":
    main()
