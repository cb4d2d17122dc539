"""A LLaVA-NeXT-Video checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 9)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...contract.pipeline import Sampling
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import CaptionerConfig, ConnectorConfig, DecoderConfig, VisionConfig
from ..fields import Fields, shown
from ..hf_config import BUILTIN_TOWERS, read_decoder, read_generation, read_image_processing, read_vision
from ..pooling import PoolConfig, PoolMode, pooled_projector_part
from ..vision import tower_part
from . import prompt

KNOWN_AS = "LLaVA-NeXT-Video (llava_next_video)"
#: Frames of the model card's example; a checkpoint does not say.
NUM_FRAMES = 8
#: The longest answer in the original's demo (LLaVA-VL/LLaVA-NeXT, playground/demo/video_demo.py).
MAX_NEW_TOKENS = 1024
#: What transformers' LlamaConfig takes for keys that a text_config leaves out; the released one does.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
#: What transformers' LlavaNextVideoConfig takes for a vision_config that is missing.
_TOWER = BUILTIN_TOWERS["openai/clip-vit-large-patch14-336"]
_POOLS: tuple[PoolMode, ...] = ("average", "max")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family."""
    return checkpoint.config.get("model_type") == "llava_next_video"


def read_config(checkpoint: Checkpoint) -> CaptionerConfig:
    """Everything but the weights. Raises CheckpointError for what is missing, malformed or not supported."""
    fields = Fields(checkpoint.config, "config.json")
    decoder, vision = _read_decoder(fields), _read_vision(fields)
    if fields.text("projector_hidden_act", "gelu") != "gelu" or not fields.flag("multimodal_projector_bias", True):
        raise CheckpointError("config.json: only a projector with gelu and biases is supported")
    connector = ConnectorConfig(
        kind="mlp2x_gelu", in_size=vision.hidden_size, out_size=decoder.hidden_size, grid=vision.grid
    )
    stride = fields.integer("spatial_pool_stride", 2, maximum=vision.grid)
    processor = "preprocessor_config.json"
    return CaptionerConfig(
        family="llava_next_video",
        sampling=Sampling(rule="strided", count=NUM_FRAMES),
        image=read_image_processing(checkpoint.json(processor), processor, vision),
        parts=(tower_part(vision), pooled_projector_part(PoolConfig(connector, _read_pool(fields), stride))),
        decoder=decoder,
        generation=read_generation(checkpoint, MAX_NEW_TOKENS, extra_eos=None),
        prompts=prompt.layouts(bos=(fields.child("text_config") or fields).integer("bos_token_id", 1, minimum=0)),
    )


def _read_pool(fields: Fields) -> PoolMode:
    mode = fields.text("spatial_pool_mode", "average")
    for known in _POOLS:
        if mode == known:
            return known
    raise CheckpointError(f"{fields.where}: spatial_pool_mode {shown(mode)} is not supported, only {', '.join(_POOLS)}")


def _read_decoder(fields: Fields) -> DecoderConfig:
    text = fields.child("text_config") or Fields({}, f"{fields.where}: text_config")
    if text.text("model_type", "llama") != "llama":
        raise CheckpointError(
            f"{text.where}: model_type {shown(text.get('model_type'))} is not supported, only 'llama'"
        )
    given = {key: value for key, value in text.values.items() if value is not None}
    tied = fields.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
    values = {**_LLAMA, **given, "tie_word_embeddings": tied}
    decoder = read_decoder(Fields(values, text.where), qkv_bias=False, sliding_window=None)
    # The configuration counts positions before they are scaled (docs/facts.md 9.3).
    return replace(decoder, context_length=int(decoder.context_length * decoder.rope_factor))


def _read_vision(fields: Fields) -> VisionConfig:
    tower = fields.child("vision_config")
    layer = fields.get("vision_feature_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise CheckpointError(f"{fields.where}: vision_feature_layer must be one layer, not {shown(layer)}")
    if fields.text("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError(
            f"{fields.where}: vision_feature_select_strategy "
            f"{shown(fields.get('vision_feature_select_strategy'))} is not supported, only 'default'"
        )
    vision = read_vision(tower or Fields(_TOWER, f"{fields.where}: vision_config"), layer)
    if vision.kind != "clip":
        raise CheckpointError(f"{fields.where}: vision_config: only a CLIP tower is supported")
    return vision
