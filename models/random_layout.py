"""Names, shapes and spreads of every tensor of a checkpoint in the layout of VideoLLaMA2.1-7B-AV (docs/facts.md 1.1 to
1.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .config import AudioConfig, DecoderConfig, VisionConfig

PREDICTOR_CLASSES = 527
"""AudioSet classes of BEATs' unused predictor."""


@dataclass(frozen=True)
class Size:
    """Dimensions of one random checkpoint.

    ``vision_tower`` is what ``mm_vision_tower`` says: a hub name, or a folder that is then written with the tower's
    config. ``std`` is the spread of the decoder's weights (transformers' ``initializer_range``); everywhere else it is
    1 / sqrt(inputs). ``first_special_id`` is the id of ``<|endoftext|>``; ``None`` puts it after the other tokens.
    ``shard_bytes`` is the most a shard holds.
    """

    decoder: DecoderConfig
    vision: VisionConfig
    audio: AudioConfig
    vision_tower: str
    num_frames: int
    std: float = 0.02
    first_special_id: int | None = 151643
    shard_bytes: int = 5_000_000_000


def _siglip(hidden: int, intermediate: int, layers: int, heads: int, image: int, patch: int) -> VisionConfig:
    return VisionConfig("siglip", hidden, intermediate, layers, heads, image, patch, 1e-6, "gelu_pytorch_tanh")


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, context: int, tie: bool = False
) -> DecoderConfig:
    dim = hidden // heads
    return DecoderConfig(
        hidden, intermediate, layers, heads, kv, dim, vocab, 1e-6, 1e6, context, qkv_bias=True, tie_embeddings=tie
    )


SIZES = {
    # The release, every dimension.
    "7b": Size(
        decoder=_qwen2(3584, 18944, 28, 28, 4, 152064, 32768),
        vision=_siglip(1152, 4304, 27, 16, 384, 14),
        audio=AudioConfig(),
        vision_tower="google/siglip-so400m-patch14-384",
        num_frames=16,
    ),
    # The decoder of Qwen2-0.5B (tied embeddings included) behind small towers: 6 layers of 384 each at 224 pixels and
    # patch 16, 4 layers of 384 for sound, 8 frames.
    "0.5b": Size(
        decoder=_qwen2(896, 4864, 24, 14, 2, 151936, 32768, tie=True),
        vision=_siglip(384, 1536, 6, 6, 224, 16),
        audio=AudioConfig(256, 384, 1536, 4, 6, out_size=896),
        vision_tower="small-siglip",
        num_frames=8,
        shard_bytes=500_000_000,
    ),
    # A few MB: the dimensions of the tests' fixture. The vocabulary is set to what its tokenizer has.
    "tiny": Size(
        decoder=_qwen2(128, 256, 3, 4, 2, 320, 4096),
        vision=_siglip(64, 128, 3, 4, 70, 14),
        audio=AudioConfig(64, 96, 192, 2, 4, conv_pos=16, conv_pos_groups=4, out_size=128),
        vision_tower="tiny-siglip",
        num_frames=8,
        std=0.1,
        first_special_id=None,
        shard_bytes=2_000_000,
    ),
}


@dataclass(frozen=True)
class RandomTensor:
    """A tensor to draw from a normal distribution. ``seeded_as`` is its name, or that of the tensor it equals."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float
    seeded_as: str

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)


def layout(size: Size, audio_in_shards: bool = True) -> tuple[list[RandomTensor], dict[str, list[RandomTensor]]]:
    """The tensors of the shards in their order, and those of the pickles beside them by file name."""
    audio, projector = list(_audio_tower(size.audio)), list(_audio_projector(size))
    body = [*_decoder_body(size), *_vision_tower(size.vision), *_connector(size)]
    body += [*audio, *projector] if audio_in_shards else []
    # The pickle was made of named parameters, where a table that all layers share appears under its first name.
    named = [tensor for tensor in audio if tensor.seeded_as == tensor.name]
    return [*body, *_head(size)], {"audio_tower.bin": named, "mm_projector_a.bin": projector}


def _tensor(name: str, *shape: int, std: float, mean: float = 0.0, seeded_as: str | None = None) -> RandomTensor:
    return RandomTensor(name, shape, std, mean, seeded_as or name)


def _layer(name: str, *shape: int, std: float | None = None, bias: bool = True) -> Iterator[RandomTensor]:
    """A linear or convolution layer: its output has the spread of its input when ``std`` is not given."""
    yield _tensor(f"{name}.weight", *shape, std=1 / math.sqrt(math.prod(shape[1:])) if std is None else std)
    if bias:
        yield _tensor(f"{name}.bias", shape[0], std=0.02)


def _norm(name: str, width: int, bias: bool = True) -> Iterator[RandomTensor]:
    """A norm close to 1, yet not 1: a reader that drops its weight is to be noticed."""
    yield _tensor(f"{name}.weight", width, std=0.1, mean=1.0)
    if bias:
        yield _tensor(f"{name}.bias", width, std=0.02)


def _decoder_body(size: Size) -> Iterator[RandomTensor]:
    d, std = size.decoder, size.std
    yield _tensor("model.embed_tokens.weight", d.vocab_size, d.hidden_size, std=std)
    for i in range(d.num_layers):
        layer = f"model.layers.{i}"
        yield from _norm(f"{layer}.input_layernorm", d.hidden_size, bias=False)
        for name, heads in (("q", d.num_heads), ("k", d.num_kv_heads), ("v", d.num_kv_heads)):
            yield from _layer(f"{layer}.self_attn.{name}_proj", heads * d.head_dim, d.hidden_size, std=std)
        yield from _layer(f"{layer}.self_attn.o_proj", d.hidden_size, d.num_heads * d.head_dim, std=std, bias=False)
        yield from _norm(f"{layer}.post_attention_layernorm", d.hidden_size, bias=False)
        for name in ("gate", "up"):
            yield from _layer(f"{layer}.mlp.{name}_proj", d.intermediate_size, d.hidden_size, std=std, bias=False)
        yield from _layer(f"{layer}.mlp.down_proj", d.hidden_size, d.intermediate_size, std=std, bias=False)
    yield from _norm("model.norm", d.hidden_size, bias=False)


def _head(size: Size) -> Iterator[RandomTensor]:
    if not size.decoder.tie_embeddings:
        yield _tensor("lm_head.weight", size.decoder.vocab_size, size.decoder.hidden_size, std=size.std)


def _vision_tower(v: VisionConfig) -> Iterator[RandomTensor]:
    """All of SigLIP, the parts that hidden_states[-2] does not reach included."""
    root, width, inner = "model.vision_tower.vision_tower.vision_model", v.hidden_size, v.intermediate_size
    yield from _layer(f"{root}.embeddings.patch_embedding", width, 3, v.patch_size, v.patch_size)
    yield _tensor(f"{root}.embeddings.position_embedding.weight", v.num_patches, width, std=0.02)

    def mlp(name: str) -> Iterator[RandomTensor]:
        yield from _layer(f"{name}.fc1", inner, width)
        yield from _layer(f"{name}.fc2", width, inner)

    for i in range(v.num_layers):
        layer = f"{root}.encoder.layers.{i}"
        yield from _norm(f"{layer}.layer_norm1", width)
        for name in ("q", "k", "v", "out"):
            yield from _layer(f"{layer}.self_attn.{name}_proj", width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from mlp(f"{layer}.mlp")
    yield from _norm(f"{root}.post_layernorm", width)
    yield _tensor(f"{root}.head.probe", 1, 1, width, std=1.0)
    yield _tensor(f"{root}.head.attention.in_proj_weight", 3 * width, width, std=1 / math.sqrt(width))
    yield _tensor(f"{root}.head.attention.in_proj_bias", 3 * width, std=0.02)
    yield from _layer(f"{root}.head.attention.out_proj", width, width)
    yield from _norm(f"{root}.head.layernorm", width)
    yield from mlp(f"{root}.head.mlp")


def _connector(size: Size) -> Iterator[RandomTensor]:
    """stc_connector_v35. The squeeze of a block's gate is a quarter of the block's input channels, rounded."""
    root, hidden = "model.mm_projector", size.decoder.hidden_size
    for stage, in_size in (("s1", size.vision.hidden_size), ("s2", hidden)):
        for number in range(1, 5):
            block, width = f"{root}.{stage}.b{number}", in_size if number == 1 else hidden
            squeeze = round(width * 0.25)
            for name, shape in (("conv1", (width, 1, 1)), ("conv2", (1, 3, 3)), ("conv3", (hidden, 1, 1))):
                yield from _layer(f"{block}.{name}.conv", hidden, *shape, bias=False)
                yield from _norm(f"{block}.{name}.bn", hidden)
            yield from _layer(f"{block}.se.fc1", squeeze, hidden, 1, 1)
            yield from _layer(f"{block}.se.fc2", hidden, squeeze, 1, 1)
            if width != hidden:
                yield from _layer(f"{block}.downsample.conv", hidden, width, 1, 1, bias=False)
                yield from _norm(f"{block}.downsample.bn", hidden)
    yield from _layer(f"{root}.sampler.0", hidden, hidden, 2, 2, 2)
    yield from _layer(f"{root}.readout.0", hidden, hidden)
    yield from _layer(f"{root}.readout.2", hidden, hidden)


def _audio_tower(a: AudioConfig) -> Iterator[RandomTensor]:
    root, width, inner = "model.audio_tower", a.hidden_size, a.intermediate_size
    yield from _layer(f"{root}.patch_embedding", a.embed_dim, 1, a.patch_size, a.patch_size, bias=False)
    yield from _norm(f"{root}.layer_norm", a.embed_dim)
    yield from _layer(f"{root}.post_extract_proj", width, a.embed_dim)
    kernel = (width, width // a.conv_pos_groups, a.conv_pos)
    spread = 1 / math.sqrt(kernel[1] * kernel[2])
    yield _tensor(f"{root}.encoder.pos_conv.0.bias", width, std=0.02)
    # The gain is the norm of one kernel tap, here that of weights with the spread of any other layer.
    gain = spread * math.sqrt(kernel[0] * kernel[1])
    yield _tensor(f"{root}.encoder.pos_conv.0.weight_g", 1, 1, a.conv_pos, std=0.1 * gain, mean=gain)
    yield _tensor(f"{root}.encoder.pos_conv.0.weight_v", *kernel, std=spread)
    yield from _norm(f"{root}.encoder.layer_norm", width)
    table = "self_attn.relative_attention_bias.weight"
    for i in range(a.num_layers):
        layer = f"{root}.encoder.layers.{i}"
        for name in ("k", "v", "q", "out"):
            yield from _layer(f"{layer}.self_attn.{name}_proj", width, width)
        yield from _layer(f"{layer}.self_attn.grep_linear", 8, width // a.num_heads)
        yield _tensor(f"{layer}.self_attn.grep_a", 1, a.num_heads, 1, 1, std=0.1, mean=1.0)
        first = f"{root}.encoder.layers.0.{table}"
        yield _tensor(f"{layer}.{table}", a.num_buckets, a.num_heads, std=0.5, seeded_as=first)
        yield from _norm(f"{layer}.self_attn_layer_norm", width)
        yield from _layer(f"{layer}.fc1", inner, width)
        yield from _layer(f"{layer}.fc2", width, inner)
        yield from _norm(f"{layer}.final_layer_norm", width)
    yield from _layer(f"{root}.predictor", PREDICTOR_CLASSES, width)


def _audio_projector(size: Size) -> Iterator[RandomTensor]:
    hidden = size.decoder.hidden_size
    yield from _layer("model.mm_projector_a.0", hidden, size.audio.hidden_size)
    yield from _layer("model.mm_projector_a.2", hidden, hidden)
