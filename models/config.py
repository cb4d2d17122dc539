"""Configuration of every part of a captioner, as plain frozen records.

A family's ``config.py`` fills these from a checkpoint's files; nothing past it looks at a checkpoint's JSON again.
Shapes in the docstrings use: N frames, P patch tokens of a frame, D tower width, H decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ImageProcessing:
    """How a decoded RGB frame becomes the tower's input.

    ``resize`` is ``"exact"`` (both sides to ``size``, the SigLIP processor) or ``"shortest_edge"`` (the shorter side
    to ``size``, then a centre crop of ``crop``, the CLIP processor). Resampling is Pillow's antialiased bicubic on
    uint8; then ``(x / 255 - mean) / std`` per channel.
    """

    resize: Literal["exact", "shortest_edge"]
    size: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower. Only the layers up to ``hidden_states[select_layer]`` are built.

    ``keep`` is AuroraCap's ratio of visual tokens kept by merging in every layer; ``None`` is a tower without
    merging. ``num_layers`` is the released depth (the merging schedule depends on it), ``num_used_layers`` what runs.
    """

    kind: Literal["clip", "siglip"]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    select_layer: int = -2
    keep: float | None = None

    @property
    def num_used_layers(self) -> int:
        """Layers that ``hidden_states[select_layer]`` depends on: hidden_states has ``num_layers + 1`` entries."""
        return self.num_layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer

    @property
    def grid(self) -> int:
        """Patches along one side of the image (the pixels that do not fill a patch are unused)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid * self.grid


@dataclass(frozen=True)
class ConnectorConfig:
    """From tower features ``[N, P, in_size]`` to visual tokens ``[blocks, tokens, out_size]``.

    ``kind`` is the checkpoint's ``mm_projector_type``; ``per_frame`` families (AuroraCap) get one block a frame,
    the others one block for the clip. ``grid`` is the side of the patch grid, ``num_frames`` the frames of one clip.
    """

    kind: str
    in_size: int
    out_size: int
    grid: int
    num_frames: int
    per_frame: bool = False


@dataclass(frozen=True)
class AudioConfig:
    """A BEATs encoder and its projector. Defaults are the dimensions of VideoLLaMA2.1-7B-AV (docs/facts.md 1.4)."""

    embed_dim: int = 512
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    patch_size: int = 16
    num_frames: int = 2998
    num_mel_bins: int = 128
    layer_norm_eps: float = 1e-5
    projector_kind: str = "mlp2x_gelu"
    out_size: int = 3584

    @property
    def num_tokens(self) -> int:
        """Audio tokens of one clip: time patches times mel patches, 187 x 8 = 1496."""
        return (self.num_frames // self.patch_size) * (self.num_mel_bins // self.patch_size)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-shaped decoder (Llama, Mistral, Mixtral, Qwen2): RMSNorm, rotary, grouped queries, SwiGLU.

    ``rope_factor`` divides the positions (linear scaling). ``context_length`` is the largest number of positions, the
    sliding window included where a checkpoint has one switched on. ``num_experts``: the SwiGLUs of a layer, of which a
    router chooses ``experts_per_token`` for each token; 0 is a layer with one SwiGLU and no router.
    ``intermediate_size`` is that of one expert.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    context_length: int
    rope_factor: float = 1.0
    qkv_bias: bool = False
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0


@dataclass(frozen=True)
class PromptTemplate:
    """The text around the visual (or audio) blocks of one mode.

    Tokens: ``prefix`` + block (+ ``separator`` + block)... + ``suffix``, each text piece tokenized on its own without
    special tokens, ``bos_token_id`` (if any) first. ``{instruction}`` in ``prefix`` or ``suffix`` is the user's text.
    ``sentinel`` is the negative id that stands for a block in the reference implementation's ids.
    """

    prefix: str
    suffix: str
    separator: str = ""
    bos_token_id: int | None = None
    sentinel: int = -200


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's generation settings say. ``repetition_penalty`` sees generated tokens only (docs/facts.md
    1.7)."""

    eos_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 2048


@dataclass(frozen=True)
class CaptionerConfig:
    """One captioner, whole."""

    family: str
    num_frames: int
    frame_rule: Literal["centered", "linspace"]
    image: ImageProcessing
    vision: VisionConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    generation: GenerationDefaults
    audio: AudioConfig | None = None
    prompts: dict[str, PromptTemplate] = field(default_factory=dict)
    """Templates by mode: ``video``, and where there is an audio tower ``audio`` and ``audiovideo``."""
    default_instruction: str = "Describe the video in detail."
