"""``intertitle demo``: the shipped captioner on the shipped clip, from checkpoint to caption."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..console import ProgressDisplay, say
from . import SHIPPED, options


@click.command(short_help="Compile the shipped captioner and caption the shipped clip.")
@click.option("--keep", type=options.PATH, metavar="DIR", help="Keep the bundle there.  [default: it is removed]")
@options.quiet
@options.debug
def demo(keep: Path | None, quiet: bool) -> None:
    """Compile the shipped captioner and caption the shipped clip: the whole path in a few seconds.

    The captioner is a small one in the layout of VideoLLaMA2.1-7B-AV, trained on rendered scenes of moving shapes and
    sounds and aligned with SynPO. It knows nothing else.

    \b
    Example: intertitle demo --keep captioner
    """
    compile_bundle = options.need_compile_extra()
    from ..runtime.captioner import Captioner

    base, adapter, clip = SHIPPED / "base", SHIPPED / "synpo", SHIPPED / "clip.mp4"
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle" if keep is None else keep
        say(f"$ intertitle compile base --adapter synpo -o {bundle.name} --weights int4 --overwrite", prefix="")
        with ProgressDisplay(quiet) as progress:
            compile_bundle(base, bundle, adapter=adapter, weights="int4", overwrite=True, progress=progress)
        say(f"$ intertitle caption {bundle.name} {clip.name}", prefix="")
        with ProgressDisplay(quiet, clip.name) as progress:
            result = Captioner.load(bundle).caption(clip, progress=progress)
    click.echo(f"caption: {result.text}")
    click.echo(f"truth:   {(SHIPPED / 'clip.txt').read_text(encoding='utf-8').strip()}")
    click.echo(f"heard and saw: {result.mode}, {result.prompt_tokens} prompt tokens, {len(result.token_ids)} new")
    for stage, seconds in result.timings.items():
        click.echo(f"  {stage:<12} {seconds * 1000:8.1f} ms")
