"""How the small captioner is made: its dimensions, and how much training each part gets."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.config import AudioConfig, DecoderConfig, VisionConfig
from ..models.videollama2.sizes import Videollama2Size

TOWER = "small-siglip"
"""Folder of the vision tower's config inside the checkpoint."""


def _size(
    *,
    vision: tuple[int, int, int],
    audio: tuple[int, int, int],
    decoder: tuple[int, int, int, int, int],
    vocabulary: int,
) -> Videollama2Size:
    """Width, layers, heads of the towers; width, MLP, layers, heads and key/value heads of the decoder."""
    hidden, inner, layers, heads, kv = decoder
    return Videollama2Size(
        decoder=DecoderConfig(
            hidden, inner, layers, heads, kv, hidden // heads, vocabulary, 1e-6, 1e6, 2048, qkv_bias=True
        ),
        vision=VisionConfig(
            "siglip", vision[0], 4 * vision[0], vision[1], vision[2], 96, 12, 1e-6, "gelu_pytorch_tanh"
        ),
        # A patch of 64 frames by 64 mels: 92 tokens for 30 s instead of 1496.
        audio=AudioConfig(
            2 * audio[0],
            audio[0],
            4 * audio[0],
            audio[1],
            audio[2],
            conv_pos=16,
            conv_pos_groups=4,
            patch_size=64,
            out_size=hidden,
        ),
        vision_tower=TOWER,
        num_frames=8,
        std=0.02,
        first_special_id=None,
    )


@dataclass(frozen=True)
class Recipe:
    """One training, whole. Steps are optimizer steps; a vision batch is of clips, all of whose frames are seen."""

    size: Videollama2Size
    clips: int
    validation: int
    vision_steps: int
    vision_batch: int
    audio_steps: int
    audio_batch: int
    caption_steps: int
    caption_batch: int
    learning_rate: float = 1e-3
    seed: int = 0


RECIPES = {
    # What the package ships.
    "small": Recipe(
        size=_size(vision=(128, 5, 4), audio=(128, 3, 4), decoder=(256, 768, 5, 4, 2), vocabulary=512),
        clips=14_336,
        validation=512,
        vision_steps=1_900,
        vision_batch=16,
        audio_steps=800,
        audio_batch=32,
        caption_steps=2_900,
        caption_batch=16,
    ),
    # For the tests: runs through every stage in seconds and learns next to nothing.
    "smoke": Recipe(
        size=_size(vision=(32, 2, 2), audio=(32, 1, 2), decoder=(64, 128, 2, 2, 1), vocabulary=384),
        clips=64,
        validation=16,
        vision_steps=6,
        vision_batch=4,
        audio_steps=6,
        audio_batch=8,
        caption_steps=12,
        caption_batch=8,
    ),
}
