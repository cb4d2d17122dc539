"""transformers' JSON (``config.json``, ``preprocessor_config.json``, ``generation_config.json``) to our records."""

from __future__ import annotations

from typing import Any

from ..contract.pipeline import ImagePlan
from ..contract.records import Generation
from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .config import DecoderConfig, VisionConfig
from .fields import MOST_EXPERTS, MOST_LAYERS, Fields, shown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

#: What transformers' CLIPVisionConfig and SiglipVisionConfig take for keys that a config.json leaves out.
_TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip": {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
_TOWER_KINDS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}

#: What an epsilon of a norm may be; released models have 1e-6 and 1e-5.
_EPSILON = {"least": 1e-12, "most": 0.1}

_MOST_NEW_TOKENS = 1 << 17

#: Vision towers that released checkpoints name by their hub name without shipping the tower's config (docs/facts.md
#: 1.2, 2.4).
BUILTIN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "apple/DFN5B-CLIP-ViT-H-14-378": {
        "model_type": "clip_vision_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 378,
        "patch_size": 14,
    },
}


def builtin_tower(name: str) -> Fields | None:
    """The built-in config of a tower by its hub name, also where a fine-tune wrote a local path that ends in it."""
    for known, values in BUILTIN_TOWERS.items():
        if name == known or name.rstrip("/").rpartition("/")[2] == known.rpartition("/")[2]:
            return Fields(values, f"vision tower {known}")
    return None


def read_named_tower(checkpoint: Checkpoint, name: str, select_layer: int) -> VisionConfig:
    """The tower that a checkpoint names (``mm_vision_tower``): of a folder inside it, or a built-in one."""
    folder = checkpoint.tower_folder
    local = checkpoint.json(f"{folder}/config.json") if folder else None
    tower = Fields(local, f"{folder}/config.json") if local is not None else builtin_tower(name)
    if tower is None:
        raise CheckpointError(
            f"config.json: vision tower {shown(name)} is not known; put its config.json and weights in a folder of "
            "that name inside the checkpoint"
        )
    return read_vision(tower, select_layer)


def read_vision(fields: Fields, select_layer: int = -2, keep: float | None = None) -> VisionConfig:
    """A CLIP or SigLIP tower's config.json, bare or under ``vision_config``."""
    kind = _TOWER_KINDS.get(fields.text("model_type"))
    if kind is None:
        raise CheckpointError(
            f"{fields.where}: vision tower {shown(fields.get('model_type'))} is neither CLIP nor SigLIP"
        )
    inner = fields.child("vision_config") or fields
    inner = Fields({**_TOWER_DEFAULTS[kind], **{k: v for k, v in inner.values.items() if v is not None}}, inner.where)
    hidden_act = inner.text("hidden_act")
    if hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise CheckpointError(f"{inner.where}: hidden_act {shown(hidden_act)} is not supported")
    if inner.integer("num_channels", 3) != 3:
        raise CheckpointError(f"{inner.where}: num_channels {inner.get('num_channels')} is not supported, only 3")
    config = VisionConfig(
        kind="clip" if kind == "clip" else "siglip",
        hidden_size=inner.integer("hidden_size", 768),
        intermediate_size=inner.integer("intermediate_size", 3072),
        num_layers=inner.integer("num_hidden_layers", 12, maximum=MOST_LAYERS),
        num_heads=inner.integer("num_attention_heads", 12),
        image_size=inner.integer("image_size"),
        patch_size=inner.integer("patch_size"),
        layer_norm_eps=inner.number("layer_norm_eps", **_EPSILON),
        hidden_act=hidden_act,
        select_layer=select_layer,
        keep=keep,
    )
    check_heads(inner, config.hidden_size, config.num_heads)
    if config.grid < 1:
        raise CheckpointError(f"{inner.where}: image_size {config.image_size} is smaller than one patch")
    if not 1 <= config.num_used_layers <= config.num_layers:
        raise CheckpointError(f"hidden state {select_layer} does not exist in a tower of {config.num_layers} layers")
    return config


def check_heads(fields: Fields, hidden_size: int, num_heads: int) -> None:
    """Raise CheckpointError unless the heads share the width evenly."""
    if hidden_size % num_heads:
        raise CheckpointError(f"{fields.where}: hidden_size {hidden_size} does not divide into {num_heads} heads")


def read_image_processing(values: dict[str, Any] | None, where: str, vision: VisionConfig) -> ImagePlan:
    """A CLIP or SigLIP ``preprocessor_config.json``; where there is none, the tower kind's released processor."""
    size = vision.image_size
    if values is None:
        if vision.kind == "clip":
            return ImagePlan("shortest_edge", size, size, CLIP_MEAN, CLIP_STD)
        return ImagePlan("exact", size, size, SIGLIP_MEAN, SIGLIP_STD)
    fields = Fields(values, where)
    for key, needed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if fields.get(key, needed) != needed:
            raise CheckpointError(f"{where}: {key} {shown(fields.get(key))} is not supported, only {needed!r}")
    # transformers' CLIP processor crops unless told otherwise, its SigLIP processor has no crop.
    crops = fields.flag("do_center_crop", vision.kind == "clip")
    edge = fields.get("size", size)
    if isinstance(edge, dict):
        sides = Fields(edge, f"{where}: size")
        shortest = sides.get("shortest_edge") is not None
        edge = sides.integer("shortest_edge" if shortest else "height")
        if not shortest and sides.integer("width") != edge:
            raise CheckpointError(f"{where}: size is not square")
    else:
        shortest, edge = crops, fields.integer("size", size)
    crop = fields.get("crop_size", size)
    if isinstance(crop, dict):
        sides = Fields(crop, f"{where}: crop_size")
        crop = sides.integer("height")
        if sides.integer("width") != crop:
            raise CheckpointError(f"{where}: crop_size is not square")
    if shortest != crops or (crop if crops else edge) != size or (crops and edge < size):
        raise CheckpointError(f"{where}: its size and crop do not give the tower's {size} x {size} pixels")
    mean = _triple(fields, "image_mean", CLIP_MEAN if vision.kind == "clip" else SIGLIP_MEAN)
    std = _triple(fields, "image_std", CLIP_STD if vision.kind == "clip" else SIGLIP_STD)
    if min(std) < 1e-3:
        raise CheckpointError(f"{where}: image_std must be above 0, not {shown(list(std))}")
    return ImagePlan("shortest_edge" if shortest else "exact", edge, size, mean, std)


def _triple(fields: Fields, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = fields.get(key, default)
    numbers = isinstance(value, (list, tuple)) and all(type(v) in (int, float) and abs(v) <= 1e3 for v in value)
    if not numbers or len(value) != 3:
        raise CheckpointError(f"{fields.where}: {key} must be three numbers (colours are 0 to 1), not {shown(value)}")
    return float(value[0]), float(value[1]), float(value[2])


def read_decoder(fields: Fields, *, qkv_bias: bool, sliding_window: int | None, sparse: bool = False) -> DecoderConfig:
    """A Llama, Mistral, Mixtral (``sparse``) or Qwen2 config.json.

    ``sliding_window``: the window, where the checkpoint has one on.
    """
    if fields.get("quantization_config") is not None:
        raise CheckpointError(f"{fields.where}: an already quantized checkpoint is not read; give the original one")
    if fields.text("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{fields.where}: hidden_act {shown(fields.get('hidden_act'))} is not supported, only 'silu'"
        )
    for key in ("mlp_bias", "attention_bias"):
        if fields.flag(key, False):
            raise CheckpointError(f"{fields.where}: {key} is not supported")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{fields.where}: {num_heads} heads do not share {num_kv_heads} key/value heads evenly")
    if fields.get("head_dim") is None:
        check_heads(fields, hidden_size, num_heads)
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2 or head_dim > 512:
        raise CheckpointError(f"{fields.where}: head size {head_dim} is not supported (even, at most 512)")
    longest = 1 << 20
    context = fields.integer("max_position_embeddings", maximum=longest)
    scaling, factor = _rope_scaling(fields)
    if scaling != "dynamic":
        # A vicuna-16k config may hold the length before scaling there and the real one in max_sequence_length.
        context = max(context, fields.integer("max_sequence_length", 1, maximum=longest))
    num_experts, experts_per_token = _experts(fields) if sparse else (0, 0)
    rope = fields.child("rope_parameters") or fields  # where transformers 5 keeps rope_theta
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, **_EPSILON),
        rope_theta=rope.number("rope_theta", 10000.0, least=1.0, most=1e12),
        context_length=context if sliding_window is None else min(context, sliding_window),
        rope_factor=factor,
        qkv_bias=qkv_bias,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )


def _experts(fields: Fields) -> tuple[int, int]:
    """How many experts a layer has and how many a token gets; the defaults are those of transformers' MixtralConfig."""
    experts = fields.integer("num_local_experts", 8, maximum=MOST_EXPERTS)
    chosen = fields.integer("num_experts_per_tok", 2)
    if chosen > experts:
        raise CheckpointError(f"{fields.where}: a token cannot get {chosen} of {experts} experts")
    return experts, chosen


def _rope_scaling(fields: Fields) -> tuple[str, float]:
    """Its kind, and what positions are divided by.

    ``dynamic`` changes angles only beyond max_position_embeddings, and our context ends there: it divides by 1.
    """
    scaling = fields.child("rope_scaling") or fields.child("rope_parameters")
    if scaling is None:
        return "default", 1.0
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind in ("default", "dynamic"):
        return kind, 1.0
    if kind != "linear":
        raise CheckpointError(f"{scaling.where}: type {shown(kind)} is not supported, only 'linear' and 'dynamic'")
    return kind, scaling.number("factor", least=1e-3, most=1e6)


def read_generation(
    checkpoint: Checkpoint,
    max_new_tokens: int,
    extra_eos: int | None,
    sampling: tuple[float, float] | None = None,
) -> Generation:
    """``generation_config.json`` with ``config.json`` for what it lacks.

    ``max_new_tokens``: the longest caption where the checkpoint does not say, as the family's own inference has it.
    ``sampling``: temperature and top_p where the family's own inference code sets them over the checkpoint's.
    ``extra_eos``: a further token that ends the text.
    """
    config = Fields(checkpoint.config, "config.json")
    values = checkpoint.json("generation_config.json")
    fields = Fields(values or {}, "generation_config.json")
    eos = fields.get("eos_token_id", config.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in eos):
        raise CheckpointError(
            f"eos_token_id must be token ids, not {shown(eos)} (generation_config.json or config.json)"
        )
    if extra_eos is not None and extra_eos not in eos:
        eos = [*eos, extra_eos]
    defaults = Generation(eos_token_ids=tuple(eos))
    if sampling is None:
        temperature = _share(fields, "temperature", defaults.temperature, 100.0)
        sampling = (temperature, _share(fields, "top_p", defaults.top_p, 1.0))
    return Generation(
        eos_token_ids=tuple(eos),
        repetition_penalty=fields.number("repetition_penalty", 1.0, least=1e-2, most=100.0),
        # transformers' own default, which holds whenever the file does not set another.
        top_k=fields.integer("top_k", 50, minimum=0),
        max_new_tokens=fields.integer("max_new_tokens", max_new_tokens, maximum=_MOST_NEW_TOKENS),
        temperature=sampling[0],
        top_p=sampling[1],
    )


def _share(fields: Fields, key: str, default: float, most: float) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise CheckpointError(f"{fields.where}: {key} must be a number from 0 to {most:g}, not {shown(value)}")
    # 0 is how some files say "greedy"; it is no temperature to sample at.
    return float(value) or default
