"""The sizes that engines are built for: the least, usual and largest size of every axis that varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...contract.manifest import Component, Manifest
from ...errors import OptionError

#: Room for the text of a prompt, in tokens.
_TEXT_TOKENS = 256
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
    context, visual = manifest.decoder.context_length, manifest.visual
    if max_length is None:
        per_block = max([visual.tokens_per_block, *(ratio.tokens_per_block for ratio in visual.ratios)])
        audio = manifest.preprocessing.audio
        tokens = visual.blocks * per_block + (audio.num_tokens if audio else 0) + _TEXT_TOKENS
        tokens += manifest.generation.max_new_tokens
        max_length = min(tokens, context)
    if not 2 <= max_length <= context:
        raise OptionError(f"a row can hold 2 to {context} tokens, not {max_length}")
    max_length = min(-(-max_length // _ROUND) * _ROUND, context)
    rows, chunk = 8 if rows is None else rows, 1024 if chunk is None else chunk
    if rows < 1 or chunk < 1:
        raise OptionError(f"rows and chunk must be at least 1, not {rows} and {chunk}")
    return Limits(max_length, rows, min(chunk, max_length))


def profiles(name: str, component: Component, manifest: Manifest, limits: Limits) -> list[Profile]:
    """The optimization profiles of a component.

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
        frames, visual = manifest.preprocessing.num_frames, manifest.visual
        slots = max((frames + 2 * visual.time_padding) // visual.time_kernel, 1)
        counts = [visual.tokens_per_block, *(ratio.tokens_per_block for ratio in visual.ratios)]
        phases = [
            {
                "frames": (1, frames, frames),
                "slots": (1, slots, slots),
                "tokens": (min(counts), counts[0], max(counts)),
            }
        ]
    varying = [value for value in component.inputs if any(axis in phases[0] for axis in value.shape)]
    return [{value.name: _ranged(value.shape, phase, limits) for value in varying} for phase in phases if varying]


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
