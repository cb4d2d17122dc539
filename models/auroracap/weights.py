"""The only translation of AuroraCap's tensor names (docs/facts.md 2.4): no tensor changes its shape."""

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
    first_present,
    is_dead_in_decoder,
    is_dead_in_tower,
)

VISION = "visual_encoder/vision_model."
PROJECTOR = "projector/model."
#: The encoder keeps its position table under a second name (xtuner ``model/aurora.py``); a file has either or both.
POSITIONS = (f"{VISION}embeddings.position_embedding.weight", "visual_encoder/pos_emb")


def translate(
    checkpoint: Checkpoint, config: CaptionerConfig, shapes: Mapping[str, Mapping[str, Shape]]
) -> Translation:
    """The source of every entry of every component; ``shapes`` are the entries' own, by component and name."""
    names = checkpoint.tensors
    vision = {entry: direct(VISION + entry, shape) for entry, shape in shapes["vision"].items()}
    table = "embeddings.position_embedding.weight"
    vision[table] = direct(first_present(names, *POSITIONS), shapes["vision"][table])
    sources = {
        "vision": vision,
        "connector": {
            entry: direct(PROJECTOR + entry.removeprefix("mlp."), shape) for entry, shape in shapes["connector"].items()
        },
        "decoder": decoder_sources(shapes["decoder"], config.decoder),
        "embedding": embedding_source(config.decoder),
    }
    duplicates = {POSITIONS[1]: POSITIONS[0]} if all(name in names for name in POSITIONS) else {}

    def is_dead(name: str) -> bool:
        if name.startswith(VISION):
            return is_dead_in_tower(name.removeprefix(VISION), config.part("vision").config)
        return is_dead_in_decoder(name, config.decoder)

    return Translation(sources, is_dead, duplicates)
