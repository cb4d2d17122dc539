"""BEATs, the audio encoder of VideoLLaMA2.1-AV, and the projector to the decoder's width.

Source: VideoLLaMA2 ``model/beats/*.py`` (branch audio_visual; docs/facts.md 1.4), the fine-tuned BEATs of
microsoft/unilm with other defaults. What is identity at inference (dropout, layer drop, gradient scaling, the all-False
padding mask) and the classification head are not here; weight norm and the gate's sums are folded into the weights on
reading.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.pipeline import SOUND, OneSound, SoundPlan, Stage, StageInput
from . import attention
from .config import AudioConfig, Part
from .connectors import build_mlp

#: The sound that the tower hears at once: Hz, seconds (docs/facts.md 1.4).
SAMPLE_RATE, SECONDS = 16000, 30
FBANK_MEAN = 15.41663
FBANK_STD = 6.55582


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every relative position key - query from ``1 - length`` to ``length - 1``: int64 ``[2 * length - 1]``.

    Half of the buckets are for keys after the query; of each half, the first half is exact, the rest logarithmic up to
    ``max_distance``. Computed in float32 as the reference does (BEATs ``backbone.py``), whose truncation decides.
    """
    relative = torch.arange(1 - length, length)
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    # The clamp only keeps log(0) out of the branch that is not taken.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + (relative > 0).long() * half


class SelfAttention(nn.Module):
    """Multi-head attention whose relative position bias is scaled by a gate that each query sets for itself."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # The checkpoint's Linear has 8 outputs. The reference sums the first 4 and the last 4; we do so when reading.
        self.grep_linear = nn.Linear(config.hidden_size // config.num_heads, 2)
        self.grep_a = nn.Parameter(torch.ones(1, config.num_heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query = self.q_proj(x)
        # The gate reads the query before it is scaled.
        heads = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        first, second = self.grep_linear(heads).sigmoid().chunk(2, dim=-1)
        gate = first * (second * self.grep_a - 1.0) + 2.0
        out = attention.current().full(query, self.k_proj(x), self.v_proj(x), self.num_heads, gate * bias)
        return self.out_proj(out)


class EncoderLayer(nn.Module):
    """Post-norm attention and MLP with residuals scaled up (DeepNorm)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.alpha = (2 * config.num_layers) ** 0.25
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x * self.alpha + self.self_attn(x, bias))
        return self.final_layer_norm(x * self.alpha + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
    """Convolutional position embedding and the layers, which share one relative position table."""

    buckets: Tensor

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.length = config.num_tokens
        self.pos_conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            config.conv_pos,
            padding=config.conv_pos // 2,
            groups=config.conv_pos_groups,
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        # On the CPU even when the module is built on the meta device: computed, not read from a checkpoint.
        with torch.device("cpu"):
            buckets = relative_buckets(self.length, config.num_buckets, config.max_distance)
        self.register_buffer("buckets", buckets, persistent=False)

    def position_bias(self) -> Tensor:
        """``[heads, T, T]``: entry i, j is the table's value for the relative position j - i (a Toeplitz matrix)."""
        line = self.relative_attention_bias(self.buckets).t()
        steps = torch.arange(self.length, device=line.device)
        index = steps.unsqueeze(0) - steps.unsqueeze(1) + (self.length - 1)
        return line.index_select(1, index.flatten()).unflatten(1, (self.length, self.length))

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel padded by half of itself gives one sample too many at the end.
        position = self.pos_conv(x.transpose(1, 2))[..., : self.length].transpose(1, 2)
        x = self.layer_norm(x + F.gelu(position))
        bias = self.position_bias()
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Beats(nn.Module):
    """Filter banks to one feature a patch, time outer and 8 mel patches inner."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, config.patch_size, stride=config.patch_size, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        # The reference leaves the projection out where both widths agree.
        same = config.embed_dim == config.hidden_size
        self.post_extract_proj = nn.Identity() if same else nn.Linear(config.embed_dim, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, fbank: Tensor) -> Tensor:
        """fbank ``[B, frames, mels]`` as kaldi gives it -> features ``[B, tokens, hidden_size]``."""
        x = (fbank - FBANK_MEAN) / (2 * FBANK_STD)
        x = self.patch_embedding(x.unsqueeze(1)).flatten(2).transpose(1, 2)
        return self.encoder(self.post_extract_proj(self.layer_norm(x)))


class AudioBranch(nn.Module):
    """The encoder and its projector."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = Beats(config)
        self.projector = build_mlp(config.projector_kind, config.hidden_size, config.out_size)

    def features(self, fbank: Tensor) -> Tensor:
        """fbank float32 ``[B, 2998, 128]`` (log mel energies, not normalised) -> ``[B, 1496, hidden_size]``."""
        return self.tower(fbank)

    def forward(self, fbank: Tensor) -> Tensor:
        """fbank float32 ``[B, 2998, 128]`` -> audio tokens ``[B, 1496, out_size]``."""
        return self.projector(self.features(fbank))


def sound_plan(config: AudioConfig) -> SoundPlan:
    """How sound becomes the filter bank that the tower takes."""
    return SoundPlan(
        sample_rate=SAMPLE_RATE,
        num_samples=SAMPLE_RATE * SECONDS,
        num_mel_bins=config.num_mel_bins,
        num_frames=config.num_frames,
    )


def audio_part(config: AudioConfig) -> Part:
    """The stage ``audio``: ``fbank [1, frames, mels]`` to ``audio_tokens [1, tokens, H]``."""
    inputs = (StageInput("fbank", SOUND),)
    return Part(Stage(name="audio", unit=OneSound(), inputs=inputs, output="audio_tokens"), AudioBranch, config)
