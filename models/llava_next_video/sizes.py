"""Random checkpoints in LLaVA-NeXT-Video's released layout (docs/facts.md 9.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from ..config import DecoderConfig, VisionConfig
from ..random_files import as_json, image_processor, llama_files, tower_config
from ..random_layout import Layout, Size, decoder_body, decoder_head, layer, tensor, vision_tower
from .prompt import TAG
from .weights import LANGUAGE, NEWLINE, PROJECTOR, VISION

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class LlavaNextVideoSize(Size):
    """Dimensions of one random checkpoint. ``std`` is the spread of the decoder's weights; everywhere else it is
    1 / sqrt(inputs). ``shard_bytes`` is the most a shard holds."""

    vision: VisionConfig
    std: float = 0.02
    shard_bytes: int = 5_000_000_000

    def layout(self) -> Layout:
        """Every tensor of the released layout."""
        wide = self.decoder.hidden_size
        tensors = [
            tensor(NEWLINE, wide, std=wide**-0.5),
            *decoder_body(self.decoder, self.std, f"{LANGUAGE}model"),
            *decoder_head(self.decoder, self.std, f"{LANGUAGE}lm_head"),
            *layer(f"{PROJECTOR}linear_1", wide, self.vision.hidden_size),
            *layer(f"{PROJECTOR}linear_2", wide, wide),
            *vision_tower(self.vision, VISION.rstrip(".")),
        ]
        return Layout({"": tensors}, self.shard_bytes)

    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """Configs and tokenizer, by name."""
        d = self.decoder
        files = llama_files(d.vocab_size - 2, text)
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        tokenizer.add_special_tokens([AddedToken(tag, normalized=False, special=True) for tag in (TAG, IMAGE_TAG)])
        decoder = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            # Before scaling.
            "max_position_embeddings": int(d.context_length / d.rope_factor),
            "model_type": "llama",
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_scaling": {"factor": d.rope_factor, "type": "linear"},
            "rope_theta": d.rope_theta,
            "type": "linear",
            "vocab_size": d.vocab_size,
        }
        config = {
            "architectures": ["LlavaNextVideoForConditionalGeneration"],
            "image_token_index": tokenizer.token_to_id(IMAGE_TAG),
            "model_type": "llava_next_video",
            "projector_hidden_act": "gelu",
            "spatial_pool_mode": "average",
            "spatial_pool_stride": 2,
            "text_config": decoder,
            "tie_word_embeddings": d.tie_embeddings,
            "torch_dtype": "bfloat16",
            "video_token_index": tokenizer.token_to_id(TAG),
            "vision_config": json.loads(tower_config(self.vision)),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
        return files | {
            "tokenizer.json": tokenizer.to_str(),
            "config.json": as_json(config),
            "generation_config.json": as_json({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
            "preprocessor_config.json": image_processor(self.vision),
        }


SIZES = {
    # LLaVA-NeXT-Video-7B: Vicuna 1.5 7B behind CLIP ViT-L/14 at 336 pixels.
    "llava-next-video-7b": LlavaNextVideoSize(
        decoder=DecoderConfig(4096, 11008, 32, 32, 32, 128, 32064, 1e-5, 1e4, 10240, rope_factor=2.5),
        vision=VisionConfig("clip", 1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu"),
    ),
    # Half a billion parameters: the width and depth of Qwen2-0.5B, a tower of 6 layers of 384 at 224 pixels.
    "llava-next-video-0.5b": LlavaNextVideoSize(
        decoder=DecoderConfig(896, 4864, 24, 14, 14, 64, 32064, 1e-5, 1e4, 10240, rope_factor=2.5),
        vision=VisionConfig("clip", 384, 1536, 6, 6, 224, 16, 1e-5, "quick_gelu"),
        shard_bytes=500_000_000,
    ),
    # A few MB.
    "llava-next-video-tiny": LlavaNextVideoSize(
        decoder=DecoderConfig(128, 256, 3, 4, 4, 32, 336, 1e-5, 1e4, 10240, rope_factor=2.5),
        vision=VisionConfig("clip", 64, 128, 3, 4, 70, 14, 1e-5, "quick_gelu"),
        std=0.1,
        shard_bytes=2_000_000,
    ),
}
