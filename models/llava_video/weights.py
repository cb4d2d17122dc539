"""The only translation of LLaVA-Video's tensor names (docs/facts.md 8.1). Only the vocabulary changes its shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint import Checkpoint
from ..config import CaptionerConfig
from ..fields import Fields
from ..sources import (
    Shape,
    Source,
    Translation,
    decoder_sources,
    direct,
    embedding_source,
    first_rows,
    is_dead_in_decoder,
    is_dead_in_tower,
)
from .prompt import read_newline

VISION = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"


def translate(
    checkpoint: Checkpoint, config: CaptionerConfig, shapes: Mapping[str, Mapping[str, Shape]]
) -> Translation:
    """The source of every entry of every component; ``shapes`` are the entries' own, by component and name."""
    fields = Fields(checkpoint.config, "config.json")
    rows, newline = fields.integer("vocab_size"), read_newline(fields)
    decoder = decoder_sources(shapes["decoder"], config.decoder)
    decoder["lm_head.weight"] = first_rows(decoder["lm_head.weight"], rows)
    table = first_rows(embedding_source(config.decoder)["weight"], rows)
    connector = {
        entry: direct(NEWLINE if entry == "newline" else PROJECTOR + entry.removeprefix("mlp."), shape)
        for entry, shape in shapes["connector"].items()
    }
    sources = {
        "vision": {entry: direct(VISION + entry, shape) for entry, shape in shapes["vision"].items()},
        "connector": connector,
        "decoder": decoder,
        "embedding": {"weight": _with_newline(table) if newline == "one_token" else table},
    }

    def is_dead(name: str) -> bool:
        if name.startswith(VISION):
            return is_dead_in_tower(name.removeprefix(VISION), config.part("vision").config)
        return name == NEWLINE or is_dead_in_decoder(name, config.decoder)

    return Translation(sources, is_dead)


def _with_newline(table: Source) -> Source:
    """The embedding table with the learned vector as its last row."""
    (shape,) = table.shapes
    return Source(
        (*table.names, NEWLINE),
        (shape, shape[1:]),
        lambda rows, newline: torch.cat((table.build(rows), newline.unsqueeze(0))),
        lambda value: (*table.split(value[:-1]), value[-1]),
    )
