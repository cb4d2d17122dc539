"""What a device wants of a bundle: one frozen record each. The rest of the code asks the record, never a name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..contract.records import Positions
from ..errors import OptionError, TargetError
from .dialects.forms import Form

#: Input channels that share a scale of an int8 matmul, if it has blocks. 8 bits are exact enough for large blocks, and
#: ONNX Runtime's kernel is faster: at 729 rows of a tower's matmuls 0.43 to 0.64 of the time of float32, against 0.56
#: to 0.94 with blocks of 32 (one thread, a busy machine).
INT8_BLOCK = 128


@dataclass(frozen=True)
class Target:
    """A device class that bundles are compiled for.

    ``dialect`` names the form of the graphs; ``decoder_weights`` the formats ``--weights`` may ask for, the default
    first; ``block_size`` the input channels that share a scale in a quantized weight. Blocks of 32 on a CPU: larger
    ones are faster (a step at the 0.5 B shape takes 0.88 of the time with 64, 0.75 with 128), but there ONNX Runtime's
    kernels for one row and for several round differently, and a caption would depend on what shares its batch.
    ``block_sizes`` are those that may be asked for. ``encoder_weights`` are the formats of all components but the
    decoder, the default first, except that ``--weights fp32`` means all of them unless another is asked for. ``half``:
    matmuls are in float16, unless the weights are fp32. ``selection``: candidates are found on the device
    (``selection.py``). ``engines``: the graphs are built into engines before they run. ``head_multiple``: what the size
    of the decoder's attention heads is a multiple of. ``rotary_multiple``: the same of heads with rotary embedding
    inside the attention kernel; for others the graph takes positions and rotates before the kernel.
    """

    name: str
    dialect: str
    decoder_weights: tuple[str, ...]
    block_size: int
    block_sizes: tuple[int, ...] = (32, 64, 128)
    encoder_weights: tuple[str, ...] = ("fp32", "int8")
    half: bool = False
    selection: bool = False
    engines: bool = False
    head_multiple: int = 1
    rotary_multiple: int = 1

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
        names, decoder = self.decoder_weights, self.decoder_weights[0] if decoder is None else decoder
        if decoder not in names:
            raise OptionError(f"target '{self.name}' takes weights {' or '.join(names)}, not '{decoder}'")
        if encoders is None:
            return decoder, decoder if decoder == "fp32" else self.encoder_weights[0]
        known = dict.fromkeys((*self.encoder_weights, *(name for name in names if name == "fp32")))
        if encoders not in known:
            raise OptionError(f"target '{self.name}' takes encoder weights {' or '.join(known)}, not '{encoders}'")
        return decoder, encoders

    def form(self, weights: str) -> Form:
        """How a component of that format is written."""
        half = self.half and weights != "fp32"
        block_size = INT8_BLOCK if weights == "int8" else self.block_size
        return Form(weights, block_size, torch.float16 if half else torch.float32)


def _engines(name: str, dialect: str) -> Target:
    # fp32 is for comparing with PyTorch: TensorRT's fused attention is float16 only.
    return Target(
        name=name,
        dialect=dialect,
        decoder_weights=("int4", "fp16", "fp32"),
        block_size=32,
        encoder_weights=("fp16", "int8"),
        half=True,
        selection=True,
        engines=True,
    )


TARGETS = {
    "cpu": Target(
        name="cpu", dialect="ort", decoder_weights=("int4", "fp32"), block_size=32, head_multiple=8, rotary_multiple=16
    ),
    # No fp32: ONNX Runtime's fused attention over a cache knows none on a GPU.
    "cuda": Target(
        name="cuda",
        dialect="ort",
        decoder_weights=("int4", "fp16"),
        block_size=32,
        encoder_weights=("fp16", "int8"),
        half=True,
        selection=True,
        head_multiple=8,
        rotary_multiple=16,
    ),
    "tensorrt-rtx": _engines("tensorrt-rtx", "standard"),
    "tensorrt": _engines("tensorrt", "standard"),
    # JetPack 6.
    "tensorrt-10.3": _engines("tensorrt-10.3", "plain"),
}


def get_target(name: str) -> Target:
    """The record of a target; ``TargetError`` names the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise TargetError(f"unknown target '{name}'; known: {', '.join(TARGETS)}") from None
