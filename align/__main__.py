"""``python -m intertitle.align``: train, align and measure the small captioner. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..console import ProgressDisplay, report
from ..errors import IntertitleError
from .recipe import RECIPES


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, align and measure the small captioner.

    \b
    Example:
      python -m intertitle.align train -o work
    """


@main.command()
@click.option("-o", "--work", type=click.Path(path_type=Path), required=True, help="Folder of the run; resumes there.")
@click.option("--recipe", type=click.Choice(sorted(RECIPES)), default="small", show_default=True)
@click.option("--workers", default=2, show_default=True, help="Processes that render clips.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def train(work: Path, recipe: str, workers: int, quiet: bool) -> None:
    """Supervised training, from nothing to a checkpoint in the released layout."""
    from .train import Run

    with ProgressDisplay(quiet) as progress:
        path = Run(RECIPES[recipe], work, progress, workers)()
    click.echo(path)


def run() -> None:
    """The command with the project's way of reporting errors."""
    try:
        main()
    except IntertitleError as error:
        report(error, {})
        sys.exit(2)


if __name__ == "__main__":
    run()
