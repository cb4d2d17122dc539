"""The sizes that engines are built for: the least, usual and largest size of every axis that varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...contract.manifest import Component, Manifest
from ...contract.pipeline import EachOf, Pipeline, PromptLayout, Stage, Text, stages_of
from ...errors import OptionError

#: Room for the text of a prompt, in tokens: what stands there once, and what names the time of one frame ("104.75s,").
_TEXT_TOKENS, _TIME_TOKENS = 256, 8
#: The length of a row is a multiple of this many tokens, so that each row begins at a multiple of 256 bytes, as
#: TensorRT needs.
_ROUND = 64

Range = tuple[int, int, int]
"""Least, usual and largest size."""
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Least, usual and largest shape of each input that varies."""


@dataclass(frozen=True)
class Limits:
    """The sizes of a decoder's engine.

    ``max_length``: tokens of a row, prompt and caption together; the cache has this fixed length. ``rows``: rows of one
    step. ``chunk``: prompt tokens of one run; the activations grow with it.
    """

    max_length: int
    rows: int
    chunk: int


def default_limits(
    manifest: Manifest, max_length: int | None = None, rows: int | None = None, chunk: int | None = None
) -> Limits:
    """Sizes for a prompt of the family with a whole clip and its longest caption, unless other sizes are given.

    ``OptionError`` for sizes without room for a token or above the decoder's context.
    """
    context = manifest.decoder.context_length
    if max_length is None:
        longest = max(_longest(manifest.pipeline, layout) for layout in manifest.pipeline.prompts.values())
        max_length = min(longest + manifest.generation.max_new_tokens, context)
    if not 2 <= max_length <= context:
        raise OptionError(f"a row can hold 2 to {context} tokens, not {max_length}")
    max_length = min(-(-max_length // _ROUND) * _ROUND, context)
    rows, chunk = 8 if rows is None else rows, 1024 if chunk is None else chunk
    if rows < 1 or chunk < 1:
        raise OptionError(f"rows and chunk must be at least 1, not {rows} and {chunk}")
    return Limits(max_length, rows, min(chunk, max_length))


def profiles(name: str, component: Component, manifest: Manifest, limits: Limits) -> list[Profile]:
    """The optimization profiles of the component ``name``.

    The decoder has two (prompts of one row; one token of every row), other components have one, and a component with
    fixed shapes has no profile.
    """
    if name == "decoder":
        phases: list[Mapping[str, Range]] = [
            {"rows": (1, 1, 1), "length": (1, limits.chunk, limits.chunk), "asked": (1, 1, limits.chunk)},
            {"rows": (1, 1, limits.rows), "length": (1, 1, 1), "asked": (1, 1, 1)},
        ]
    elif name == "selection":
        phases = [{"rows": (1, 1, limits.rows)}]
    else:
        return _stage_profiles(manifest.pipeline.stage(name), component, manifest, limits)
    varying = [value for value in component.inputs if any(axis in phases[0] for axis in value.shape)]
    return [{value.name: _ranged(value.shape, phase, limits) for value in varying} for phase in phases if varying]


def _longest(pipeline: Pipeline, layout: PromptLayout) -> int:
    """Tokens of the longest prompt of a layout: all places, the largest number of tokens, and room for its text."""
    places, length = pipeline.sampling.count, _TEXT_TOKENS
    for name in stages_of(layout.pieces):
        length += pipeline.units(name, places) * max(pipeline.token_counts(name))
    for piece in layout.pieces:
        if isinstance(piece, EachOf):
            # A token has at least one byte.
            text = f"{piece.before}{piece.after}{piece.separator}".encode()
            length += pipeline.units(piece.stage, places) * len(text)
        elif isinstance(piece, Text):
            length += piece.text.count("{times}") * places * _TIME_TOKENS
    return length


def _stage_profiles(stage: Stage, component: Component, manifest: Manifest, limits: Limits) -> list[Profile]:
    """The profile of a stage: from one unit to all units of the longest clip, with each number of tokens."""
    pipeline, profile = manifest.pipeline, Profile()
    slots = max(1, pipeline.units(stage.name, pipeline.sampling.count))
    specs = {spec.name: spec for spec in component.inputs}
    for value in stage.inputs:
        shape = specs[value.name].shape
        if all(isinstance(axis, int) for axis in shape):
            continue
        frames = max(1, pipeline.units(value.source, pipeline.sampling.count))
        phase: dict[str, Range] = {"frames": (1, frames, frames), "slots": (1, slots, slots)}
        if "tokens" in shape:
            counts = pipeline.token_counts(value.source)
            phase["tokens"] = (min(counts), counts[0], max(counts))
        profile[value.name] = _ranged(shape, phase, limits)
    return [profile] if profile else []


def _ranged(
    shape: list[int | str], phase: Mapping[str, Range], limits: Limits
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    length = limits.max_length
    ranges = [
        (axis,) * 3 if isinstance(axis, int) else (length,) * 3 if axis == "max_length" else phase[axis]
        for axis in shape
    ]
    least, usual, most = (tuple(part[i] for part in ranges) for i in range(3))
    return least, usual, most
