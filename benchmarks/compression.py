"""Fewer visual tokens: what they save and how far they move the model's next token, over a range of settings.

For every bundle and clip, pictures only: the tokens of the prompt, the seconds of tower and connector (merging
included), of the prefill and of a decoded token; and the drift of the next-token distributions along the greedy caption
of the uncompressed clip, fed to both. A merging tower (AuroraCap) is measured at its compiled ratios, other families
at ``SETTINGS``. Without bundles: two with random weights, a VideoLLaMA2.1 and an AuroraCap layout of half a billion
parameters; their drift says that the measure works, and nothing about captions.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from ..calibration.comparison import measure_drift
from ..calibration.reference import GreedyCaption
from ..export.compile import compile_bundle
from ..models.config import DecoderConfig, VisionConfig
from ..models.decoder import Decoder
from ..models.random_checkpoint import write_checkpoint
from ..models.sources import decoder_sources
from ..models.vision import VisionTower
from ..runtime.captioner import Captioner
from ..runtime.clip import Clip
from ..runtime.inference import FloatArray
from ..runtime.timing import Stages
from ..runtime.viewing import Share
from .harness import write_result
from .random_bundle import random_bundle

#: Ratios of visual tokens for a family whose tower does not merge them.
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
    seconds = {
        "vision": stages.seconds["vision"],
        "connector": stages.seconds["connector"] + stages.seconds.get("compress", 0.0),
        "prefill": prefilled - started,
        "decode_per_token": (time.perf_counter() - prefilled) / (length - 1),
    }
    return Run(sum(map(len, encoded.blocks)), len(prompt), seconds, np.stack(rows), tokens)


def measure_bundle(bundle: Path, clips: Sequence[Path], length: int, rounds: int) -> dict[str, object]:
    """All settings on all clips; of the seconds the median over clips and rounds, of the drift the mean over clips."""
    captioner = Captioner.load(bundle)
    manifest = captioner.manifest
    merging = [ratio.keep for ratio in manifest.visual.ratios]
    settings = sorted(merging, reverse=True) if merging else SETTINGS
    read = [captioner.read(clip, audio=False) for clip in clips]
    # The uncompressed clip is the yardstick: None, or the largest compiled ratio. It also warms the sessions up.
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


def write_aurora_checkpoint(folder: Path) -> Path:
    """A random checkpoint in AuroraCap's layout: 24 layers of 896, a tower of 6 layers of 384 at 224 pixels."""
    (folder / "visual_encoder").mkdir(parents=True)
    (folder / "projector").mkdir()
    words = write_checkpoint(folder.with_name("words"), "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (words / name).exists():
            (folder / name).write_bytes((words / name).read_bytes())
    decoder = DecoderConfig(896, 4864, 24, 14, 14, 64, 32000, 1e-5, 1e4, 16384, rope_factor=4.0)
    tower = VisionConfig("clip", 384, 1536, 6, 6, 224, 16, 1e-5, "quick_gelu", keep=1.0)
    configs = {
        "config.json": {
            "model_type": "llama",
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "vocab_size": decoder.vocab_size,
            "rms_norm_eps": decoder.rms_norm_eps,
            "max_position_embeddings": decoder.context_length,
            "rope_scaling": {"type": "linear", "factor": decoder.rope_factor},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "visual_encoder/config.json": {
            "model_type": "clip_vision_model",
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
        },
        "projector/config.json": {"hidden_act": "gelu", "bias": True},
    }
    for name, values in configs.items():
        (folder / name).write_text(json.dumps(values))
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Decoder(decoder).state_dict().items()}
        features = {f"vision_model.{name}": tuple(v.shape) for name, v in VisionTower(tower).state_dict().items()}
    language = {
        source.names[0]: shape
        for source, shape in zip(decoder_sources(shapes, decoder).values(), shapes.values(), strict=True)
    }
    language["model.embed_tokens.weight"] = (decoder.vocab_size, decoder.hidden_size)
    wide, narrow = decoder.hidden_size, tower.hidden_size
    projector = {
        "model.0.weight": (wide, narrow),
        "model.0.bias": (wide,),
        "model.2.weight": (wide, wide),
        "model.2.bias": (wide,),
    }
    parts = {"model": language, "visual_encoder/model": features, "projector/model": projector}
    generator = torch.Generator().manual_seed(0)
    for name, tensors in parts.items():
        save_file(
            {entry: _draw(entry, shape, generator) for entry, shape in tensors.items()}, folder / f"{name}.safetensors"
        )
    return folder


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norm weights about 1, biases about 0, layers that keep the spread of their input; in bfloat16."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.02 * values
    else:
        values *= 0.02 if "embed" in name else float(np.prod(shape[1:])) ** -0.5
    return values.bfloat16()


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
            aurora = write_aurora_checkpoint(Path(scratch) / "aurora" / "auroracap-0.5b")
            compiled = compile_bundle(aurora, Path(scratch) / "auroracap-0.5b-int4", weights="int4")
            bundles = [random_bundle(Path(scratch), "0.5b"), compiled.path]
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
