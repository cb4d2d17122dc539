"""The released size on a small machine: compile a VideoLLaMA2.1-7B-AV-shaped checkpoint to int4, caption a clip.

Weights are random (no released ones can be had where this was written), so the text is noise and the speed is real.
Needs 16 GB of disk for the checkpoint, 8 GB for the bundle.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

from ..cli import DEMO_CLIP
from ..models.random_checkpoint import write_checkpoint
from .harness import run_process, write_result

_INTERTITLE = [sys.executable, "-m", "intertitle.cli"]


@click.command()
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint; it is made there if it is missing."
)
@click.option("--bundle", type=click.Path(path_type=Path), help="The bundle; it is written there and kept.")
@click.option("--clip", type=click.Path(path_type=Path, exists=True), default=DEMO_CLIP, help="The clip to caption.")
@click.option("--weights", default="int4", show_default=True, help="The decoder's weights.")
@click.option(
    "--encoder-weights",
    "encoders",
    multiple=True,
    default=("fp32", "int8"),
    show_default=True,
    help="Weights of the encoders to measure; repeatable.",
)
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens of each caption.")
@click.option("--size", default="7b", show_default=True, help="The size of the random checkpoint.")
@click.option("-o", "--result", default="real-size-7b-av", show_default=True, help="The name of the file in results/.")
def main(
    checkpoint: Path | None,
    bundle: Path | None,
    clip: Path,
    weights: str,
    encoders: tuple[str, ...],
    max_new_tokens: int,
    size: str,
    result: str,
) -> None:
    """Measure compile and caption at the released size."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = checkpoint or Path(scratch) / "checkpoint"
        bundle = bundle or Path(scratch) / "bundle"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, size)  # type: ignore[arg-type]
        figures: dict[str, object] = {
            "size": size,
            "weights": weights,
            "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
        }
        for form in encoders:
            figures[f"{form} encoders"] = _measure(checkpoint, bundle, clip, weights, form, max_new_tokens)
            click.echo(write_result(result, figures, "python -m intertitle.benchmarks.real_size"))
    click.echo(json.dumps(figures, indent=1))


def _measure(
    checkpoint: Path, bundle: Path, clip: Path, weights: str, encoders: str, max_new_tokens: int
) -> dict[str, object]:
    formats = ["--weights", weights, "--encoder-weights", encoders]
    if bundle.exists():
        shutil.rmtree(bundle)
    compiled = run_process([*_INTERTITLE, "compile", str(checkpoint), "-o", str(bundle), *formats])
    started = time.perf_counter()
    captioned = run_process(
        [*_INTERTITLE, "caption", str(bundle), str(clip), "--json", "--max-new-tokens", str(max_new_tokens)]
    )
    record = json.loads(captioned.stdout)
    sizes = {file.name: file.stat().st_size for file in sorted(bundle.iterdir())}
    new_tokens = len(record["token_ids"])
    return {
        "bundle_bytes": sum(sizes.values()),
        "bundle_files": sizes,
        "compile_seconds": round(compiled.seconds, 1),
        "compile_peak_bytes": compiled.peak_bytes,
        "caption_seconds": round(time.perf_counter() - started, 1),
        "caption_peak_bytes": captioned.peak_bytes,
        "caption_stages": {name: round(seconds, 3) for name, seconds in record["timings"].items()},
        "mode": record["mode"],
        "prompt_tokens": record["prompt_tokens"],
        "new_tokens": new_tokens,
        "decode_tokens_per_second": round((new_tokens - 1) / record["timings"]["decode"], 3),
    }


if __name__ == "__main__":
    main()
