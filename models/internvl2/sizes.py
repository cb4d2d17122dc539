"""Random checkpoints in InternVL2's released layout (docs/facts.md 10.1, 10.2), with a tokenizer of our own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import DecoderConfig
from ..random_files import as_json, byte_level_bpe
from ..random_layout import Layout, RandomTensor, Size, layer, norm, tensor
from .prompt import END
from .vision import SHUFFLE, TowerConfig

BOS, EOS = "<s>", "</s>"
#: In the order of the release, where ``<|im_end|>`` is 92542; its BOS and EOS are 1 and 2.
SPECIALS = (BOS, EOS, END, "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
_RELEASED = 92540


@dataclass(frozen=True)
class Internvl2Size(Size):
    """Dimensions of one random checkpoint.

    ``std`` is the spread of the decoder's weights; everywhere else it is 1 / sqrt(inputs). ``first_special_id`` is the
    id of the first of ``SPECIALS``; ``None`` puts them after the other tokens. ``shard_bytes`` is the most a shard
    holds.
    """

    tower: TowerConfig
    std: float = 0.02
    first_special_id: int | None = _RELEASED
    shard_bytes: int = 5_000_000_000

    def layout(self) -> Layout:
        """Every tensor of the released layout."""
        body = [*_tower(self.tower), *_decoder(self.decoder, self.std)]
        joined, wide = SHUFFLE**2 * self.tower.hidden_size, self.decoder.hidden_size
        projector = [*norm("mlp1.0", joined), *layer("mlp1.1", wide, joined), *layer("mlp1.3", wide, wide)]
        return Layout({"": [*body, *projector]}, self.shard_bytes)

    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """Configs and tokenizer, by name."""
        d, v = self.decoder, self.tower
        tokenizer, ids = byte_level_bpe(SPECIALS, self.first_special_id, d.vocab_size, text)
        language = {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "hidden_act": "silu",
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.context_length,
            "model_type": "internlm2",
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": d.rope_theta,
            "tie_word_embeddings": d.tie_embeddings,
            "vocab_size": d.vocab_size,
        }
        vision = {
            "hidden_act": "gelu",
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": v.num_heads,
            "num_channels": 3,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
            "qk_normalization": False,
            "qkv_bias": v.qkv_bias,
        }
        config = {
            "architectures": ["InternVLChatModel"],
            "downsample_ratio": 1 / SHUFFLE,
            "force_image_size": v.image_size,
            "llm_config": language,
            "model_type": "internvl_chat",
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internlm2-chat",
            "torch_dtype": "bfloat16",
            "vision_config": vision,
        }
        return {
            "config.json": as_json(config),
            "generation_config.json": as_json({"eos_token_id": [ids[END], ids["<|im_start|>"]]}),
            "tokenizer.json": tokenizer,
            "added_tokens.json": as_json(ids),
            "special_tokens_map.json": as_json({"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}),
        }


def _tower(v: TowerConfig) -> Iterator[RandomTensor]:
    root, width, inner = "vision_model", v.hidden_size, v.intermediate_size
    yield tensor(f"{root}.embeddings.class_embedding", 1, 1, width, std=0.02)
    yield tensor(f"{root}.embeddings.position_embedding", 1, v.grid**2 + 1, width, std=0.02)
    yield from layer(f"{root}.embeddings.patch_embedding", width, 3, v.patch_size, v.patch_size)
    for i in range(v.num_layers):
        at = f"{root}.encoder.layers.{i}"
        yield from layer(f"{at}.attn.qkv", 3 * width, width, bias=v.qkv_bias)
        yield from layer(f"{at}.attn.proj", width, width)
        yield from layer(f"{at}.mlp.fc1", inner, width)
        yield from layer(f"{at}.mlp.fc2", width, inner)
        for name in ("norm1", "norm2"):
            yield from norm(f"{at}.{name}", width)
        for name in ("ls1", "ls2"):
            yield tensor(f"{at}.{name}", width, std=0.02, mean=1 / math.sqrt(v.num_layers))


def _decoder(d: DecoderConfig, std: float) -> Iterator[RandomTensor]:
    root, wide, inner = "language_model.model", d.hidden_size, d.intermediate_size
    yield tensor(f"{root}.tok_embeddings.weight", d.vocab_size, wide, std=std)
    for i in range(d.num_layers):
        at = f"{root}.layers.{i}"
        rows = (d.num_heads + 2 * d.num_kv_heads) * d.head_dim
        shapes = {
            "attention.wqkv": (rows, wide),
            "attention.wo": (wide, d.num_heads * d.head_dim),
            "feed_forward.w1": (inner, wide),
            "feed_forward.w3": (inner, wide),
            "feed_forward.w2": (wide, inner),
        }
        for name, shape in shapes.items():
            yield from layer(f"{at}.{name}", *shape, std=std, bias=False)
        for name in ("attention_norm", "ffn_norm"):
            yield from norm(f"{at}.{name}", wide, bias=False)
    yield from norm(f"{root}.norm", wide, bias=False)
    if not d.tie_embeddings:
        yield tensor("language_model.output.weight", d.vocab_size, wide, std=std)


SIZES = {
    # InternVL2-8B: InternLM2.5-7B behind InternViT-300M.
    "internvl2-8b": Internvl2Size(
        decoder=DecoderConfig(4096, 14336, 32, 32, 8, 128, 92553, 1e-5, 1e6, 32768),
        tower=TowerConfig(1024, 4096, 24, 16, 448, 14, 1e-6, qkv_bias=True),
    ),
    # The width and depth of Qwen2-0.5B behind a tower of 6 layers of 384 at 224 pixels.
    "internvl2-0.5b": Internvl2Size(
        decoder=DecoderConfig(896, 4864, 24, 14, 2, 64, 92553, 1e-5, 1e6, 32768),
        tower=TowerConfig(384, 1536, 6, 6, 224, 14, 1e-6, qkv_bias=True),
        shard_bytes=500_000_000,
    ),
    # A few MB: the dimensions of the tests' fixture.
    "internvl2-tiny": Internvl2Size(
        decoder=DecoderConfig(64, 128, 3, 4, 2, 16, 324, 1e-5, 1e6, 32768),
        tower=TowerConfig(48, 96, 3, 3, 84, 14, 1e-6, qkv_bias=True),
        std=0.1,
        first_special_id=None,
        shard_bytes=500_000,
    ),
}
