"""Random checkpoints in the released layouts of VideoLLaMA 2 and 2.1 (docs/facts.md 1.1 to 1.4, 1.7).

Names, shapes and files are those of the releases: sharded safetensors with an index; the vision tower's unused last
layer, norm and head; generation defaults. Where there is an audio tower, it and its projector are both inside the
shards and beside them as bf16 pickles, the pickle holding the tied table of relative positions once (which brings
``audio_tower.bin`` within 405 of the released 181,514,532 bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config import AudioConfig, DecoderConfig, VisionConfig
from ..random_files import (
    ENDOFTEXT,
    IM_END,
    MISTRAL_TEMPLATE,
    as_json,
    llama_files,
    qwen2_files,
    qwen2_generation,
    tower_files,
)
from ..random_layout import (
    Layout,
    RandomTensor,
    Size,
    decoder_body,
    decoder_head,
    layer,
    mlp,
    norm,
    siglip,
    tensor,
    vision_tower,
)

PREDICTOR_CLASSES = 527
"""AudioSet classes of BEATs' unused predictor."""

_ARCHITECTURES = {
    "videollama2_mistral": "Videollama2MistralForCausalLM",
    "videollama2_mixtral": "Videollama2MixtralForCausalLM",
    "videollama2_qwen2": "Videollama2Qwen2ForCausalLM",
}


@dataclass(frozen=True)
class Videollama2Size(Size):
    """Dimensions of one random checkpoint.

    ``vision_tower`` is what ``mm_vision_tower`` says: a hub name, or a folder that is then written with the tower's
    config. ``std`` is the spread of the decoder's weights (transformers' ``initializer_range``); everywhere else it is
    1 / sqrt(inputs). ``first_special_id`` is the id of Qwen2's ``<|endoftext|>``; ``None`` puts it after the other
    tokens. ``shard_bytes`` is the most a shard holds. Without ``audio_in_shards`` the audio tensors are only in the two
    pickles beside the shards.
    """

    vision: VisionConfig
    vision_tower: str
    num_frames: int
    audio: AudioConfig | None = None
    model_type: Literal["videollama2_mistral", "videollama2_mixtral", "videollama2_qwen2"] = "videollama2_qwen2"
    connector: Literal["stc_connector", "stc_connector_v35"] = "stc_connector_v35"
    std: float = 0.02
    first_special_id: int | None = 151643
    shard_bytes: int = 5_000_000_000
    audio_in_shards: bool = True

    def layout(self) -> Layout:
        """Every tensor of the released layout."""
        body = [
            *decoder_body(self.decoder, self.std),
            *vision_tower(self.vision, "model.vision_tower.vision_tower.vision_model"),
            *_connector(self.vision.hidden_size, self.decoder.hidden_size),
        ]
        pickles: dict[str, Sequence[RandomTensor]] = {}
        if self.audio is not None:
            audio, projector = list(_audio_tower(self.audio)), list(_audio_projector(self.audio))
            body += [*audio, *projector] if self.audio_in_shards else []
            # The pickle was made of named parameters, where a table that all layers share appears under its first name.
            named = [each for each in audio if each.seeded_as == each.name]
            pickles = {"audio_tower.bin": named, "mm_projector_a.bin": projector}
        return Layout({"": [*body, *decoder_head(self.decoder, self.std)]}, self.shard_bytes, pickles)

    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """Configs and tokenizer, by name (docs/facts.md 1.1, 1.7)."""
        if self.model_type == "videollama2_qwen2":
            files, ids = qwen2_files(self.first_special_id, self.decoder.vocab_size, text)
            bos, eos = ids[ENDOFTEXT], ids[IM_END]
            generation = qwen2_generation(bos, eos) | {"transformers_version": "4.42.3"}
        else:
            files, bos, eos = llama_files(self.decoder.vocab_size, text, MISTRAL_TEMPLATE), 1, 2
            generation = {"bos_token_id": bos, "eos_token_id": eos, "transformers_version": "4.42.3"}
        files |= {"config.json": as_json(self._config(bos, eos)), "generation_config.json": as_json(generation)}
        return files | ({} if "/" in self.vision_tower else tower_files(self.vision_tower, self.vision))

    def _config(self, bos: int, eos: int) -> dict[str, Any]:
        d, v = self.decoder, self.vision
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "hidden_act": "silu",
            "hidden_size": d.hidden_size,
            "image_aspect_ratio": "pad",
            "initializer_range": self.std,
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.context_length,
            "mm_hidden_size": v.hidden_size,
            "mm_projector_type": self.connector,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": v.select_layer,
            "mm_vision_tower": self.vision_tower,
            "model_type": self.model_type,
            "num_attention_heads": d.num_heads,
            "num_frames": self.num_frames,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_theta": d.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": d.tie_embeddings,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "use_mm_proj": True,
            "vocab_size": d.vocab_size,
        }
        if self.model_type == "videollama2_qwen2":
            config |= {"max_window_layers": 28, "sliding_window": d.context_length, "use_sliding_window": False}
        if d.num_experts:
            config |= {"num_experts_per_tok": d.experts_per_token, "num_local_experts": d.num_experts}
        if self.audio is not None:
            config |= {
                "hidden_size_a": d.hidden_size,
                "mm_audio_tower": "audio_tower.bin",
                "mm_hidden_size_a": self.audio.hidden_size,
                "mm_projector_a_type": self.audio.projector_kind,
            }
        return dict(sorted(config.items())) | _beats_config(self.audio)


def _beats_config(a: AudioConfig | None) -> dict[str, Any]:
    """Dimensions of BEATs that are not the released ones. The release has no such key: they are fixed in its code."""
    if a is None or a == AudioConfig(out_size=a.out_size):
        return {}
    dimensions = {
        "encoder_layers": a.num_layers,
        "embed_dim": a.embed_dim,
        "encoder_embed_dim": a.hidden_size,
        "encoder_ffn_embed_dim": a.intermediate_size,
        "encoder_attention_heads": a.num_heads,
        "conv_pos": a.conv_pos,
        "conv_pos_groups": a.conv_pos_groups,
        "input_patch_size": a.patch_size,
        "finetuned_model": True,
        "predictor_class": PREDICTOR_CLASSES,
    }
    return {"beats_config": dimensions}


def _connector(in_size: int, hidden: int) -> Iterator[RandomTensor]:
    """stc_connector and stc_connector_v35, which have the same tensors. The squeeze of a block's gate is a quarter of
    the block's input channels, rounded."""
    root = "model.mm_projector"
    for stage, narrow in (("s1", in_size), ("s2", hidden)):
        for number in range(1, 5):
            block, width = f"{root}.{stage}.b{number}", narrow if number == 1 else hidden
            squeeze = round(width * 0.25)
            for name, shape in (("conv1", (width, 1, 1)), ("conv2", (1, 3, 3)), ("conv3", (hidden, 1, 1))):
                yield from layer(f"{block}.{name}.conv", hidden, *shape, bias=False)
                yield from norm(f"{block}.{name}.bn", hidden)
            yield from layer(f"{block}.se.fc1", squeeze, hidden, 1, 1)
            yield from layer(f"{block}.se.fc2", hidden, squeeze, 1, 1)
            if width != hidden:
                yield from layer(f"{block}.downsample.conv", hidden, width, 1, 1, bias=False)
                yield from norm(f"{block}.downsample.bn", hidden)
    yield from layer(f"{root}.sampler.0", hidden, hidden, 2, 2, 2)
    yield from mlp(f"{root}.readout", hidden, hidden, hidden)


def _audio_tower(a: AudioConfig) -> Iterator[RandomTensor]:
    root, width, inner = "model.audio_tower", a.hidden_size, a.intermediate_size
    yield from layer(f"{root}.patch_embedding", a.embed_dim, 1, a.patch_size, a.patch_size, bias=False)
    yield from norm(f"{root}.layer_norm", a.embed_dim)
    yield from layer(f"{root}.post_extract_proj", width, a.embed_dim)
    kernel = (width, width // a.conv_pos_groups, a.conv_pos)
    spread = 1 / math.sqrt(kernel[1] * kernel[2])
    yield tensor(f"{root}.encoder.pos_conv.0.bias", width, std=0.02)
    # The gain is the norm of one kernel tap, here that of weights with the spread of any other layer.
    gain = spread * math.sqrt(kernel[0] * kernel[1])
    yield tensor(f"{root}.encoder.pos_conv.0.weight_g", 1, 1, a.conv_pos, std=0.1 * gain, mean=gain)
    yield tensor(f"{root}.encoder.pos_conv.0.weight_v", *kernel, std=spread)
    yield from norm(f"{root}.encoder.layer_norm", width)
    table = "self_attn.relative_attention_bias.weight"
    for i in range(a.num_layers):
        at = f"{root}.encoder.layers.{i}"
        for name in ("k", "v", "q", "out"):
            yield from layer(f"{at}.self_attn.{name}_proj", width, width)
        yield from layer(f"{at}.self_attn.grep_linear", 8, width // a.num_heads)
        yield tensor(f"{at}.self_attn.grep_a", 1, a.num_heads, 1, 1, std=0.1, mean=1.0)
        first = f"{root}.encoder.layers.0.{table}"
        yield tensor(f"{at}.{table}", a.num_buckets, a.num_heads, std=0.5, seeded_as=first)
        yield from norm(f"{at}.self_attn_layer_norm", width)
        yield from layer(f"{at}.fc1", inner, width)
        yield from layer(f"{at}.fc2", width, inner)
        yield from norm(f"{at}.final_layer_norm", width)
    yield from layer(f"{root}.predictor", PREDICTOR_CLASSES, width)


def _audio_projector(a: AudioConfig) -> Iterator[RandomTensor]:
    return mlp("model.mm_projector_a", a.hidden_size, a.out_size, a.out_size)


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, context: int, tie: bool = False
) -> DecoderConfig:
    dim = hidden // heads
    return DecoderConfig(
        hidden, intermediate, layers, heads, kv, dim, vocab, 1e-6, 1e6, context, qkv_bias=True, tie_embeddings=tie
    )


def _mixtral(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, experts: int
) -> DecoderConfig:
    dim = hidden // heads
    return DecoderConfig(
        hidden,
        intermediate,
        layers,
        heads,
        kv,
        dim,
        vocab,
        1e-5,
        1e6,
        32768,
        num_experts=experts,
        experts_per_token=2,
    )


_CLIP_LARGE = VisionConfig("clip", 1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu")
_CLIP_NAME = "openai/clip-vit-large-patch14-336"

SIZES = {
    # VideoLLaMA2.1-7B-AV, every dimension.
    "7b": Videollama2Size(
        decoder=_qwen2(3584, 18944, 28, 28, 4, 152064, 32768),
        vision=siglip(1152, 4304, 27, 16, 384, 14),
        audio=AudioConfig(),
        vision_tower="google/siglip-so400m-patch14-384",
        num_frames=16,
    ),
    # The decoder of Qwen2-0.5B (tied embeddings included) behind small towers: 6 layers of 384 each at 224 pixels and
    # patch 16, 4 layers of 384 for sound, 8 frames.
    "0.5b": Videollama2Size(
        decoder=_qwen2(896, 4864, 24, 14, 2, 151936, 32768, tie=True),
        vision=siglip(384, 1536, 6, 6, 224, 16),
        audio=AudioConfig(256, 384, 1536, 4, 6, out_size=896),
        vision_tower="small-siglip",
        num_frames=8,
        shard_bytes=500_000_000,
    ),
    # A few MB: the dimensions of the tests' fixture. The vocabulary is set to what its tokenizer has.
    "tiny": Videollama2Size(
        decoder=_qwen2(128, 256, 3, 4, 2, 320, 4096),
        vision=siglip(64, 128, 3, 4, 70, 14),
        audio=AudioConfig(64, 96, 192, 2, 4, conv_pos=16, conv_pos_groups=4, out_size=128),
        vision_tower="tiny-siglip",
        num_frames=8,
        std=0.1,
        first_special_id=None,
        shard_bytes=2_000_000,
    ),
    # VideoLLaMA2-7B-16F.
    "videollama2-7b": Videollama2Size(
        decoder=DecoderConfig(4096, 14336, 32, 32, 8, 128, 32000, 1e-5, 1e6, 32768),
        vision=_CLIP_LARGE,
        vision_tower=_CLIP_NAME,
        num_frames=16,
        model_type="videollama2_mistral",
        connector="stc_connector",
    ),
    # VideoLLaMA2-8x7B. 95 GB.
    "videollama2-8x7b": Videollama2Size(
        decoder=_mixtral(4096, 14336, 32, 32, 8, 32000, 8),
        vision=_CLIP_LARGE,
        vision_tower=_CLIP_NAME,
        num_frames=8,
        model_type="videollama2_mixtral",
        connector="stc_connector",
    ),
    # Its layers in a few MB.
    "videollama2-moe-tiny": Videollama2Size(
        decoder=_mixtral(128, 192, 3, 4, 2, 320, 4),
        vision=VisionConfig("clip", 64, 128, 3, 4, 56, 14, 1e-5, "quick_gelu"),
        vision_tower="tiny-clip",
        num_frames=8,
        model_type="videollama2_mixtral",
        connector="stc_connector",
        std=0.1,
        shard_bytes=2_000_000,
    ),
    # VideoLLaMA2-72B: Qwen2-72B behind the tower and the connector of the other 2.0 models. 152 GB.
    "videollama2-72b": Videollama2Size(
        decoder=_qwen2(8192, 29568, 80, 64, 8, 152064, 32768),
        vision=_CLIP_LARGE,
        vision_tower=_CLIP_NAME,
        num_frames=8,
        connector="stc_connector",
    ),
}
