"""The records that a bundle's manifest and the reader of a checkpoint share: each exists once, here."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
TensorType = Annotated[str, Meta(pattern="^(float32|float16|bfloat16|int64|int32|int8|uint8|bool)$")]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen record whose JSON has its fields and no others."""


class TensorSpec(Record, frozen=True):
    """An input or output of a graph. ``shape`` holds sizes, and names for the axes that may vary."""

    name: Name
    dtype: TensorType
    shape: list[Positive | Name]


Positions = Literal["sequential", "explicit"]
"""How a decoder learns the positions of its tokens.

``sequential``: a token's position is its place in the row; the graph takes no positions, so that a fused kernel may
apply rotary embedding itself. ``explicit``: the graph has an input ``position_ids`` int64 ``[rows, length]``.
"""


class DecoderShape(Record, frozen=True, kw_only=True):
    """What the runtime needs to know of a decoder; ``context_length`` is the largest number of positions."""

    num_layers: Positive
    num_kv_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    hidden_size: Positive
    context_length: Positive
    positions: Positions = "sequential"


class Generation(Record, frozen=True, kw_only=True):
    """What the checkpoint's generation settings say; ``top_k`` 0 is off.

    ``repetition_penalty`` sees generated tokens only (docs/facts.md 1.7).
    """

    eos_token_ids: Annotated[tuple[NonNegative, ...], Meta(min_length=1)]
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    temperature: Annotated[float, Meta(ge=0)] = 0.2
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.9
    top_k: NonNegative = 0
    max_new_tokens: Positive = 2048
