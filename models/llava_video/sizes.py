"""Random checkpoints in LLaVA-Video's released layout (docs/facts.md 8.1): the tower without its last layer and head,
one learned vector, and more rows of the vocabulary than the tokenizer has tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import DecoderConfig, VisionConfig
from ..random_files import ENDOFTEXT, IM_END, as_json, qwen2_files, qwen2_generation, tower_files
from ..random_layout import Layout, Size, decoder_body, decoder_head, mlp, siglip, tensor, vision_tower
from .weights import NEWLINE, PROJECTOR, VISION


@dataclass(frozen=True)
class LlavaVideoSize(Size):
    """Dimensions of one random checkpoint.

    ``vision``: the whole tower. ``vision_tower`` is what ``mm_vision_tower`` says: a hub name, or a folder that is then
    written with the tower's config. ``std`` is the spread of the decoder's weights; everywhere else it is
    1 / sqrt(inputs). ``first_special_id`` is the id of Qwen2's ``<|endoftext|>``; ``None`` puts it after the other
    tokens. ``shard_bytes`` is the most a shard holds.
    """

    vision: VisionConfig
    vision_tower: str
    std: float = 0.02
    first_special_id: int | None = 151643
    shard_bytes: int = 5_000_000_000

    def layout(self) -> Layout:
        """Every tensor of the released layout."""
        wide = self.decoder.hidden_size
        stored = replace(self.vision, num_layers=self.vision.num_layers - 1)
        tower = [
            each for each in vision_tower(stored, VISION.rstrip(".")) if not each.name.startswith(f"{VISION}head.")
        ]
        return Layout(
            {
                "": [
                    *decoder_body(self.decoder, self.std),
                    tensor(NEWLINE, wide, std=wide**-0.5),
                    *tower,
                    *mlp(PROJECTOR.rstrip("."), self.vision.hidden_size, wide, wide),
                    *decoder_head(self.decoder, self.std),
                ]
            },
            self.shard_bytes,
        )

    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """Configs and tokenizer, by name."""
        d = self.decoder
        files, ids = qwen2_files(self.first_special_id, d.vocab_size, text)
        bos, eos = ids[ENDOFTEXT], ids[IM_END]
        config = {
            "add_faster_video": False,
            "add_time_instruction": True,
            "architectures": ["LlavaQwenForCausalLM"],
            "bos_token_id": bos,
            "eos_token_id": eos,
            "force_sample": True,
            "hidden_act": "silu",
            "hidden_size": d.hidden_size,
            "image_aspect_ratio": "anyres_max_9",
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.context_length,
            "mm_hidden_size": self.vision.hidden_size,
            "mm_newline_position": "grid",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_spatial_pool_mode": "bilinear",
            "mm_spatial_pool_stride": 2,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": self.vision_tower,
            "model_type": "llava_qwen",
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": d.rope_theta,
            "tie_word_embeddings": d.tie_embeddings,
            "tokenizer_model_max_length": d.context_length,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": d.vocab_size,
        }
        generation = as_json(qwen2_generation(bos, eos))
        files |= {"config.json": as_json(config), "generation_config.json": generation}
        return files | ({} if "/" in self.vision_tower else tower_files(self.vision_tower, self.vision))


SIZES = {
    # LLaVA-Video-7B-Qwen2.
    "llava-video-7b": LlavaVideoSize(
        decoder=DecoderConfig(3584, 18944, 28, 28, 4, 128, 152064, 1e-6, 1e6, 32768, qkv_bias=True),
        vision=siglip(1152, 4304, 27, 16, 384, 14),
        vision_tower="google/siglip-so400m-patch14-384",
    ),
    # The decoder of Qwen2-0.5B behind a tower of 6 layers of 384 at 224 pixels.
    "llava-video-0.5b": LlavaVideoSize(
        decoder=DecoderConfig(896, 4864, 24, 14, 2, 64, 151936, 1e-6, 1e6, 32768, qkv_bias=True, tie_embeddings=True),
        vision=siglip(384, 1536, 7, 6, 224, 16),
        vision_tower="small-siglip",
        shard_bytes=500_000_000,
    ),
    # A few MB. The vocabulary has 16 rows more than its tokenizer tokens.
    "llava-video-tiny": LlavaVideoSize(
        decoder=DecoderConfig(128, 256, 3, 4, 2, 32, 336, 1e-6, 1e6, 4096, qkv_bias=True),
        vision=siglip(64, 128, 4, 4, 70, 14),
        vision_tower="tiny-siglip",
        std=0.1,
        first_special_id=None,
        shard_bytes=2_000_000,
    ),
}
