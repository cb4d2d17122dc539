"""The dialects of ONNX in which graphs are written, as records. ``export/dialects`` has their operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .formats import LAYOUTS, Layout


@dataclass(frozen=True)
class Dialect:
    """A dialect of ONNX.

    ``opset``: of ONNX's own operators. ``layouts``: for each format of weights, the name of its layout (``Layout``).
    ``engines``: TensorRT engines are built from its graphs.
    """

    name: str
    opset: int
    layouts: Mapping[str, str]
    engines: bool = False

    def layout(self, format: str) -> Layout:
        """How the weights of a format lie in its graphs."""
        return LAYOUTS[self.layouts[format]]


def graph_file(component: str, dialect: str) -> str:
    """The file of a component's graph in a bundle. The decoder's names the dialect, since it differs most."""
    return f"{component}.{dialect}.onnx" if component == "decoder" else f"{component}.onnx"


_PLAIN = {"fp32": "float32", "fp16": "float16"}
_ENGINES = {**_PLAIN, "int4": "int4_blocks", "int8": "int8_channels"}

DIALECTS = {
    each.name: each
    for each in (
        # ONNX Runtime's fused operators. The first opset with RMSNormalization; the rest needs no more than 21.
        Dialect("ort", 23, {**_PLAIN, "int4": "int4_nbits", "int8": "int8_nbits"}),
        # Operators of ONNX itself, which TensorRT's parser fuses. The first opset with TensorScatter.
        Dialect("standard", 24, _ENGINES, engines=True),
        # The same spelled out for TensorRT 10.3. The first opset with int4 and blocks.
        Dialect("plain", 21, _ENGINES, engines=True),
    )
}
