"""Random checkpoints in AuroraCap's released layout (docs/facts.md 2.4): a Llama, with the folders ``visual_encoder``
and ``projector`` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DecoderConfig, VisionConfig
from ..random_files import as_json, image_processor, llama_files, tower_config
from ..random_layout import Layout, Size, decoder_body, decoder_head, mlp, vision_tower


@dataclass(frozen=True)
class AuroracapSize(Size):
    """Dimensions of one random checkpoint. ``std`` is the spread of the decoder's weights; everywhere else it is
    1 / sqrt(inputs). ``shard_bytes`` is the most a shard holds."""

    vision: VisionConfig
    std: float = 0.02
    shard_bytes: int = 5_000_000_000

    def layout(self) -> Layout:
        """Every tensor of the released layout."""
        wide = self.decoder.hidden_size
        shards = {
            "": [*decoder_body(self.decoder, self.std), *decoder_head(self.decoder, self.std)],
            "visual_encoder": [*vision_tower(self.vision, "vision_model")],
            "projector": [*mlp("model", self.vision.hidden_size, wide, wide)],
        }
        return Layout(shards, self.shard_bytes)

    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """Configs and tokenizer, by name."""
        d = self.decoder
        config = {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.context_length,
            "model_type": "llama",
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_scaling": {"factor": d.rope_factor, "type": "linear"},
            "rope_theta": d.rope_theta,
            "tie_word_embeddings": d.tie_embeddings,
            "torch_dtype": "bfloat16",
            "vocab_size": d.vocab_size,
        }
        return llama_files(d.vocab_size, text) | {
            "config.json": as_json(config),
            "preprocessor_config.json": image_processor(self.vision),
            "visual_encoder/config.json": tower_config(self.vision),
            "projector/config.json": as_json({"bias": True, "hidden_act": "gelu", "model_type": "projector"}),
        }


SIZES = {
    # AuroraCap-7B: Vicuna 1.5 7B 16k behind DFN5B's tower.
    "auroracap-7b": AuroracapSize(
        decoder=DecoderConfig(4096, 11008, 32, 32, 32, 128, 32000, 1e-5, 1e4, 16384, rope_factor=4.0),
        vision=VisionConfig("clip", 1280, 5120, 32, 16, 378, 14, 1e-5, "quick_gelu"),
    ),
    # Half a billion parameters: the width and depth of Qwen2-0.5B, a tower of 6 layers of 384 at 224 pixels.
    "auroracap-0.5b": AuroracapSize(
        decoder=DecoderConfig(896, 4864, 24, 14, 14, 64, 32000, 1e-5, 1e4, 16384, rope_factor=4.0),
        vision=VisionConfig("clip", 384, 1536, 6, 6, 224, 16, 1e-5, "quick_gelu"),
        shard_bytes=500_000_000,
    ),
    # A few MB: the dimensions of the tests' fixture.
    "auroracap-tiny": AuroracapSize(
        decoder=DecoderConfig(128, 256, 3, 4, 4, 32, 320, 1e-5, 1e4, 16384, rope_factor=4.0),
        vision=VisionConfig("clip", 64, 128, 3, 4, 70, 14, 1e-5, "quick_gelu"),
        std=0.1,
        shard_bytes=2_000_000,
    ),
}
