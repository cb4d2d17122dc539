"""A LLaVA-Video checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 8)."""

from __future__ import annotations

from dataclasses import replace

from ...contract.pipeline import Sampling
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import CaptionerConfig, ConnectorConfig, DecoderConfig
from ..fields import Fields, shown
from ..hf_config import read_decoder, read_generation, read_image_processing, read_named_tower
from ..pooling import LineEnd, PoolConfig, PoolMode, projected_pool_part
from ..sources import mlp_kind
from ..vision import tower_part
from ..vocabulary import tokenizer_length
from . import prompt, weights

KNOWN_AS = "LLaVA-Video (llava_qwen)"
#: Frames of a clip at most, and of a second (the model card's ``load_video``); a checkpoint does not say.
MAX_FRAMES, FPS = 64, 1.0
#: The longest answer in the model card.
MAX_NEW_TOKENS = 4096
_LINE_ENDS: dict[prompt.Newline, LineEnd] = {"grid": "row", "frame": "frame"}
_POOLS: tuple[PoolMode, ...] = ("average", "max", "bilinear")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family."""
    return checkpoint.config.get("model_type") == "llava_qwen"


def read_config(checkpoint: Checkpoint) -> CaptionerConfig:
    """Everything but the weights. Raises CheckpointError for what is missing, malformed or not supported."""
    fields = Fields(checkpoint.config, "config.json")
    if fields.flag("add_faster_video", False):
        raise CheckpointError("config.json: add_faster_video (frames at two rates) is not supported")
    # SigLipVisionTower deletes its last layer and reads the hidden state after the rest, whatever
    # mm_vision_select_layer says: that of the whole tower before the last.
    vision = read_named_tower(checkpoint, fields.text("mm_vision_tower"), -2)
    if vision.kind != "siglip":
        raise CheckpointError("config.json: LLaVA-Video with a CLIP tower is not supported, only with SigLIP")
    decoder, newline = _read_decoder(checkpoint, fields), prompt.read_newline(fields)
    connector = ConnectorConfig(
        kind=mlp_kind(checkpoint.tensors, weights.PROJECTOR),
        in_size=vision.hidden_size,
        out_size=decoder.hidden_size,
        grid=vision.grid,
    )
    pool = PoolConfig(connector, _read_pool(fields), line_end=_LINE_ENDS.get(newline, "none"))
    forced = fields.flag("force_sample", False)
    return CaptionerConfig(
        family="llava_video",
        sampling=Sampling(rule="rate", count=MAX_FRAMES, fps=FPS, forced=forced),
        # The original's processor is code: no preprocessor file is read.
        image=read_image_processing(None, "config.json", vision),
        parts=(tower_part(vision), projected_pool_part(pool)),
        decoder=decoder,
        generation=read_generation(checkpoint, MAX_NEW_TOKENS, extra_eos=None),
        prompts=prompt.layouts(
            timed=fields.flag("add_time_instruction", False),
            newline=decoder.vocab_size if newline == "one_token" else None,
        ),
        default_instruction=prompt.INSTRUCTION,
    )


def _read_pool(fields: Fields) -> PoolMode:
    """The stride is always 2 in the original (``get_2dPool``): mm_spatial_pool_stride is not read."""
    mode = fields.text("mm_spatial_pool_mode")
    for known in _POOLS:
        if mode == known:
            return known
    raise CheckpointError(f"{fields.where}: mm_spatial_pool_mode {shown(mode)} is not one of {', '.join(_POOLS)}")


def _read_decoder(checkpoint: Checkpoint, fields: Fields) -> DecoderConfig:
    """Qwen2. The original sets rope_scaling to none, cuts the vocabulary to the tokenizer's and a prompt to its longest
    (builder.py ``load_pretrained_model``)."""
    windowed = fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None
    decoder = read_decoder(
        Fields({**fields.values, "rope_scaling": None}, fields.where),
        qkv_bias=True,
        sliding_window=fields.integer("sliding_window") if windowed else None,
    )
    if fields.flag("mm_use_im_start_end", False):
        raise CheckpointError(f"{fields.where}: mm_use_im_start_end (marks around the frames) is not supported")
    kept = tokenizer_length(checkpoint) + fields.flag("mm_use_im_patch_token", True)
    if kept > decoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {kept} tokens, but the embedding table has {decoder.vocab_size} rows"
        )
    longest = fields.integer("tokenizer_model_max_length", decoder.context_length)
    return replace(decoder, vocab_size=kept, context_length=min(decoder.context_length, longest))
