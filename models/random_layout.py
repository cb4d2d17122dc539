"""Random checkpoints: what a family says of one, and the tensors of the pieces that several families share.

The folder of a family has a ``sizes.py`` with a record that is a ``Size``: its dimensions, the tensors of its released
layout, and the files beside them. ``random_checkpoint.write_checkpoint`` writes any of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .config import DecoderConfig, VisionConfig


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
        """In bfloat16."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint.

    ``shards``: those of the safetensors files of a folder, in their order, by the folder; ``""`` is the checkpoint's
    own. ``shard_bytes`` is the most that one file holds. ``pickles``: those of the PyTorch pickles, by file name.
    """

    shards: Mapping[str, Sequence[RandomTensor]]
    shard_bytes: int = 5_000_000_000
    pickles: Mapping[str, Sequence[RandomTensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Size(ABC):
    """The dimensions of one random checkpoint. The folder of a family has a record that adds its own."""

    decoder: DecoderConfig

    @abstractmethod
    def layout(self) -> Layout:
        """Every tensor of the released layout, those that no component reads included."""

    @abstractmethod
    def files(self, text: Sequence[str] | None) -> dict[str, str]:
        """What stands beside the weights, by file name. ``text``: what the merges of the tokenizer come from, as many
        as the vocabulary has room for; ``None``: a few merges for short prompts."""


# --- pieces


def tensor(name: str, *shape: int, std: float, mean: float = 0.0, seeded_as: str | None = None) -> RandomTensor:
    """A tensor. ``seeded_as``: it has the values of the tensor of this name."""
    return RandomTensor(name, shape, std, mean, seeded_as or name)


def layer(name: str, *shape: int, std: float | None = None, bias: bool = True) -> Iterator[RandomTensor]:
    """A linear or convolution layer: its output has the spread of its input when ``std`` is not given."""
    yield tensor(f"{name}.weight", *shape, std=1 / math.sqrt(math.prod(shape[1:])) if std is None else std)
    if bias:
        yield tensor(f"{name}.bias", shape[0], std=0.02)


def norm(name: str, width: int, bias: bool = True) -> Iterator[RandomTensor]:
    """A norm close to 1, yet not 1: a reader that drops its weight is to be noticed."""
    yield tensor(f"{name}.weight", width, std=0.1, mean=1.0)
    if bias:
        yield tensor(f"{name}.bias", width, std=0.02)


def mlp(root: str, *widths: int, bias: bool = True) -> Iterator[RandomTensor]:
    """Linear layers with an activation between: ``root.0``, ``root.2``, … from the first of ``widths`` to the last."""
    for number, (narrow, wide) in enumerate(pairwise(widths)):
        yield from layer(f"{root}.{2 * number}", wide, narrow, bias=bias)


def decoder_body(d: DecoderConfig, std: float, root: str = "model") -> Iterator[RandomTensor]:
    """The embedding table and the layers under transformers' names of Llama, Mistral, Mixtral and Qwen2."""
    yield tensor(f"{root}.embed_tokens.weight", d.vocab_size, d.hidden_size, std=std)
    for i in range(d.num_layers):
        at = f"{root}.layers.{i}"
        yield from norm(f"{at}.input_layernorm", d.hidden_size, bias=False)
        for name, heads in (("q", d.num_heads), ("k", d.num_kv_heads), ("v", d.num_kv_heads)):
            size = heads * d.head_dim
            yield from layer(f"{at}.self_attn.{name}_proj", size, d.hidden_size, std=std, bias=d.qkv_bias)
        yield from layer(f"{at}.self_attn.o_proj", d.hidden_size, d.num_heads * d.head_dim, std=std, bias=False)
        yield from norm(f"{at}.post_attention_layernorm", d.hidden_size, bias=False)
        if d.num_experts:
            # As spread as its input: a token prefers some experts over others.
            yield from layer(f"{at}.block_sparse_moe.gate", d.num_experts, d.hidden_size, bias=False)
        for mlp_names in _mlp_names(at, d.num_experts):
            for name in mlp_names[:2]:
                yield from layer(name, d.intermediate_size, d.hidden_size, std=std, bias=False)
            yield from layer(mlp_names[2], d.hidden_size, d.intermediate_size, std=std, bias=False)
    yield from norm(f"{root}.norm", d.hidden_size, bias=False)


def _mlp_names(at: str, experts: int) -> list[tuple[str, str, str]]:
    """The names of gate, up and down of the layer at ``at``: of its MLP, or of each of its experts."""
    if not experts:
        return [(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", f"{at}.mlp.down_proj")]
    roots = (f"{at}.block_sparse_moe.experts.{number}" for number in range(experts))
    return [(f"{root}.w1", f"{root}.w3", f"{root}.w2") for root in roots]


def decoder_head(d: DecoderConfig, std: float, name: str = "lm_head") -> Iterator[RandomTensor]:
    """The output head, where it is not the embedding table."""
    if not d.tie_embeddings:
        yield tensor(f"{name}.weight", d.vocab_size, d.hidden_size, std=std)


def siglip(hidden: int, intermediate: int, layers: int, heads: int, image: int, patch: int) -> VisionConfig:
    """A SigLIP tower with the released activation and epsilon."""
    return VisionConfig("siglip", hidden, intermediate, layers, heads, image, patch, 1e-6, "gelu_pytorch_tanh")


def vision_tower(v: VisionConfig, root: str) -> Iterator[RandomTensor]:
    """All of a CLIP or SigLIP tower under transformers' names, the parts that no captioner reads included: the last
    layer, the norm behind it, SigLIP's pooling head."""
    width, inner, clip = v.hidden_size, v.intermediate_size, v.kind == "clip"
    if clip:
        yield tensor(f"{root}.embeddings.class_embedding", width, std=0.02)
    yield from layer(f"{root}.embeddings.patch_embedding", width, 3, v.patch_size, v.patch_size, bias=not clip)
    yield tensor(f"{root}.embeddings.position_embedding.weight", v.num_patches + clip, width, std=0.02)
    if clip:
        yield from norm(f"{root}.pre_layrnorm", width)

    def two_layers(name: str) -> Iterator[RandomTensor]:
        yield from layer(f"{name}.fc1", inner, width)
        yield from layer(f"{name}.fc2", width, inner)

    for i in range(v.num_layers):
        at = f"{root}.encoder.layers.{i}"
        yield from norm(f"{at}.layer_norm1", width)
        for name in ("q", "k", "v", "out"):
            yield from layer(f"{at}.self_attn.{name}_proj", width, width)
        yield from norm(f"{at}.layer_norm2", width)
        yield from two_layers(f"{at}.mlp")
    yield from norm(f"{root}.post_layernorm", width)
    if not clip:
        yield tensor(f"{root}.head.probe", 1, 1, width, std=1.0)
        yield tensor(f"{root}.head.attention.in_proj_weight", 3 * width, width, std=1 / math.sqrt(width))
        yield tensor(f"{root}.head.attention.in_proj_bias", 3 * width, std=0.02)
        yield from layer(f"{root}.head.attention.out_proj", width, width)
        yield from norm(f"{root}.head.layernorm", width)
        yield from two_layers(f"{root}.head.mlp")
