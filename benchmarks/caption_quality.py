"""What quantization, token compression and contrast do to captions, and what they cost: quality against time.

    python -m intertitle.benchmarks.caption_quality --checkpoint CHECKPOINT --adapter ADAPTER

Captions of unseen test scenes from the compiled runtime, from PyTorch beside it, held against references and against
the scenes' facts (``align.metrics``), every figure with its 95 % bootstrap interval. Times are medians over clips of
one process on an otherwise idle machine. Writes ``results/caption-quality.json`` and ``.png``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..align.features import caption_features, scene_features
from ..align.metrics import Report, difference, evaluate
from ..align.policy import Policy
from ..align.preference.items import scene_media
from ..align.scenes import Heard, Scene, captions, compare, draw_scene
from ..console import ProgressDisplay
from ..export.compile import compile_bundle
from ..runtime.captioner import Captioner, MediaOptions
from ..runtime.decoding import Decoding
from ..runtime.viewing import Share
from .harness import RESULTS, write_result

MAIN = ("cider", "completeness", "invention", "readable", "repetition", "words")


@dataclass(frozen=True)
class Setting:
    """One way to caption: on which bundle (decoder's and encoders' weights), with how many visual tokens, how decoded,
    and how many of the clips."""

    weights: str = "int4"
    encoders: str = "fp32"
    visual_tokens: Share | None = None
    decoding: Decoding = field(default_factory=Decoding)
    every: int = 2
    group: str = ""


def settings() -> dict[str, Setting]:
    """All that is measured. Quantization over all clips, the rest over every second."""
    found = {"fp32": Setting("fp32", every=1), "int4": Setting(every=1)}
    found["int4, int8 encoders"] = Setting(encoders="int8", every=1)
    for keep in (0.75, 0.5, 0.25, 0.1):
        found[f"keep {keep}"] = Setting(visual_tokens=Share(keep), group="compression")
    for alpha in (0.25, 0.5, 1.0):
        found[f"temporal contrast {alpha}"] = Setting(
            decoding=Decoding(contrast="temporal", contrast_alpha=alpha), group="contrast"
        )
    found["temporal contrast 0.5, cutoff 0.1"] = Setting(
        decoding=Decoding(contrast="temporal", contrast_alpha=0.5, contrast_beta=0.1), group="contrast"
    )
    found["noise contrast 0.5"] = Setting(
        decoding=Decoding(contrast="noise", contrast_alpha=0.5, contrast_beta=0.1), group="contrast"
    )
    found["beam 4"] = Setting(decoding=Decoding(strategy="beam"), group="decoding")
    found["sampled"] = Setting(
        decoding=Decoding(strategy="sample", temperature=0.9, top_p=0.95, top_k=32), group="decoding"
    )
    found["retrospective"] = Setting(decoding=Decoding(retrospective=True), group="decoding")
    return found


def caption_all(
    captioner: Captioner, clips: Sequence[MediaOptions], how: Setting, progress: Callable[[int, int], None]
) -> tuple[list[str], dict[str, float]]:
    """The captions, and medians over clips of seconds and visual tokens."""
    texts, seconds, decode, tokens = [], [], [], []
    for number, media in enumerate(clips, 1):
        given = media.copy()
        if how.visual_tokens is not None:
            given["visual_tokens"] = how.visual_tokens
        steps = Counter[str]()
        captioner.forget()
        caption = captioner.caption(
            decoding=how.decoding, progress=lambda stage, *_, seen=steps: seen.update([stage]), **given
        )
        texts.append(caption.text)
        seconds.append(sum(value for name, value in caption.timings.items() if name != "load"))
        # Of all passes; the first token of each comes from its prefill.
        decode.append(caption.timings["decode"] / max(steps["decode"] - len(caption.passes), 1))
        tokens.append(caption.prompt_tokens)
        progress(number, len(clips))
    return texts, {
        "seconds_per_clip": statistics.median(seconds),
        "seconds_per_token": statistics.median(decode),
        "prompt_tokens": statistics.median(tokens),
    }


def ablation(captioner: Captioner, scenes: Sequence[Scene], clips: Sequence[MediaOptions]) -> dict[str, Any]:
    """What is said of the sound when it is the clip's own, silence, or another clip's (ACVUBench's idea).

    ``own_sound_facts``: share of the clip's own sound facts (silence left out) that the caption states;
    ``other_sound_facts`` the same for the sound that was played.
    """
    figures: dict[str, Any] = {}
    sounds_played = [np.asarray(media.get("waveform")) for media in clips]
    silent = np.zeros_like(sounds_played[0])
    shifted = [*range(1, len(scenes)), 0]
    for name in ("own", "muted", "swapped"):
        own, played, possible_own, possible_played = 0, 0, 0, 0
        for row, (scene, media) in enumerate(zip(scenes, clips, strict=True)):
            waveform = {"own": sounds_played[row], "muted": silent, "swapped": sounds_played[shifted[row]]}[name]
            sounds = {
                "own": scene.sounds,
                "muted": (Heard("silence"), Heard("silence")),
                "swapped": scenes[shifted[row]].sounds,
            }[name]
            given = media.copy()
            given["waveform"] = waveform
            text = captioner.caption(**given).text
            claims = {fact.attribute: fact.value for fact in compare(scene, text).sound_claims}
            for half, (mine, theirs) in enumerate(zip(scene.sounds, sounds, strict=True)):
                said = claims.get(("first half", "second half")[half])
                if mine.kind != "silence":
                    own, possible_own = own + (said == mine.name), possible_own + 1
                played, possible_played = played + (said == theirs.name), possible_played + 1
        figures[name] = {
            "own_sound_facts": round(own / possible_own, 4),
            "played_sound_facts": round(played / possible_played, 4),
        }
    return figures


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), required=True, help="The captioner.")
@click.option("--adapter", type=click.Path(path_type=Path, exists=True), help="Its adapter.  [default: none]")
@click.option("--test", "count", default=600, show_default=True, help="Test clips.")
@click.option("--only", multiple=True, help="Settings to measure; repeatable.  [default: all]")
@click.option("-o", "--result", default="caption-quality", show_default=True, help="The name of the file in results/.")
def main(checkpoint: Path, adapter: Path | None, count: int, only: tuple[str, ...], result: str) -> None:
    """Measure every setting and draw quality against time."""
    scenes = [draw_scene("test", index) for index in range(count)]
    wanted = {name: how for name, how in settings().items() if not only or name in only}
    rows: dict[str, dict[str, Any]] = {}
    reports: dict[str, Report] = {}
    with tempfile.TemporaryDirectory() as scratch, ProgressDisplay() as progress:
        captioners = {}
        for weights, encoders in {(how.weights, how.encoders) for how in wanted.values()}:
            path = Path(scratch) / f"{weights}-{encoders}"
            compile_bundle(checkpoint, path, adapter=adapter, weights=weights, encoder_weights=encoders)
            captioners[weights, encoders] = Captioner.load(path)
        usual = captioners.get(("int4", "fp32"), next(iter(captioners.values())))
        clips = [scene_media(scene, usual.manifest.pipeline) for scene in scenes]
        policy = Policy.open(checkpoint, adapter).eval()
        texts = caption_features(policy, scene_features(policy, scenes))
        reports["pytorch"] = evaluate(scenes, texts, meteor=True)
        rows["pytorch"] = {"report": reports["pytorch"].to_json()}
        for name, how in wanted.items():
            said, costs = caption_all(
                captioners[how.weights, how.encoders], clips[:: how.every], how, lambda a, b, n=name: progress(n, a, b)
            )
            reports[name] = evaluate(
                scenes[:: how.every], said, [captions(s) for s in scenes[:: how.every]], meteor=False
            )
            equal = float(np.mean([a == b for a, b in zip(said, texts[:: how.every], strict=True)]))
            rows[name] = {"group": how.group, **costs, "equal_to_pytorch": equal, "report": reports[name].to_json()}
            click.echo(f"{name}: {costs} {', '.join(f'{k} {reports[name].figures[k]}' for k in MAIN)}", err=True)
        figures = {
            "test_clips": count,
            "settings": rows,
            "over_pytorch": {
                name: {
                    "cider_ratio": round(
                        reports[name].figures["cider"].value / reports["pytorch"].figures["cider"].value, 4
                    ),
                    "difference": {
                        k: vars(v) for k, v in difference(reports[name], reports["pytorch"]).items() if k in MAIN
                    },
                }
                for name in ("fp32", "int4", "int4, int8 encoders")
                if name in reports
            },
            "sound_ablation": ablation(usual, scenes[::2], clips[::2]),
        }
    click.echo(figures["sound_ablation"], err=True)
    click.echo(draw(rows, RESULTS / f"{result}.png"))
    click.echo(
        write_result(result, figures, "python -m intertitle.benchmarks.caption_quality --checkpoint … --adapter …")
    )


def draw(rows: dict[str, dict[str, Any]], path: Path) -> Path:
    """CIDEr-D and the rate of invented statements against milliseconds per clip, with 95 % intervals.

    The color is the group of a setting, the marker tells settings of a group apart. Names stand in a legend beside the
    axes: many points lie close together.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    colors = {"": "black", "compression": "tab:blue", "contrast": "tab:red", "decoding": "tab:green"}
    measured = [(name, row) for name, row in rows.items() if "seconds_per_clip" in row]
    for axis, key in zip(axes, ("cider", "invention"), strict=True):
        drawn = dict.fromkeys(colors, 0)
        for name, row in measured:
            value, group = row["report"]["figures"][key], row["group"]
            spread = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
            marker, drawn[group] = "os^DvP"[drawn[group] % 6], drawn[group] + 1
            axis.errorbar(
                1000 * row["seconds_per_clip"],
                value["value"],
                yerr=spread,
                fmt=marker,
                color=colors[group],
                capsize=2,
                elinewidth=0.8,
                label=f"{group}: {name}" if group else f"weights: {name}",
            )
        axis.set_xlabel("milliseconds per clip")
        axis.set_ylabel({"cider": "CIDEr-D (more is better)", "invention": "statements invented (less is better)"}[key])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
