"""An InternVL2 checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 10)."""

from __future__ import annotations

from ...contract.pipeline import ImagePlan, Sampling
from ...contract.records import Generation
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import CaptionerConfig
from ..fields import MOST_LAYERS, Fields, shown
from ..hf_config import check_heads, read_decoder
from ..token_ids import token_id
from . import prompt
from .vision import SHUFFLE, TowerConfig, vision_parts

KNOWN_AS = "InternVL2 (internvl_chat with internlm2)"
MODEL_TYPE = "internvl_chat"
#: Frames and the longest answer of the model card's video example; a checkpoint does not say.
NUM_FRAMES = 8
MAX_NEW_TOKENS = 1024
#: torchvision's, as the model card and internvl/train/constants.py have them; preprocessor_config.json is not read.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family."""
    return checkpoint.config.get("model_type") == MODEL_TYPE


def read_config(checkpoint: Checkpoint) -> CaptionerConfig:
    """Everything but the weights. Raises CheckpointError for what is missing, malformed or not supported."""
    fields = Fields(checkpoint.config, "config.json")
    _require(fields, template="internlm2-chat", ps_version="v2", select_layer=-1, downsample_ratio=1 / SHUFFLE)
    language = _child(fields, "llm_config")
    _require(language, model_type="internlm2", bias=False)
    decoder = read_decoder(language, qkv_bias=False, sliding_window=None)
    tower = _read_tower(_child(fields, "vision_config"))
    if fields.get("force_image_size", tower.image_size) != tower.image_size:
        raise CheckpointError(
            f"config.json: force_image_size {shown(fields.get('force_image_size'))} is not the tower's "
            f"{tower.image_size}; other positions are not interpolated"
        )
    return CaptionerConfig(
        family="internvl2",
        sampling=Sampling(rule="segments", count=NUM_FRAMES),
        image=ImagePlan("exact", tower.image_size, tower.image_size, IMAGENET_MEAN, IMAGENET_STD),
        parts=vision_parts(tower, decoder.hidden_size),
        decoder=decoder,
        generation=_read_generation(checkpoint),
        prompts=prompt.layouts(language.integer("bos_token_id", 1, minimum=0)),
    )


def _read_tower(fields: Fields) -> TowerConfig:
    _require(fields, norm_type="layer_norm", qk_normalization=False, hidden_act="gelu", num_channels=3)
    config = TowerConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
        num_heads=fields.integer("num_attention_heads"),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6, 1e-12, 0.1),
        qkv_bias=fields.flag("qkv_bias"),
    )
    check_heads(fields, config.hidden_size, config.num_heads)
    if config.grid == 0 or config.image_size % config.patch_size or config.grid % SHUFFLE:
        raise CheckpointError(
            f"{fields.where}: {config.image_size} pixels in patches of {config.patch_size} do not give cells of "
            f"{SHUFFLE} by {SHUFFLE} patches"
        )
    return config


def _read_generation(checkpoint: Checkpoint) -> Generation:
    """``chat`` ends at ``<|im_end|>`` alone. What it leaves open are transformers' defaults: of
    ``generation_config.json`` it reads nothing, and only the longest answer and the penalty are read here."""
    end = token_id(checkpoint, prompt.END)
    if end is None:
        raise CheckpointError(f"{checkpoint.path}: its tokenizer's files name no id for {prompt.END}")
    fields = Fields(checkpoint.json("generation_config.json") or {}, "generation_config.json")
    return Generation(
        eos_token_ids=(end,),
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-2, 100.0),
        max_new_tokens=fields.integer("max_new_tokens", MAX_NEW_TOKENS, maximum=1 << 17),
    )


def _child(fields: Fields, key: str) -> Fields:
    found = fields.child(key)
    if found is None:
        raise CheckpointError(f"{fields.where}: {key} is missing")
    return found


def _require(fields: Fields, **values: object) -> None:
    """Refuse a value that the reference's other branches are for; a key that is absent has its only value."""
    for key, value in values.items():
        if fields.get(key, value) != value:
            raise CheckpointError(f"{fields.where}: {key} {shown(fields.get(key))} is not supported, only {value!r}")
