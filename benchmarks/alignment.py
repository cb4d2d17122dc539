"""Preference objectives side by side on unseen scenes: ``python -m intertitle.benchmarks.alignment``.

    python -m intertitle.align train -o work
    intertitle compile work/supervised -o work/bundle --weights fp32
    intertitle pairs work/bundle --scenes train:20000:21500 --no-refine -o work/pairs.jsonl
    python -m intertitle.benchmarks.alignment --work work

Every objective starts from the same supervised checkpoint and sees the same pairs, batches, steps, rank and learning
rate, once for each seed. ``more_supervised`` is the control: cross entropy on the chosen texts, as many steps. Captions
are from PyTorch, greedy and sampled (as the pairs' candidates were); figures have 95 % bootstrap intervals over the
test clips, and the differences from the supervised captioner are paired.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..align.features import caption_features, scene_features
from ..align.metrics import Report, difference, evaluate
from ..align.policy import Policy
from ..align.scenes import draw_scene
from ..align.tune import LOG, Tuning, scene_pairs, tune
from ..console import ProgressDisplay
from .harness import write_result

#: Name to objective. Learning rate, rank and steps are the same for all.
CONTESTANTS = {
    "more_supervised": "supervised",
    "dpo": "dpo",
    "synpo": "synpo",
    "leanpo": "leanpo",
}
#: As captions are mostly asked for, and as the candidates of the pairs were drawn.
DECODINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.9, "top_p": 0.95}}
MAIN = ("cider", "completeness", "invention", "readable", "repetition", "words")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the training.")
@click.option("--pairs", "pairs_path", type=click.Path(path_type=Path), help="Pairs.  [default: work/pairs.jsonl]")
@click.option("--test", "count", default=600, show_default=True, help="Unseen test clips.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each objective.")
@click.option("--steps", default=150, show_default=True, help="Optimizer steps.")
@click.option("--batch", default=8, show_default=True, help="Pairs per step.")
@click.option("--learning-rate", default=2e-4, show_default=True, help="The learning rate.")
@click.option(
    "--connector-rate", default=0.0, show_default=True, help="The learning rate of connector and projector; 0: fixed."
)
@click.option(
    "--gap", type=float, help="Use pairs whose scores differ by at least this.  [default: those the run kept]"
)
@click.option(
    "--only", multiple=True, type=click.Choice(sorted(CONTESTANTS)), help="Measure only these.  [default: all]"
)
@click.option("-o", "--result", default="alignment", show_default=True, help="The name of the file in results/.")
def main(
    work: Path,
    pairs_path: Path | None,
    count: int,
    seeds: int,
    steps: int,
    batch: int,
    learning_rate: float,
    connector_rate: float,
    gap: float | None,
    only: tuple[str, ...],
    result: str,
) -> None:
    """Train every objective with every seed and measure what each says of the test clips."""
    base = work / "supervised"
    test = [draw_scene("test", index) for index in range(count)]
    scenes, pairs = scene_pairs(pairs_path or work / "pairs.jsonl", gap)
    with ProgressDisplay() as progress:
        policy = Policy.open(base).eval()
        seen = scene_features(policy, test, work / f"test-{count}", lambda a, b: progress("features of test", a, b))
        digest = hashlib.sha256(json.dumps(sorted({str(scene) for scene in scenes})).encode()).hexdigest()[:12]
        clips = scene_features(
            policy, scenes, work / f"pairs-{digest}", lambda a, b: progress("features of pairs", a, b)
        )
        reports: dict[str, dict[str, list[Report]]] = {decoding: {} for decoding in DECODINGS}

        def report(name: str, policy: Policy, out: Path) -> None:
            for decoding, how in DECODINGS.items():
                said = out / f"{decoding}-{count}.json"
                if not said.exists():
                    heard = partial(progress, f"caption {name}, {decoding}")
                    said.write_text(json.dumps(caption_features(policy, seen, progress=heard, **how)))
                made = evaluate(test, json.loads(said.read_text()), meteor=False)
                reports[decoding].setdefault(name, []).append(made)
                click.echo(f"{name}, {decoding}: {_line(made)}", err=True)

        (work / "adapters").mkdir(exist_ok=True)
        report("supervised", policy, work / f"test-{count}")
        seconds: dict[str, float] = {}
        for name in only or CONTESTANTS:
            for seed in range(seeds):
                how = Tuning(
                    CONTESTANTS[name],
                    steps=steps,
                    batch=batch,
                    learning_rate=learning_rate,
                    connector_rate=connector_rate,
                    seed=seed,
                )
                out = work / "adapters" / f"{name}-{learning_rate:g}-{connector_rate:g}-{steps}-{seed}"
                tuned = Policy.open(base)
                tune(tuned, clips, pairs, how, out, progress)
                log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
                seconds[name] = statistics.median(line["seconds"] for line in log)
                report(name, tuned, out)
    figures: dict[str, Any] = {
        "test_clips": count,
        "pairs": len(pairs),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "connector_rate": connector_rate,
        "seconds_per_step": seconds,
        **{decoding: _compared(each) for decoding, each in reports.items()},
    }
    path = write_result(result, figures, "python -m intertitle.benchmarks.alignment --work work")
    click.echo(path)


def _compared(reports: dict[str, list[Report]]) -> dict[str, Any]:
    """Every report, the means over the seeds, and the paired differences from the supervised captioner."""
    (supervised,) = reports["supervised"]
    return {
        "reports": {name: [report.to_json() for report in each] for name, each in reports.items()},
        "mean_over_seeds": {
            name: {key: round(float(np.mean([r.figures[key].value for r in each])), 4) for key in MAIN}
            for name, each in reports.items()
        },
        "difference_from_supervised": {
            name: [
                {key: vars(figure) for key, figure in difference(report, supervised).items() if key in MAIN}
                for report in each
            ]
            for name, each in reports.items()
            if name != "supervised"
        },
    }


def _line(report: Report) -> str:
    return ", ".join(f"{key} {report.figures[key]}" for key in MAIN)


if __name__ == "__main__":
    main()
