"""Fewer visual tokens: what they save and how far they move the model's next token, over a range of settings.

For every bundle and clip, pictures only: the tokens of the prompt, the seconds of tower and connector (merging
included), of the prefill and of a decoded token; and the drift of the next-token distributions along the greedy caption
of the uncompressed clip, fed to both. A merging tower (AuroraCap) is measured at its compiled shares, other families
at ``SETTINGS``. Without bundles: two with random weights, a VideoLLaMA2.1 and an AuroraCap layout of half a billion
parameters; their drift says that the measure works, and nothing about captions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from ..calibration.comparison import measure_drift
from ..calibration.reference import GreedyCaption
from ..runtime.captioner import Captioner
from ..runtime.clip import Clip
from ..runtime.inference import FloatArray
from ..runtime.timing import Stages
from ..runtime.viewing import Share
from .harness import write_result
from .random_bundle import random_bundle

#: Shares of visual tokens for a family whose tower does not merge them.
SETTINGS = (1.0, 0.75, 0.5, 0.25, 0.1)
DEMO = Path(__file__).parent.parent / "calibration" / "clips" / "demo.mp4"
RANDOM = "random weights: times and token counts are real, the drift has no meaning for captions"


@dataclass
class Run:
    """One setting on one clip; ``logits [N, V]`` predict each token of the caption that was fed."""

    tokens: int
    prompt_tokens: int
    seconds: dict[str, float]
    logits: FloatArray = field(repr=False)
    caption: list[int] = field(repr=False)


def run_setting(captioner: Captioner, clip: Clip, setting: float | None, length: int, fed: Sequence[int] | None) -> Run:
    """Encode, prefill and decode ``length`` tokens: those of ``fed``, or the likeliest ones."""
    stages = Stages()
    encoded = captioner.encoder.encode(clip, stages, visual_tokens=None if setting is None else Share(setting))
    prompt = captioner.encoder.prompt_embeds(encoded, captioner.manifest.default_instruction)
    inference = captioner.open_inference(len(prompt) + length)
    started = time.perf_counter()
    rows = [inference.prefill(0, prompt)[0].copy()]
    prefilled = time.perf_counter()
    tokens = [int(rows[0].argmax()) if fed is None else fed[0]]
    while len(tokens) < length:
        rows.append(inference.step(np.array(tokens[-1:]))[0].copy())
        tokens.append(int(rows[-1].argmax()) if fed is None else fed[len(tokens)])
    tower, *behind = (stage.name for stage in captioner.manifest.pipeline.visual())
    seconds = {
        "vision": stages.seconds[tower],
        "connector": sum(stages.seconds.get(name, 0.0) for name in (*behind, "compress")),
        "prefill": prefilled - started,
        "decode_per_token": (time.perf_counter() - prefilled) / (length - 1),
    }
    return Run(sum(map(len, encoded.blocks)), len(prompt), seconds, np.stack(rows), tokens)


def measure_bundle(bundle: Path, clips: Sequence[Path], length: int, rounds: int) -> dict[str, object]:
    """All settings on all clips; of the seconds the median over clips and rounds, of the drift the mean over clips."""
    captioner = Captioner.load(bundle)
    manifest = captioner.manifest
    stage = manifest.pipeline.merging
    merging = [] if stage is None else [variant.keep for variant in stage.variants]
    settings = sorted(merging, reverse=True) if merging else SETTINGS
    read = [captioner.read(clip, audio=False) for clip in clips]
    # The uncompressed clip is the yardstick: None, or the largest compiled share. It also warms the sessions up.
    whole = [run_setting(captioner, clip, settings[0] if merging else None, length, None) for clip in read]
    runs: dict[float, list[list[Run]]] = {setting: [[] for _ in clips] for setting in settings}
    for turn in range(rounds):
        # Every other round backwards, as in ``harness.alternate``.
        for setting in settings[:: -1 if turn % 2 else 1]:
            for own, clip, base in zip(runs[setting], read, whole, strict=True):
                own.append(run_setting(captioner, clip, setting, length, base.caption))
    rows = []
    for setting, of_clips in runs.items():
        drifts = [
            measure_drift(
                own[0].logits, own[0].logits.argmax(1).tolist(), GreedyCaption(base.caption, base.logits), 0.0
            )
            for own, base in zip(of_clips, whole, strict=True)
        ]
        every = [run for own in of_clips for run in own]
        rows.append(
            {
                "visual_tokens": setting,
                "tokens": [own[0].tokens for own in of_clips],
                "prompt_tokens": [own[0].prompt_tokens for own in of_clips],
                "seconds": {
                    name: round(statistics.median(run.seconds[name] for run in every), 5) for name in every[0].seconds
                },
                "logits_error": float(np.mean([drift.logits_error for drift in drifts])),
                "kl_nats": float(np.mean([drift.kl for drift in drifts])),
                "top1_agreement": float(np.mean([drift.top1_agreement for drift in drifts])),
            }
        )
    return {
        "bundle": bundle.name,
        "family": manifest.family,
        "weights": manifest.weights,
        "method": "merging in the tower" if merging else "bipartite merging behind the connector",
        "settings": rows,
    }


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--tokens", default=24, show_default=True, help="Tokens of the caption along which the drift is measured."
)
@click.option("--rounds", default=2, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="compression", show_default=True, help="The name of the file in results/.")
def main(paths: tuple[Path, ...], tokens: int, rounds: int, result: str) -> None:
    """Measure bundles (folders with a bundle.json) on clips (all other PATHS; the shipped one if there is none)."""
    bundles = [path for path in paths if (path / "bundle.json").exists()]
    clips = [path for path in paths if path not in bundles] or [DEMO]
    with tempfile.TemporaryDirectory() as scratch:
        note = None if bundles else RANDOM
        if not bundles:
            bundles = [random_bundle(Path(scratch), size) for size in ("0.5b", "auroracap-0.5b")]
        measured = [measure_bundle(bundle, clips, tokens, rounds) for bundle in bundles]
    figures = {
        "note": note,
        "clips": [clip.name for clip in clips],
        "caption_tokens": tokens,
        "rounds": rounds,
        "sound": "left out",
        "bundles": measured,
    }
    path = write_result(result, figures, "python -m intertitle.benchmarks.compression")
    for bundle in measured:
        click.echo(f"{bundle['bundle']}: {bundle['method']}")
        for row in bundle["settings"]:  # type: ignore[attr-defined]
            click.echo(f"  {row}")
    click.echo(path)


if __name__ == "__main__":
    main()
