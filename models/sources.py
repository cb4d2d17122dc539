"""Where the entries of a module's state dict come from in a checkpoint.

A family's ``weights.py`` states it as data, one ``Source`` per entry; ``captioner.py`` checks names and shapes against
the files and builds the tensors. Here is what families share: reshaping rules, and transformers' names of a
Llama-shaped decoder and of a CLIP or SigLIP tower. Every other checkpoint name is in a ``weights.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import DecoderConfig, VisionConfig

Shape = tuple[int, ...]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor]:
    return (tensor,)


@dataclass(frozen=True)
class Source:
    """``build(*tensors)`` of the checkpoint's tensors ``names``, which must have ``shapes``.

    ``split`` is the inverse: it gives tensors from which ``build`` makes the entry's value again. ``shared``: the
    tensor holds other entries too; then ``split`` gives this entry's part of it with zeros elsewhere.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    build: Callable[..., Tensor] = _same
    split: Callable[[Tensor], Sequence[Tensor]] = _alone
    shared: bool = False


def direct(name: str, shape: Shape) -> Source:
    """A tensor taken as it is."""
    return Source((name,), (shape,))


def from_conv1x1(name: str, shape: Shape) -> Source:
    """A Linear ``[out, in]`` from a 1x1 convolution ``[out, in, 1, 1]``."""
    return Source(
        (name,), ((*shape, 1, 1),), lambda weight: weight.flatten(1), lambda weight: (weight[..., None, None],)
    )


def from_conv3d(name: str, shape: Shape, kernel: tuple[int, int, int]) -> Source:
    """A Linear over windows, ``[out, kt*kh*kw*in]``, from a Conv3d ``[out, in, kt, kh, kw]``."""
    channels = shape[1] // (kernel[0] * kernel[1] * kernel[2])
    return Source(
        (name,),
        ((shape[0], channels, *kernel),),
        lambda weight: weight.permute(0, 2, 3, 4, 1).flatten(1),
        lambda weight: (weight.unflatten(1, (*kernel, channels)).permute(0, 4, 1, 2, 3),),
    )


def from_fused(name: str, shape: Shape, sizes: Sequence[int], part: int, groups: int = 1) -> Source:
    """Some rows of a tensor that joins several layers.

    Its rows are ``groups`` equal groups, a group holds ``sizes[0]`` rows of the first layer, ``sizes[1]`` of the next
    and so on. The entry, of ``shape``, has the rows of layer ``part`` in all groups.
    """
    rows, start = sum(sizes), sum(sizes[:part])

    def build(joined: Tensor) -> Tensor:
        return joined.unflatten(0, (groups, rows)).narrow(1, start, sizes[part]).flatten(0, 1)

    def split(entry: Tensor) -> tuple[Tensor]:
        joined = entry.new_zeros(groups, rows, *entry.shape[1:])
        joined.narrow(1, start, sizes[part]).copy_(entry.unflatten(0, (groups, sizes[part])))
        return (joined.flatten(0, 1),)

    return Source((name,), ((groups * rows, *shape[1:]),), build, split, shared=True)


def first_rows(source: Source, rows: int) -> Source:
    """The first rows of the one tensor of ``source``, which has ``rows``. Written back, the others are zero."""
    (shape,) = source.shapes
    count = shape[0]
    return Source(
        source.names,
        ((rows, *shape[1:]),),
        lambda tensor: tensor[:count],
        lambda value: (torch.cat((value, value.new_zeros(rows - count, *shape[1:]))),),
    )


def renamed(sources: Mapping[str, Source], rename: Callable[[str], str]) -> dict[str, Source]:
    """The same sources of tensors by other names."""
    return {entry: replace(source, names=tuple(map(rename, source.names))) for entry, source in sources.items()}


def first_present(names: Collection[str], *candidates: str) -> str:
    """The first of several names a tensor may go by; the first of all where none is there (then it is missing)."""
    return next((name for name in candidates if name in names), candidates[0])


def mlp_kind(names: Collection[str], prefix: str) -> str:
    """``linear`` or ``mlpNx_gelu``, told from a projector's tensor names (configs have been seen to be wrong)."""
    if f"{prefix}weight" in names:
        return "linear"
    depth = sum(re.fullmatch(re.escape(prefix) + r"\d+\.weight", name) is not None for name in names)
    return f"mlp{max(depth, 1)}x_gelu"


def decoder_sources(
    shapes: Mapping[str, Shape], config: DecoderConfig, names: Collection[str] = ()
) -> dict[str, Source]:
    """The decoder's entries under transformers' names; a tied head is the embedding table.

    ``names``: the checkpoint's tensors. A layer that is joined with others there (Phi3) is part of their tensor.
    """
    tied = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if config.tie_embeddings
        else {"lm_head.weight": "lm_head.weight"}
    )
    sources = {entry: direct(tied.get(entry, _decoder_name(entry)), shape) for entry, shape in shapes.items()}
    return sources | _joined_layers(shapes, names)


#: Layers that Phi3 keeps as one, in the order of their rows.
_JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _joined_layers(shapes: Mapping[str, Shape], names: Collection[str]) -> dict[str, Source]:
    """The sources of the entries whose layers are joined in the checkpoint."""
    found: dict[str, Source] = {}
    for joined, parts in _JOINED.items():
        for entry, shape in shapes.items():
            place, _, layer = entry.removesuffix(".weight").rpartition(".")
            name = f"model.{place}.{joined}.weight"
            if layer in parts and name in names:
                sizes = [shapes[f"{place}.{part}.weight"][0] for part in parts]
                found[entry] = from_fused(name, shape, sizes, parts.index(layer))
    return found


#: transformers' names of a Mixtral expert's matmuls.
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _decoder_name(entry: str) -> str:
    expert = re.fullmatch(r"(layers\.\d+)\.mlp\.(gate|experts\.\d+\.(\w+))\.weight", entry)
    if expert is None:
        return f"model.{entry}"
    layer, inner, matmul = expert.groups()
    inner = inner if matmul is None else inner.replace(matmul, _EXPERT[matmul])
    return f"model.{layer}.block_sparse_moe.{inner}.weight"


def embedding_source(config: DecoderConfig) -> dict[str, Source]:
    """The embedding table ``[vocabulary, hidden]``."""
    return {"weight": direct("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))}


def is_dead_in_decoder(name: str, config: DecoderConfig) -> bool:
    """Rotary tables that old checkpoints carry, and a tied head's own copy, which transformers overwrites."""
    if config.tie_embeddings and name == "lm_head.weight":
        return True
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


def is_dead_in_tower(name: str, config: VisionConfig) -> bool:
    """What lies behind the selected hidden state; ``name`` is below ``vision_model.``."""
    if name.startswith(("post_layernorm.", "head.")) or name == "embeddings.position_ids":
        return True
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    return layer is not None and config.num_used_layers <= int(layer[1]) < config.num_layers


@dataclass(frozen=True)
class Translation:
    """A whole checkpoint: the source of every entry by component, and what is known to be of no use.

    ``sources`` has the components and ``embedding`` with the single entry ``weight``. ``is_dead`` says whether a tensor
    without a source is known to be unused. ``duplicates`` are further copies of used tensors, by the used one's name.
    """

    sources: dict[str, dict[str, Source]]
    is_dead: Callable[[str], bool]
    duplicates: dict[str, str] = field(default_factory=dict)
