"""The only translation of InternVL2's tensor names (docs/facts.md 10.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoint import Checkpoint
from ..config import CaptionerConfig, DecoderConfig
from ..sources import Shape, Source, Translation, direct, from_fused

VISION = "vision_model."
LANGUAGE = "language_model."
TABLE = f"{LANGUAGE}model.tok_embeddings.weight"

#: Our names of a decoder layer's entries, and the checkpoint's.
_LAYER = {
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Parts of ``attention.wqkv``, in its order: for each key/value head its queries' rows, its key's, its value's."""


def translate(
    checkpoint: Checkpoint, config: CaptionerConfig, shapes: Mapping[str, Mapping[str, Shape]]
) -> Translation:
    """The source of every entry of every component; ``shapes`` are the entries' own, by component and name."""
    decoder = config.decoder
    sources = {
        "vision": {entry: direct(VISION + entry, shape) for entry, shape in shapes["vision"].items()},
        "connector": {entry: direct(entry, shape) for entry, shape in shapes["connector"].items()},
        "decoder": {entry: _decoder(entry, shape, decoder) for entry, shape in shapes["decoder"].items()},
        "embedding": {"weight": direct(TABLE, (decoder.vocab_size, decoder.hidden_size))},
    }
    return Translation(sources, lambda name: name.endswith(".rotary_emb.inv_freq"))


def _decoder(entry: str, shape: Shape, config: DecoderConfig) -> Source:
    if entry == "lm_head.weight":
        return direct(TABLE if config.tie_embeddings else f"{LANGUAGE}output.weight", shape)
    match = re.fullmatch(r"(layers\.\d+)\.(.+)\.weight", entry)
    if match is None:
        return direct(f"{LANGUAGE}model.{entry}", shape)
    layer, inner = f"{LANGUAGE}model.{match[1]}.", match[2]
    if inner not in _JOINED:
        return direct(f"{layer}{_LAYER[inner]}.weight", shape)
    head = config.head_dim
    sizes = (config.num_heads // config.num_kv_heads * head, head, head)
    return from_fused(f"{layer}attention.wqkv.weight", shape, sizes, _JOINED.index(inner), config.num_kv_heads)
