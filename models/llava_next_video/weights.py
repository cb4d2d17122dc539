"""The only translation of LLaVA-NeXT-Video's tensor names (docs/facts.md 9.1): no tensor changes its shape."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import Checkpoint
from ..config import CaptionerConfig
from ..sources import (
    Shape,
    Translation,
    decoder_sources,
    direct,
    embedding_source,
    is_dead_in_decoder,
    is_dead_in_tower,
    renamed,
)

VISION = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
LANGUAGE = "language_model."
#: Only pictures in tiles have it.
NEWLINE = "image_newline"


def translate(
    checkpoint: Checkpoint, config: CaptionerConfig, shapes: Mapping[str, Mapping[str, Shape]]
) -> Translation:
    """The source of every entry of every component; ``shapes`` are the entries' own, by component and name."""
    sources = {
        "vision": {entry: direct(VISION + entry, shape) for entry, shape in shapes["vision"].items()},
        "connector": {entry: direct(_projector(entry), shape) for entry, shape in shapes["connector"].items()},
        "decoder": renamed(decoder_sources(shapes["decoder"], config.decoder), _language),
        "embedding": renamed(embedding_source(config.decoder), _language),
    }

    def is_dead(name: str) -> bool:
        if name.startswith(VISION):
            return is_dead_in_tower(name.removeprefix(VISION), config.part("vision").config)
        return name == NEWLINE or is_dead_in_decoder(name.removeprefix(LANGUAGE), config.decoder)

    return Translation(sources, is_dead)


def _language(name: str) -> str:
    return LANGUAGE + name


def _projector(entry: str) -> str:
    """``mlp.0`` and ``mlp.2`` are ``linear_1`` and ``linear_2``."""
    return PROJECTOR + entry.replace("mlp.0.", "linear_1.").replace("mlp.2.", "linear_2.")
