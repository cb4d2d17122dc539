"""A caption is the same alone and in a batch only if the int4 kernel adds in one order however many rows there are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from intertitle.calibration.quantize import quantize_int4
from intertitle.contract.targets import TARGETS
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")

#: Widths of released decoders: Qwen2-0.5B, Qwen2-7B, Mistral-7B; and those of the fixtures.
WIDTHS = [128, 256, 896, 4864, 3584, 4096]


def product(width: int, block_size: int) -> onnxruntime.InferenceSession:
    """``MatMulNBits`` as the dialect emits it, from ``width`` to 96 channels."""
    weight = torch.randn(96, width, generator=torch.Generator().manual_seed(width))
    codes, scales = quantize_int4(weight, block_size)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=96,
        bits=4,
        block_size=block_size,
        accuracy_level=4,
    )
    tensors = [numpy_helper.from_array(codes.numpy(), "codes"), numpy_helper.from_array(scales.numpy(), "scales")]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", width), ("y", 96))
    ]
    graph = helper.make_graph([node], "product", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_does_not_depend_on_the_others(width):
    session = product(width, TARGETS["cpu"].block_sizes["int4"][0])
    x = np.random.default_rng(0).standard_normal((17, width)).astype(np.float32)
    alone = np.concatenate([session.run(None, {"x": row[np.newaxis]})[0] for row in x])
    for count in (2, 3, 4, 5, 8, 9, 16, 17):
        np.testing.assert_array_equal(session.run(None, {"x": x[:count]})[0], alone[:count])
