"""Seconds of one training step by objective, same batch: ``python -m intertitle.benchmarks.preference_step``.

    python -m intertitle.benchmarks.preference_step --base align/shipped/base

Each round trains a fresh adapter on the same pairs for a few steps with each objective in turn; what is compared is the
median step of a round. DPO has to run its reference (the adapter switched off) where SynPO and LeanPO need none.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import click

from ..align.features import scene_features
from ..align.policy import Policy
from ..align.scenes import captions, draw_scene
from ..align.tune import LOG, Pair, Tuning, tune
from .harness import alternate, paired_ratio, write_result

OBJECTIVES = ("synpo", "leanpo", "dpo")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="A checkpoint of scenes.")
@click.option("--batch", default=8, show_default=True, help="Pairs per step.")
@click.option("--steps", default=8, show_default=True, help="Steps of one round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="preference-step", show_default=True, help="The name of the file in results/.")
def main(base: Path, batch: int, steps: int, rounds: int, result: str) -> None:
    """Measure and compare."""
    scenes = [draw_scene("validation", index) for index in range(batch)]
    clips = scene_features(Policy.open(base).eval(), scenes)
    # A caption of another clip is the rejected one: lengths are those of real pairs.
    pairs = [Pair(i, captions(scenes[i])[0], captions(scenes[i - 1])[0]) for i in range(batch)]

    def seconds(objective: str) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            out = tune(
                Policy.open(base), clips, pairs, Tuning(objective, steps=steps, batch=batch), Path(scratch) / "a"
            )
            lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
        return statistics.median(line["seconds"] for line in lines[2:])

    measured = alternate({name: lambda name=name: seconds(name) for name in OBJECTIVES}, rounds)
    figures = {
        "batch": batch,
        "seconds_per_step": {name: round(statistics.median(values), 4) for name, values in measured.items()},
        "over_dpo": {name: paired_ratio(measured[name], measured["dpo"]) for name in OBJECTIVES if name != "dpo"},
        "seconds": measured,
    }
    click.echo(f"{figures['seconds_per_step']} {figures['over_dpo']}")
    click.echo(write_result(result, figures, "python -m intertitle.benchmarks.preference_step --base …"))


if __name__ == "__main__":
    main()
