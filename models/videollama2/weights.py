"""The only translation of VideoLLaMA2's tensor names and shapes (docs/facts.md 1.1 to 1.4)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..config import CaptionerConfig
from ..sources import (
    Shape,
    Source,
    Translation,
    decoder_sources,
    direct,
    embedding_source,
    from_conv1x1,
    from_conv3d,
    is_dead_in_decoder,
    is_dead_in_tower,
)

VISION = "model.vision_tower.vision_tower.vision_model."
CONNECTOR = "model.mm_projector."
AUDIO = "model.audio_tower."
AUDIO_PROJECTOR = "model.mm_projector_a."

_CONV1X1 = re.compile(r"s[12]\.b\d+\.((conv1|conv3|downsample)\.conv|se\.fc[12])\.weight")


def has_audio(checkpoint: Checkpoint) -> bool:
    """Whether there is an audio branch: the config names one, or its tensors are there."""
    named = checkpoint.config.get("mm_audio_tower") is not None
    return named or any(name.startswith((AUDIO, AUDIO_PROJECTOR)) for name in checkpoint.tensors)


def translate(
    checkpoint: Checkpoint, config: CaptionerConfig, shapes: Mapping[str, Mapping[str, Shape]]
) -> Translation:
    """The source of every entry of every component; ``shapes`` are the entries' own, by component and name."""
    names, tower = checkpoint.tensors, config.part("vision").config
    kernel = (1, 2, 2) if config.part("connector").config.kind == "spatial_conv" else (2, 2, 2)
    folder = checkpoint.tower_folder
    # The shards' copy of the tower is the trained one; the folder's is used where the shards have none.
    inside = folder is None or any(name.startswith(VISION) for name in names)
    vision = VISION if inside else f"{folder}/vision_model."
    sources = {
        "vision": {entry: direct(vision + entry, shape) for entry, shape in shapes["vision"].items()},
        **{
            part: {entry: _connector(entry, shape, kernel) for entry, shape in shapes[part].items()}
            for part in ("frame_connector", "connector")
            if part in shapes
        },
        "decoder": decoder_sources(shapes["decoder"], config.decoder, names),
        "embedding": embedding_source(config.decoder),
    }
    duplicates: dict[str, str] = {}
    if "audio" in shapes:
        sources["audio"] = {entry: _audio(entry, shape, names) for entry, shape in shapes["audio"].items()}
        tables = sorted(filter(_is_bias_table, names))
        duplicates = {name: tables[0] for name in tables[1:]}

    def is_dead(name: str) -> bool:
        if folder is not None and name.startswith(f"{folder}/"):
            # A folder may hold the whole CLIP, text tower included.
            return inside or not name.startswith(vision) or is_dead_in_tower(name.removeprefix(vision), tower)
        if name.startswith(VISION):
            return is_dead_in_tower(name.removeprefix(VISION), tower)
        return name.startswith(f"{AUDIO}predictor.") or is_dead_in_decoder(name, config.decoder)

    return Translation(sources, is_dead, duplicates)


def _connector(entry: str, shape: Shape, kernel: tuple[int, int, int]) -> Source:
    if entry.startswith("mlp."):
        return direct(CONNECTOR + entry.removeprefix("mlp."), shape)
    if entry == "sampler.linear.weight":
        return from_conv3d(f"{CONNECTOR}sampler.0.weight", shape, kernel)
    if entry == "sampler.linear.bias":
        return direct(f"{CONNECTOR}sampler.0.bias", shape)
    if _CONV1X1.fullmatch(entry):
        return from_conv1x1(CONNECTOR + entry, shape)
    return direct(CONNECTOR + entry, shape)


def _audio(entry: str, shape: Shape, names: Collection[str]) -> Source:
    if entry.startswith("projector."):
        return direct(AUDIO_PROJECTOR + entry.removeprefix("projector."), shape)
    name = AUDIO + entry.removeprefix("tower.")
    if entry == "tower.encoder.relative_attention_bias.weight":
        # One table for all layers; a file keeps it once or once a layer.
        tables = sorted(filter(_is_bias_table, names))
        return direct(
            tables[0] if tables else f"{AUDIO}encoder.layers.0.self_attn.relative_attention_bias.weight", shape
        )
    if entry == "tower.encoder.pos_conv.weight":
        prefix = f"{AUDIO}encoder.pos_conv.0."
        names = (f"{prefix}weight_g", f"{prefix}weight_v")
        return Source(names, ((1, 1, shape[2]), shape), _fold_weight_norm, _unfold_weight_norm)
    if entry == "tower.encoder.pos_conv.bias":
        return direct(f"{AUDIO}encoder.pos_conv.0.bias", shape)
    if entry.endswith(".grep_linear.weight"):
        return Source((name,), ((8, shape[1]),), _sum_of_fours, _in_fours)
    if entry.endswith(".grep_linear.bias"):
        return Source((name,), ((8,),), _sum_of_fours, _in_fours)
    return direct(name, shape)


def _is_bias_table(name: str) -> bool:
    return name.startswith(AUDIO) and name.endswith(".relative_attention_bias.weight")


def _fold_weight_norm(gain: Tensor, direction: Tensor) -> Tensor:
    """One gain per kernel tap, the epsilon inside the root (VideoLLaMA2 ``beats/weight_norm_fix.py``), in float32."""
    gain, direction = gain.to(torch.float32), direction.to(torch.float32)
    return gain * direction * torch.rsqrt(direction.pow(2).sum((0, 1), keepdim=True) + 1e-6)


def _unfold_weight_norm(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as its own direction, and the gain that leaves it as it is."""
    weight = weight.to(torch.float32)
    return (weight.pow(2).sum((0, 1), keepdim=True) + 1e-6).sqrt(), weight


def _sum_of_fours(tensor: Tensor) -> Tensor:
    """The gate's 8 outputs are summed in two fours before the sigmoid: summed here, in float32."""
    return tensor.to(torch.float32).unflatten(0, (2, 4)).sum(1)


def _in_fours(tensor: Tensor) -> tuple[Tensor]:
    """Each sum as the first of its four, the others zero."""
    fours = tensor.new_zeros(2, 4, *tensor.shape[1:])
    fours[:, 0] = tensor
    return (fours.flatten(0, 1),)
