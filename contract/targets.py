"""What a device class wants of a bundle: one frozen record each. The rest of the code asks the record, never a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import OptionError, TargetError
from .dialects import DIALECTS
from .formats import FORMATS
from .records import Positions


@dataclass(frozen=True)
class Target:
    """A device class that bundles are compiled for.

    ``dialect``: of its graphs. ``devices``: where its bundles run, the best first. ``decoder_formats``: the formats
    that ``--weights`` may ask for, the default first. ``encoder_formats``: those of all other components, the default
    first; a format with ``everywhere`` that is asked for the decoder is the default instead. ``block_sizes``: for each
    format with blocks, the input channels that may share a scale, the default first. ``matmul``: the type of the inputs
    and outputs of matmuls, unless their weights have a type of their own that is wider. ``selection``: candidates are
    found on the device (``export/selection.py``). ``head_multiple``: the size of the decoder's attention heads is a
    multiple of this. ``rotary_multiple``: the same of heads with rotary embedding inside the attention kernel; for
    others the graph takes positions and rotates before the kernel. ``version``: of the runtime, for a reader.
    """

    name: str
    dialect: str
    devices: tuple[str, ...]
    decoder_formats: tuple[str, ...]
    encoder_formats: tuple[str, ...]
    block_sizes: Mapping[str, tuple[int, ...]] = field(hash=False)
    matmul: str = "float32"
    selection: bool = False
    head_multiple: int = 1
    rotary_multiple: int = 1
    version: str = ""

    @property
    def engines(self) -> bool:
        """Whether the graphs are built into engines before they run."""
        return DIALECTS[self.dialect].engines

    def matmul_type(self, name: str) -> str:
        """The type of the inputs and outputs of matmuls in a component of that format, and of its cache."""
        return FORMATS[name].dtype or self.matmul

    def unquantized(self, name: str) -> str:
        """The format of the layers that stay unquantized in a component of that format."""
        kind = self.matmul_type(name)
        return next(each.name for each in FORMATS.values() if each.dtype == kind)

    def block_size(self, name: str) -> int | None:
        """The default block size of a format; ``None`` if its layout has no blocks."""
        return self.block_sizes[name][0] if name in self.block_sizes else None

    def positions(self, positions: Positions, head_dim: int) -> Positions:
        """How a decoder learns positions here, if its family says ``positions``.

        ``TargetError`` for a decoder whose attention heads the runtime cannot take: better before the work.
        """
        if head_dim % self.head_multiple:
            raise TargetError(
                f"target '{self.name}' takes attention heads whose size is a multiple of {self.head_multiple}, but the "
                f"decoder's have {head_dim}"
            )
        return "explicit" if head_dim % self.rotary_multiple else positions

    def check_weights(self, decoder: str | None, encoders: str | None) -> tuple[str, str]:
        """The formats of decoder and encoders; ``None`` takes the default. ``OptionError`` for a format that the
        target does not have."""
        decoder = self.decoder_formats[0] if decoder is None else decoder
        if decoder not in self.decoder_formats:
            raise OptionError(f"target '{self.name}' takes weights {_either(self.decoder_formats)}, not '{decoder}'")
        if encoders is None:
            return decoder, decoder if FORMATS[decoder].everywhere else self.encoder_formats[0]
        if encoders not in self.encoder_formats:
            known = _either(self.encoder_formats)
            raise OptionError(f"target '{self.name}' takes encoder weights {known}, not '{encoders}'")
        return decoder, encoders

    def check_block_size(self, decoder: str, block_size: int | None) -> int | None:
        """The block size of the decoder's format; ``None`` takes the default. ``OptionError`` for one that the format
        does not have on this target."""
        if block_size is None:
            return self.block_size(decoder)
        if block_size not in self.block_sizes.get(decoder, ()):
            named = [name for name in self.decoder_formats if name in self.block_sizes]
            known = ", ".join(str(size) for name in named for size in sorted(self.block_sizes[name]))
            raise OptionError(
                f"a block size is for {_either(named)} weights, one of {known}: not {block_size} for {decoder}"
            )
        return block_size


def _either(names: tuple[str, ...] | list[str]) -> str:
    return " or ".join(names)


#: Blocks of 32 on a CPU: larger ones are faster (a step at the 0.5 B shape takes 0.88 of the time with 64, 0.75 with
#: 128), but there ONNX Runtime's kernels for one row and for several round differently, and a caption would depend on
#: what shares its batch. 8 bits are exact enough for large blocks, and the kernel is faster: at 729 rows of a tower's
#: matmuls 0.43 to 0.64 of the time of float32, against 0.56 to 0.94 with blocks of 32 (one thread, a busy machine).
_ORT_BLOCKS = MappingProxyType({"int4": (32, 64, 128), "int8": (128,)})
#: Their int8 weights have a scale for each output channel.
_ENGINE_BLOCKS = MappingProxyType({"int4": (32, 64, 128)})


def _engines(name: str, dialect: str, devices: tuple[str, ...], version: str = "") -> Target:
    # fp32 is for comparing with PyTorch: TensorRT's fused attention is float16 only.
    return Target(
        name=name,
        dialect=dialect,
        devices=devices,
        decoder_formats=("int4", "fp16", "fp32"),
        encoder_formats=("fp16", "int8", "fp32"),
        block_sizes=_ENGINE_BLOCKS,
        matmul="float16",
        selection=True,
        version=version,
    )


TARGETS = {
    each.name: each
    for each in (
        Target(
            name="cpu",
            dialect="ort",
            devices=("cpu",),
            decoder_formats=("int4", "fp32"),
            encoder_formats=("fp32", "int8"),
            block_sizes=_ORT_BLOCKS,
            # GroupQueryAttention with rotary inside, on every device.
            head_multiple=8,
            rotary_multiple=16,
        ),
        # No fp32: ONNX Runtime's fused attention over a cache knows none on a GPU.
        Target(
            name="cuda",
            dialect="ort",
            devices=("cuda", "cpu"),
            decoder_formats=("int4", "fp16"),
            encoder_formats=("fp16", "int8"),
            block_sizes=_ORT_BLOCKS,
            matmul="float16",
            selection=True,
            head_multiple=8,
            rotary_multiple=16,
        ),
        # The graphs of the first two are the same; of their devices, the one that was asked for is first.
        _engines("tensorrt-rtx", "standard", ("tensorrt-rtx", "tensorrt")),
        _engines("tensorrt", "standard", ("tensorrt", "tensorrt-rtx"), "10.15 or later"),
        _engines("tensorrt-10.3", "plain", ("tensorrt-10.3",), "JetPack 6"),
    )
}


def get_target(name: str) -> Target:
    """The record of a target; ``TargetError`` names the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise TargetError(f"unknown target '{name}'; known: {', '.join(TARGETS)}") from None
