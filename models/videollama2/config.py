"""A VideoLLaMA2 checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 1.1, 1.2, 1.4, 1.7)."""

from __future__ import annotations

from dataclasses import dataclass

from ...contract.pipeline import Sampling
from ...errors import CheckpointError
from ..beats import audio_part, sound_plan
from ..checkpoint import Checkpoint
from ..config import AudioConfig, CaptionerConfig, ConnectorConfig, VisionConfig
from ..connectors import connector_parts
from ..fields import MOST_LAYERS, Fields, shown
from ..hf_config import check_heads, read_decoder, read_generation, read_image_processing, read_named_tower
from ..sources import mlp_kind
from ..vision import tower_part
from . import prompt, weights

KNOWN_AS = "VideoLLaMA2 (videollama2_mistral, videollama2_mixtral, videollama2_qwen2)"


@dataclass(frozen=True)
class DecoderKind:
    """What a ``model_type`` says of the decoder.

    ``system_turn``: the prompt begins with the reference's own system turn. ``window_flag``: the key that switches the
    sliding window on; ``None``: it is on where the config has one. ``sparse``: several experts.
    """

    system_turn: bool = False
    qkv_bias: bool = False
    window_flag: str | None = None
    sparse: bool = False


_MISTRAL = DecoderKind(system_turn=True)
#: By ``model_type``. "mistral" is how older 2-7B-16F revisions say it. Phi3 is of the branch audio_visual; no
#: checkpoint was released.
DECODERS = {
    "videollama2": _MISTRAL,
    "videollama2_mistral": _MISTRAL,
    "mistral": _MISTRAL,
    "videollama2_mixtral": DecoderKind(system_turn=True, sparse=True),
    "videollama2_qwen2": DecoderKind(qkv_bias=True, window_flag="use_sliding_window"),
    "videollama2_phi3": DecoderKind(),
}
#: In the family, but with a decoder that is not built here.
UNSUPPORTED = {
    "videollama2_llama": "an unreleased Llama variant",
    "videollama2_gemma2": "an unreleased Gemma2 variant",
}
DEFAULT_NUM_FRAMES = 8
#: Temperature and top_p, set by the family's own inference over the checkpoint's (videollama2/__init__.py, mm_infer).
SAMPLING = (0.2, 0.9)
#: The longest answer (videollama2/__init__.py, mm_infer). A caption ends long before; the limit stops one that repeats.
MAX_NEW_TOKENS = 2048


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family."""
    kind = str(checkpoint.config.get("model_type"))
    return kind in UNSUPPORTED or (kind in DECODERS and (kind != "mistral" or "mm_vision_tower" in checkpoint.config))


def read_config(checkpoint: Checkpoint) -> CaptionerConfig:
    """Everything but the weights. Raises CheckpointError for what is missing, malformed or not supported."""
    fields = Fields(checkpoint.config, "config.json")
    kind = fields.text("model_type")
    if kind in UNSUPPORTED:
        raise CheckpointError(f"config.json: model_type {shown(kind)} ({UNSUPPORTED[kind]}) is not supported")
    known = DECODERS[kind]
    windowed = known.window_flag is None or fields.flag(known.window_flag, False)
    window = fields.integer("sliding_window") if windowed and fields.get("sliding_window") is not None else None
    decoder = read_decoder(fields, qkv_bias=known.qkv_bias, sliding_window=window, sparse=known.sparse)
    vision = _read_vision(checkpoint, fields)
    tower = checkpoint.tower_folder
    processor = f"{tower}/preprocessor_config.json" if tower else "preprocessor_config.json"
    connector = ConnectorConfig(
        kind=fields.text("mm_projector_type", "linear"),
        in_size=vision.hidden_size,
        out_size=decoder.hidden_size,
        grid=vision.grid,
    )
    parts = (tower_part(vision), *connector_parts(connector))
    sound = None
    if weights.has_audio(checkpoint):
        audio = _read_audio(checkpoint, fields, decoder.hidden_size)
        parts, sound = (*parts, audio_part(audio)), sound_plan(audio)
    return CaptionerConfig(
        family="videollama2",
        sampling=Sampling(rule="centered", count=fields.integer("num_frames", DEFAULT_NUM_FRAMES)),
        image=read_image_processing(checkpoint.json(processor) if tower else None, processor, vision),
        sound=sound,
        parts=parts,
        decoder=decoder,
        # The reference also stops where the tokenizer's eos appears in the text (KeywordsStoppingCriteria).
        generation=read_generation(checkpoint, MAX_NEW_TOKENS, prompt.eos_token_id(checkpoint), SAMPLING),
        prompts=prompt.layouts(checkpoint, system_turn=known.system_turn, audio=sound is not None),
    )


def _read_vision(checkpoint: Checkpoint, fields: Fields) -> VisionConfig:
    name = fields.text("mm_vision_tower")
    if fields.text("mm_vision_select_feature", "patch") != "patch":
        raise CheckpointError(f"config.json: mm_vision_select_feature {shown(fields.get('mm_vision_select_feature'))}")
    select_layer = fields.get("mm_vision_select_layer", -2)
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise CheckpointError(f"config.json: mm_vision_select_layer must be a whole number, not {shown(select_layer)}")
    return read_named_tower(checkpoint, name, select_layer)


def _read_audio(checkpoint: Checkpoint, fields: Fields, out_size: int) -> AudioConfig:
    """BEATs' dimensions are fixed in the reference's code; ``beats_config`` overrides them (in test checkpoints)."""
    beats, base = fields.child("beats_config") or Fields({}, "config.json: beats_config"), AudioConfig()
    fixed = {"layer_norm_first": False, "deep_norm": True, "gru_rel_pos": True, "relative_position_embedding": True}
    for key, needed in {**fixed, "activation_fn": "gelu", "conv_bias": False}.items():
        if beats.get(key, needed) != needed:
            raise CheckpointError(f"{beats.where}: {key} {shown(beats.get(key))} is not supported, only {needed!r}")
    config = AudioConfig(
        embed_dim=beats.integer("embed_dim", base.embed_dim),
        hidden_size=beats.integer("encoder_embed_dim", base.hidden_size),
        intermediate_size=beats.integer("encoder_ffn_embed_dim", base.intermediate_size),
        num_layers=beats.integer("encoder_layers", base.num_layers, maximum=MOST_LAYERS),
        num_heads=beats.integer("encoder_attention_heads", base.num_heads),
        conv_pos=beats.integer("conv_pos", base.conv_pos),
        conv_pos_groups=beats.integer("conv_pos_groups", base.conv_pos_groups),
        num_buckets=beats.integer("num_buckets", base.num_buckets, minimum=4),
        max_distance=beats.integer("max_distance", base.max_distance),
        patch_size=beats.integer("input_patch_size", base.patch_size),
        projector_kind=mlp_kind(checkpoint.tensors, weights.AUDIO_PROJECTOR),
        out_size=out_size,
    )
    check_heads(beats, config.hidden_size, config.num_heads)
    if config.hidden_size % config.conv_pos_groups or config.max_distance <= config.num_buckets // 4:
        raise CheckpointError(f"{beats.where}: its position embedding does not fit its width")
    return config
