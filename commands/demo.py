"""``intertitle demo``: the whole path in a few seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..console import ProgressDisplay, say
from . import DEMO_CLIP, options


@click.command(short_help="Compile a tiny captioner and caption the shipped clip.")
@click.option(
    "--keep", type=options.PATH, metavar="DIR", help="Keep checkpoint and bundle there.  [default: they are removed]"
)
@options.quiet
@options.debug
def demo(keep: Path | None, quiet: bool) -> None:
    """Compile a tiny captioner and caption the shipped clip: the whole path in a few seconds.

    The captioner has random weights, so its text is noise. It shows that the installation works, not what a captioner
    says.

    \b
    Example: intertitle demo --keep tiny
    """
    compile_bundle = options.need_compile_extra()
    from ..models.random_checkpoint import write_checkpoint
    from ..runtime.captioner import Captioner
    from ..runtime.decoding import Decoding

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        checkpoint, bundle = folder / "tiny-checkpoint", folder / "tiny-bundle"
        if not checkpoint.exists():
            say("a random checkpoint in the layout of VideoLLaMA2.1-7B-AV: tiny-checkpoint", prefix="")
            write_checkpoint(checkpoint, "tiny")
        say("$ intertitle compile tiny-checkpoint -o tiny-bundle --weights int4 --overwrite", prefix="")
        with ProgressDisplay(quiet) as progress:
            compile_bundle(checkpoint, bundle, weights="int4", overwrite=True, progress=progress)
        # Sampled from the whole vocabulary: the likeliest tokens of random weights are one token again and again.
        flags = "--max-new-tokens 32 --decoding sample --temperature 1 --top-p 1 --top-k 0 --seed 1"
        decoding = Decoding(strategy="sample", max_new_tokens=32, temperature=1, top_p=1, top_k=0, seed=1)
        say(f"$ intertitle caption tiny-bundle {DEMO_CLIP.name} {flags}", prefix="")
        with ProgressDisplay(quiet, DEMO_CLIP.name) as progress:
            result = Captioner.load(bundle).caption(DEMO_CLIP, decoding=decoding, progress=progress)
    click.echo(f"caption (of random weights, so noise): {result.text!r}")
    click.echo(f"heard and saw: {result.mode}, {result.prompt_tokens} prompt tokens, {len(result.token_ids)} new")
    for stage, seconds in result.timings.items():
        click.echo(f"  {stage:<12} {seconds * 1000:8.1f} ms")
