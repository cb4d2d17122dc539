"""A bundle's decoder with float32 matmuls, to tell a wrong graph from the rounding of the kernels.

``MatMulNBits`` at accuracy level 4 rounds the activations to int8. After 24 layers this changes the logits by about
2e-2, which would hide a wrong graph or wrong weights. The same graph and weights at level 0 come within 3e-6 (both
measured on a 0.5 B decoder with random weights).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import onnx

from ..runtime.bundle import Bundle
from ..runtime.inference import Inference
from ..runtime.ort import OrtInference, load_onnxruntime

#: float32 matmuls (com.microsoft.MatMulNBits: 0 leaves the choice to the kernel, 1 is float32, 4 int8 activations).
_FLOAT32 = 1


def accuracy_level(bundle: Bundle) -> int | None:
    """The coarsest accuracy level of the decoder's int4 matmuls; ``None`` if it has none."""
    return max((attribute.i for attribute in _levels(_decoder_graph(bundle))), default=None)


class ExactDecoder:
    """The decoder of an int4 bundle at float32 accuracy."""

    def __init__(self, bundle: Bundle) -> None:
        onnxruntime = load_onnxruntime()
        model = _decoder_graph(bundle)
        for attribute in _levels(model):
            attribute.i = _FLOAT32
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The graph comes from memory, its weights from the bundle's own file.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.fspath(bundle.path.resolve())
        )
        self._bundle = bundle
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def open(self, rows: int, max_length: int) -> Inference:
        """A new cache."""
        return OrtInference(self._session, self._bundle.manifest.decoder, self._bundle.embed, rows, max_length)


def _decoder_graph(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.file(bundle.manifest.components["decoder"].graph), load_external_data=False)


def _levels(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """The ``accuracy_level`` of every int4 matmul."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield from (attribute for attribute in node.attribute if attribute.name == "accuracy_level")
