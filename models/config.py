"""Configuration of every part of a captioner, as plain frozen records.

A family's ``config.py`` fills these from a checkpoint's files; nothing past it looks at a checkpoint's JSON again.
Shapes in the docstrings use: N frames, P patch tokens of a frame, D tower width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..contract.pipeline import ImagePlan, Mode, Pipeline, PromptLayout, Sampling, SoundPlan, Stage
from ..contract.records import DecoderShape, Generation, Positions
from ..errors import OptionError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower. Only the layers up to ``hidden_states[select_layer]`` are built.

    ``keep`` is the share of visual tokens that AuroraCap keeps by merging in every layer; ``None`` is a tower without
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
    """From tower features ``[N, P, in_size]`` to visual tokens of width ``out_size``.

    ``kind`` is the checkpoint's ``mm_projector_type``, ``grid`` the side of the patch grid.
    """

    kind: str
    in_size: int
    out_size: int
    grid: int


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
    ``intermediate_size`` is that of one expert. ``positions``: whether they are given with the tokens
    (``contract.records.Positions``).
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
    positions: Positions = "sequential"

    @property
    def shape(self) -> DecoderShape:
        """What a bundle says of it."""
        return DecoderShape(**{name: getattr(self, name) for name in DecoderShape.__struct_fields__})


@dataclass(frozen=True)
class Part:
    """A stage of the pipeline and the module that computes it, ``build(config)``.

    The module's positional arguments are the stage's inputs: ``[units, tokens, width]`` each, for a window
    ``[windows, kernel, tokens, width]``, for pixels ``[places, 3, S, S]`` and for sound ``[1, frames, mels]``. It gives
    ``[units, tokens, width]``. ``vary(config, keep)``: the config of the form that keeps a share of the tokens, where
    the stage merges tokens.
    """

    stage: Stage
    build: Callable[[Any], nn.Module]
    config: Any
    vary: Callable[[Any, float], Any] | None = None


@dataclass(frozen=True)
class CaptionerConfig:
    """One captioner, whole: what its family's ``config.py`` declares of it."""

    family: str
    sampling: Sampling
    image: ImagePlan
    parts: tuple[Part, ...]
    """The stages in the order in which data passes them, the tokens of their units not yet known."""
    prompts: dict[Mode, PromptLayout]
    """The layout of each mode: ``video``, and with an audio branch ``audio`` and ``audiovideo``."""
    decoder: DecoderConfig
    generation: Generation
    sound: SoundPlan | None = None
    default_instruction: str = "Describe the video in detail."

    def part(self, name: str) -> Part:
        """The part of a name. ``KeyError`` for an unknown one."""
        for part in self.parts:
            if part.stage.name == name:
                return part
        raise KeyError(name)

    @property
    def merging(self) -> Part | None:
        """The part that merges tokens, if there is one."""
        return next((part for part in self.parts if part.vary is not None), None)

    def keeping(self, keep: float) -> CaptionerConfig:
        """The same captioner with another share of tokens kept. ``OptionError`` where it has no merging, or for a
        share out of (0, 1]."""
        if not 0 < keep <= 1:
            raise OptionError(f"the share of visual tokens must be above 0 and at most 1, not {keep:g}")
        if self.merging is None:
            if keep != 1:
                raise OptionError(
                    f"a captioner of the family {self.family} has no token merging: leave --visual-tokens out"
                )
            return self
        parts = tuple(
            part if part.vary is None else replace(part, config=part.vary(part.config, keep)) for part in self.parts
        )
        return replace(self, parts=parts)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline as data."""
        return Pipeline(
            sampling=self.sampling,
            image=self.image,
            sound=self.sound,
            stages=tuple(part.stage for part in self.parts),
            prompts=self.prompts,
        )
