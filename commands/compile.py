"""``intertitle compile``: a checkpoint into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import ProgressDisplay, describe_compiled, show
from ..contract.targets import Target
from . import offers, options


def _decoder(target: Target) -> tuple[str, ...]:
    return target.decoder_formats


def _encoders(target: Target) -> tuple[str, ...]:
    return target.encoder_formats


if TYPE_CHECKING:
    from ..runtime.viewing import Share


@click.command("compile", short_help="Compile a checkpoint into a bundle.")
@click.argument("checkpoint", type=options.PATH)
@click.option(
    "-o", "--output", type=options.PATH, metavar="DIR", required=True, help="The bundle to write: a new directory."
)
@click.option(
    "--adapter", type=options.PATH, metavar="DIR", help="Merge this LoRA adapter (PEFT layout).  [default: none]"
)
@click.option(
    "--target",
    metavar="NAME",
    default="cpu",
    show_default=True,
    help=f"Compile for {offers.targets()}.",
)
@click.option(
    "--weights",
    metavar="FORMAT",
    help=f"The decoder's weights: {offers.formats(_decoder)}.  [default: {offers.default_format(_decoder)}]",
)
@click.option(
    "--encoder-weights",
    metavar="FORMAT",
    help=f"The weights of all other components: {offers.formats(_encoders)}.  [default: "
    f"{offers.default_format(_encoders)}; {offers.everywhere()}]",
)
@click.option(
    "--block-size",
    type=int,
    metavar="N",
    help=f"The number of int4 weights that share a scale: {offers.block_sizes('int4')}. Larger blocks are faster and "
    "less exact; a clip may then get another caption in a batch than alone.  "
    f"[default: {offers.default_block_size('int4')}]",
)
@click.option(
    "--visual-tokens",
    type=options.VisualShare(),
    metavar="SHARE",
    multiple=True,
    help="AuroraCap: a share of visual tokens that can be kept at run time; repeatable, the first is the default.  "
    f"[default: {offers.shares()}]",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that exists.")
@options.quiet
@options.debug
def compile_command(
    checkpoint: Path,
    output: Path,
    adapter: Path | None,
    target: str,
    weights: str | None,
    encoder_weights: str | None,
    block_size: int | None,
    visual_tokens: tuple[Share, ...],
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile CHECKPOINT (a folder in its released layout) into a bundle.

    \b
    Example: intertitle compile VideoLLaMA2.1-7B-AV -o captioner --weights int4
    """
    compile_bundle = options.need_compile_extra()
    with ProgressDisplay(quiet) as progress:
        result = compile_bundle(
            checkpoint,
            output,
            adapter=adapter,
            target=target,
            weights=weights,
            encoder_weights=encoder_weights,
            block_size=block_size,
            visual_tokens=visual_tokens or None,
            overwrite=overwrite,
            progress=progress,
        )
    show(*describe_compiled(result))
