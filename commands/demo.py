"""``intertitle demo``: the shipped captioner on the shipped clip."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..console import ProgressDisplay, safe, say
from . import SHIPPED, options


@click.command(short_help="Caption the shipped clip with the shipped captioner.")
@click.option("--keep", type=options.PATH, metavar="DIR", help="Copy the captioner's bundle there.  [default: no copy]")
@options.quiet
@options.debug
def demo(keep: Path | None, quiet: bool) -> None:
    """Caption the shipped clip with the shipped captioner: what was installed works.

    The captioner is a small one in the layout of VideoLLaMA2.1-7B-AV, trained on rendered scenes of moving shapes and
    sounds and aligned with SynPO. It knows nothing else.

    \b
    Example: intertitle demo --keep captioner
    """
    from ..runtime.captioner import Captioner

    bundle, clip = SHIPPED / "captioner", SHIPPED / "clip.mp4"
    if keep is not None:
        _copy(bundle, keep)
        bundle = keep
    say(f"$ {shlex.join(['intertitle', 'caption', str(bundle), str(clip)])}", prefix="")
    with ProgressDisplay(quiet, clip.name) as progress:
        result = Captioner.load(bundle).caption(clip, progress=progress)
    click.echo(f"caption: {safe(result.text)}")
    click.echo(f"truth:   {(SHIPPED / 'clip.txt').read_text(encoding='utf-8').strip()}")
    click.echo(f"heard and saw: {result.mode}, {result.prompt_tokens} prompt tokens, {len(result.token_ids)} new")
    for stage, seconds in result.timings.items():
        click.echo(f"  {stage:<12} {seconds * 1000:8.1f} ms")


def _copy(bundle: Path, target: Path) -> None:
    """Copy a bundle to ``target``, whole or not at all, in place of a bundle that is there."""
    from ..export.writer import BundleWriter
    from ..runtime.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    with BundleWriter(target, overwrite=True) as writer:
        for name in manifest.files:
            writer.add_bytes(name, (bundle / name).read_bytes())
        writer.commit(manifest)
