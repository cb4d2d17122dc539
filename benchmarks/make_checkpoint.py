"""Write a random-weight checkpoint in the released layout: ``python -m intertitle.benchmarks.make_checkpoint OUT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..console import ProgressDisplay
from ..errors import IntertitleError
from ..models.random_checkpoint import SIZES, write_checkpoint


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--size", type=click.Choice(list(SIZES)), default="7b", show_default=True, help="7b is the released size."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The seed of the weights.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def main(out: Path, size: str, seed: int, quiet: bool) -> None:
    """Write a checkpoint with random weights in a released layout to OUT, a new folder.

    \b
    Sizes: 7b is VideoLLaMA2.1-7B-AV (17 GB); the others are listed in sizes.py of each family's folder.
    """
    started = time.perf_counter()
    try:
        with ProgressDisplay(quiet) as display:
            write_checkpoint(out, size, seed, lambda done, total: display("writing", done, total))
    except IntertitleError as error:
        click.echo(f"intertitle: {error}", err=True)
        sys.exit(2)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    click.echo(f"{out}: {written / 1e9:,.2f} GB in {time.perf_counter() - started:,.0f} s")


if __name__ == "__main__":
    main()
