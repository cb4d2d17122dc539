"""The formats of weights, the tensors in which a graph stores them, and the rules that give each layer its format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from msgspec import Meta

from .records import Name, Positive, Record


@dataclass(frozen=True)
class Format:
    """A format of the weights of matmuls.

    ``bits``: of one stored weight, without its share of a scale. ``dtype``: the type of a weight that is stored as it
    is; ``None`` for a quantized one, which is stored as codes and scales. ``everywhere``: if it is asked for the
    decoder, all components get it unless another format is asked for them.

    ``near_tie``: two logits that are closer than this, relative to the largest one, count as a tie in ``verify``.
    ``tolerance``: the largest difference of the output of a component, relative to the reference's largest magnitude,
    where it is not that of float32: the kernel rounds more than the weights. That of an unquantized format is for all
    components with matmuls of its type.
    """

    name: str
    bits: int
    near_tie: float
    dtype: str | None = None
    everywhere: bool = False
    tolerance: float | None = None

    @property
    def quantized(self) -> bool:
        return self.dtype is None


FORMATS = {
    each.name: each
    for each in (
        # For comparing with PyTorch.
        Format("fp32", bits=32, near_tie=1e-4, dtype="float32", everywhere=True),
        # float16 matmuls: at most 2e-3 on the fixtures; deeper models have more.
        Format("fp16", bits=16, near_tie=2e-2, dtype="float16", tolerance=2e-2),
        # Each logit may be off by 2.5e-2, because the kernel rounds activations to int8. ``verify`` runs the decoder
        # with float32 matmuls (``exact_decoder``), so its tolerance is that of float32.
        Format("int4", bits=4, near_tie=5e-2),
        # The kernel rounds activations to int8: at most 3e-2 on the encoders of the fixtures. They change the prompt.
        Format("int8", bits=8, near_tie=5e-2, tolerance=1e-1),
    )
}

#: The type of a scale that has the type of the matmul's inputs.
MATMUL_TYPE = "matmul"


@dataclass(frozen=True)
class Layout:
    """How the weights of one format lie in a graph.

    ``tensors``: the initializers of a layer, in place of ``weight`` and in the order in which they are encoded.
    ``types``: their element types; ``MATMUL_TYPE`` is the type of the matmul's inputs. ``blocks``: a scale is for a
    block of input channels, otherwise (for a quantized format) for an output channel. ``whole_blocks``: a block must
    divide the number of input channels.
    """

    name: str
    format: str
    tensors: tuple[str, ...]
    types: tuple[str, ...]
    blocks: bool = False
    whole_blocks: bool = False


LAYOUTS = {
    each.name: each
    for each in (
        Layout("float32", "fp32", ("weight",), ("float32",)),
        Layout("float16", "fp16", ("weight",), ("float16",)),
        # com.microsoft.MatMulNBits. Its scales may be negative.
        Layout("int4_nbits", "int4", ("qweight", "scales"), ("uint8", MATMUL_TYPE), blocks=True),
        Layout("int8_nbits", "int8", ("qweight8", "scales8"), ("uint8", MATMUL_TYPE), blocks=True),
        # DequantizeLinear of ONNX. TensorRT takes positive scales only.
        Layout("int4_blocks", "int4", ("codes", "factors"), ("int4", "float16"), blocks=True, whole_blocks=True),
        Layout("int8_channels", "int8", ("codes8", "factors8"), ("int8", "float16")),
    )
}

FormatName = Annotated[str, Meta(pattern=f"^({'|'.join(FORMATS)})$")]
"""A format's name in a manifest."""


class Rule(Record, frozen=True, kw_only=True):
    """One line of a recipe: the linear layers of a component that match a pattern get a format.

    ``component``: a stage of the pipeline or ``decoder``. ``pattern``: as ``fnmatch`` reads it, over the layer's name
    in that component (``layers.*.mlp.down_proj``); ``*`` matches dots too. ``block_size``: the input channels that
    share a scale, if the layout has blocks. The first rule that matches decides.
    """

    component: Name
    pattern: Annotated[str, Meta(min_length=1, max_length=300)]
    format: FormatName
    block_size: Positive | None = None


def decide(recipe: Iterable[Rule], component: str, layer: str) -> Rule:
    """The rule of a linear layer. ``LookupError`` if no rule matches: a recipe ends with a rule for ``*``."""
    for rule in recipe:
        if rule.component == component and fnmatchcase(layer, rule.pattern):
            return rule
    raise LookupError(f"the recipe has no rule for the layer {layer} of {component}")


def block_size_of(recipe: Sequence[Rule], component: str) -> int | None:
    """The block size of the component's format: that of its last rule, which is for all layers without a rule of their
    own. ``None`` if the layout has no blocks or the component no rule."""
    return next((rule.block_size for rule in reversed(recipe) if rule.component == component), None)


def block_size_problem(name: str, block_size: int | None) -> str | None:
    """What is wrong with the block size that a manifest states for a format; ``None`` if nothing is."""
    blocks = {layout.blocks for layout in LAYOUTS.values() if layout.format == name}
    return None if (block_size is not None) in blocks else f"{name} weights with block size {block_size}"
