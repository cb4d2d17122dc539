"""Captions a minute: one clip at a time against several together, end to end from the files.

Clips are rendered, short and silent or with sound; weights are random, so every caption has as many tokens as allowed.
Reading, encoding and prefill are the same work either way; what several clips share are the decoder's steps. So the
ratio grows with the length of the captions, and the figures say how long they were. Stages are those of the runs one at
a time: ``time_to_first_token`` is everything before the first new token, ``media`` the part of it that reads the file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from ..calibration.render import random_scene, write_clip
from ..runtime.caption import Caption
from ..runtime.captioner import Captioner
from ..runtime.decoding import Decoding
from .harness import alternate, paired_ratio, write_result
from .random_bundle import random_bundle

_MEDIA_STAGES = ("open", "read_frames", "read_audio")


def one_by_one(captioner: Captioner, clips: list[Path], how: Decoding, audio: bool, seen: list[Caption]) -> float:
    """Seconds for all clips, each after the other, none of them in the cache."""
    started = time.perf_counter()
    seen.clear()
    for clip in clips:
        captioner.forget()
        seen.append(captioner.caption(clip, decoding=how, audio=audio))
    return time.perf_counter() - started


def together(captioner: Captioner, clips: list[Path], how: Decoding, audio: bool, rows: int) -> float:
    """Seconds for all clips as one batch, none of them in the cache."""
    captioner.forget()
    started = time.perf_counter()
    results = list(captioner.caption_batch(clips, decoding=how, audio=audio, rows=rows))
    if failed := [result.error for result in results if result.error is not None]:
        raise failed[0]
    return time.perf_counter() - started


def stages(captions: list[Caption]) -> dict[str, float]:
    """Median seconds of each stage, and of what they add up to."""
    names = captions[0].timings
    figures = {name: statistics.median(caption.timings[name] for caption in captions) for name in names}
    before = sum(seconds for name, seconds in figures.items() if name not in ("decode", "load"))
    media = sum(figures.get(name, 0.0) for name in _MEDIA_STAGES)
    return {name: round(value, 4) for name, value in {**figures, "media": media, "time_to_first_token": before}.items()}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure this bundle.  [default: random, 0.5b, int4]")
@click.option("--clips", "count", default=8, show_default=True, help="The number of clips.")
@click.option(
    "--tokens",
    "lengths",
    multiple=True,
    type=int,
    default=(64, 256),
    show_default=True,
    help="New tokens of each caption; repeatable.",
)
@click.option("--audio/--no-audio", default=False, show_default=True, help="Listen to the clips' sound as well.")
@click.option("--rows", default=8, show_default=True, help="Captions generated together.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="throughput-0.5b", show_default=True, help="The name of the file in results/.")
def main(
    bundle: Path | None, count: int, lengths: tuple[int, ...], audio: bool, rows: int, rounds: int, result: str
) -> None:
    """Measure captions a minute, alone and in a batch, for captions of each length."""
    measured: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        captioner = Captioner.load(bundle or random_bundle(Path(scratch), "0.5b"))
        clips = []
        for seed in range(count):
            clips.append(Path(scratch) / f"{seed}.mp4")
            write_clip(random_scene(seed), clips[-1])
        for tokens in lengths:
            how = Decoding(max_new_tokens=tokens)
            seen: list[Caption] = []
            contestants: dict[str, Callable[[], float]] = {
                "one_by_one": lambda how=how, seen=seen: one_by_one(captioner, clips, how, audio, seen),
                "together": lambda how=how: together(captioner, clips, how, audio, rows),
            }
            seconds = alternate(contestants, rounds)
            measured[str(tokens)] = {
                "new_tokens": statistics.median(len(caption.token_ids) for caption in seen),
                "prompt_tokens": statistics.median(caption.prompt_tokens for caption in seen),
                "captions_per_minute": {n: round(60 * count / statistics.median(v), 2) for n, v in seconds.items()},
                "together_over_one_by_one": paired_ratio(seconds["one_by_one"], seconds["together"]),
                "stages_one_by_one": stages(seen),
                "seconds": seconds,
            }
            click.echo(f"{tokens} tokens: {measured[str(tokens)]}")
        figures = {
            "shape": f"{captioner.manifest.name}, {captioner.manifest.weights}",
            "clips": count,
            "rows": rows,
            "audio": audio,
            "by_caption_length": measured,
        }
    click.echo(write_result(result, figures, "python -m intertitle.benchmarks.throughput"))


if __name__ == "__main__":
    main()
