"""``python -m intertitle.align``: train, align and measure the small captioner. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..commands import SHIPPED_ADAPTER, SHIPPED_BASE
from ..console import ProgressDisplay, report
from ..errors import IntertitleError
from .objectives import OBJECTIVES
from .recipe import RECIPES


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, align and measure the small captioner.

    \b
    Example:
      python -m intertitle.align train -o work
    """


@main.command()
@click.option(
    "-o",
    "--work",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder of the run, new or stopped.",
)
@click.option(
    "--recipe",
    type=click.Choice(sorted(RECIPES)),
    default="small",
    show_default=True,
    help="The size of the captioner and how long it trains.",
)
@click.option("--workers", default=2, show_default=True, help="The number of processes that render clips.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def train(work: Path, recipe: str, workers: int, quiet: bool) -> None:
    """Train a small captioner from random weights and write a checkpoint in the released layout."""
    from .train import Run

    with ProgressDisplay(quiet) as progress:
        path = Run(RECIPES[recipe], work, progress, workers)()
    click.echo(path)


@main.command()
@click.argument("pairs", type=click.Path(path_type=Path, exists=True))
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="The checkpoint to align.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder of the adapter.")
@click.option(
    "--objective",
    type=click.Choice(list(OBJECTIVES)),
    default="synpo",
    show_default=True,
    help="The loss.",
)
@click.option("--steps", default=200, show_default=True, help="The number of optimizer steps.")
@click.option("--batch", default=8, show_default=True, help="Pairs per step.")
@click.option("--learning-rate", default=2e-4, show_default=True, help="The learning rate of the LoRA layers.")
@click.option(
    "--connector-rate",
    default=0.0,
    show_default=True,
    help="The learning rate of connector and audio projector; 0 leaves them as they are.",
)
@click.option("--rank", default=32, show_default=True, help="LoRA: the rank of the two matrices.")
@click.option("--alpha", default=16.0, show_default=True, help="LoRA: their product is scaled by alpha / rank.")
@click.option(
    "--gap",
    type=float,
    help="Use the pairs whose scores differ by at least this.  [default: the pairs that were kept]",
)
@click.option("--seed", default=0, show_default=True, help="The seed of the order of pairs and of the new weights.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def tune(
    pairs: Path,
    base: Path,
    output: Path,
    objective: str,
    steps: int,
    batch: int,
    learning_rate: float,
    connector_rate: float,
    rank: int,
    alpha: float,
    gap: float | None,
    seed: int,
    quiet: bool,
) -> None:
    """Train a LoRA adapter on PAIRS, which `intertitle pairs --scenes` wrote."""
    from .features import scene_features
    from .policy import Policy
    from .tune import Tuning, scene_pairs
    from .tune import tune as train_adapter

    how = Tuning(
        objective,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        connector_rate=connector_rate,
        rank=rank,
        alpha=alpha,
        seed=seed,
    )
    scenes, rows = scene_pairs(pairs, gap)
    with ProgressDisplay(quiet) as progress:
        policy = Policy.open(base).eval()
        clips = scene_features(policy, scenes, None, lambda done, total: progress("features", done, total))
        click.echo(train_adapter(policy, clips, rows, how, output, progress))


@main.command()
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True),
    default=SHIPPED_BASE,
    help="The supervised checkpoint.  [default: the shipped one]",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, exists=True),
    default=SHIPPED_ADAPTER,
    help="Its SynPO adapter.  [default: the shipped one]",
)
@click.option("--scene", type=int, help="The clip to ship: its index in the test split.  [default: keep the clip]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder of the package.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def ship(base: Path, adapter: Path, scene: int | None, output: Path, quiet: bool) -> None:
    """Put base, adapter, the bundle compiled from them and a test clip where the package ships them.

    To compile the bundle again after a change of the compiler, run this in a checkout.

    \b
    Example: python -m intertitle.align ship -o .
    """
    from .ship import ship as write

    with ProgressDisplay(quiet) as progress:
        size = write(base, adapter, output, scene, progress)
    click.echo(f"{output}: {size / 1e6:.1f} MB in the wheel")


@main.command()
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.option("--adapter", "adapters", type=click.Path(path_type=Path), multiple=True, help="Draw this tuning, too.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The picture: png, svg or pdf.")
def plot(work: Path, adapters: tuple[Path, ...], output: Path) -> None:
    """Draw the losses of the training in WORK."""
    from .plots import draw_losses

    click.echo(draw_losses(work, {adapter.name: adapter for adapter in adapters}, output))


def run() -> None:
    """The command with the project's way of reporting errors."""
    try:
        main()
    except IntertitleError as error:
        report(error, {})
        sys.exit(2)


if __name__ == "__main__":
    run()
