"""Captions of one clip, each as the first: ``python -m intertitle.benchmarks.cold_captions BUNDLE CLIP``.

One process, one JSON object a caption. A clip that is captioned again would find its prompt in the cache, so the cache
forgets it before each; components stay loaded. Needs neither PyTorch nor ONNX.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ..runtime.captioner import Captioner
from ..runtime.decoding import Decoding


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("clip", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="auto", show_default=True, help="Where to run.")
@click.option("--rounds", default=1, show_default=True, help="How many captions.")
@click.option("--max-new-tokens", default=64, show_default=True, help="The length of each caption, in tokens.")
@click.option("--staged", is_flag=True, help="Keep one component loaded at a time.")
def main(bundle: Path, clip: Path, device: str, rounds: int, max_new_tokens: int, staged: bool) -> None:
    """Caption CLIP with BUNDLE several times."""
    with Captioner.load(bundle, device=device, staged=staged) as captioner:
        for _ in range(rounds):
            captioner.forget()
            caption = captioner.caption(clip, decoding=Decoding(max_new_tokens=max_new_tokens))
            click.echo(json.dumps(asdict(caption)))


if __name__ == "__main__":
    main()
