"""What a device wants of a bundle: one frozen record each. The rest of the code asks the record, never a name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import TargetError
from .dialects.forms import Form


@dataclass(frozen=True)
class Target:
    """A device class that bundles are compiled for.

    ``dialect`` names the form of the graphs; ``decoder_weights`` the formats ``--weights`` may ask for, the default
    first; ``block_size`` the input channels that share a scale in a quantized weight. Blocks of 32 on a CPU: larger
    ones are faster (a step at the 0.5 B shape takes 0.88 of the time with 64, 0.75 with 128), but there ONNX Runtime's
    kernels for one row and for several round differently, and a caption would depend on what shares its batch.
    ``block_sizes`` are those that may be asked for. ``component_weights`` is the format of all components but the
    decoder, except that ``--weights fp32`` means all of them. ``half``: products are in float16, unless the weights are
    fp32. ``selection``: candidates are found on the device (``selection.py``). ``engines``: the graphs are built into
    engines before they run.
    """

    name: str
    dialect: str
    decoder_weights: tuple[str, ...]
    block_size: int
    block_sizes: tuple[int, ...] = (32, 64, 128)
    component_weights: str = "fp32"
    half: bool = False
    selection: bool = False
    engines: bool = False

    def weights_of(self, component: str, decoder_weights: str) -> str:
        """The format of a component's weights, where the decoder's is ``decoder_weights``."""
        if component == "decoder" or decoder_weights == "fp32":
            return decoder_weights
        return self.component_weights

    def form(self, weights: str) -> Form:
        """How a component of that format is written."""
        half = self.half and weights != "fp32"
        return Form(weights, self.block_size, torch.float16 if half else torch.float32)


def _engines(name: str, dialect: str) -> Target:
    # fp32 is for comparing with PyTorch: TensorRT's fused attention is float16 only.
    return Target(
        name=name,
        dialect=dialect,
        decoder_weights=("int4", "fp16", "fp32"),
        block_size=32,
        component_weights="fp16",
        half=True,
        selection=True,
        engines=True,
    )


TARGETS = {
    "cpu": Target(name="cpu", dialect="ort", decoder_weights=("int4", "fp32"), block_size=32),
    # No fp32: ONNX Runtime's fused attention over a cache knows none on a GPU.
    "cuda": Target(
        name="cuda",
        dialect="ort",
        decoder_weights=("int4", "fp16"),
        block_size=32,
        component_weights="fp16",
        half=True,
        selection=True,
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
