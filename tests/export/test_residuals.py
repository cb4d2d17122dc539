"""The pass that joins a residual sum with the norm of it, run against the graph that it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from intertitle.export.dialects.residuals import fuse_residuals
from onnx import TensorProto, helper, numpy_helper


def graph(nodes: list, outputs: dict[str, int]) -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(np.linspace(0.5, 1.5, 8, dtype=np.float32), "weight"),
        numpy_helper.from_array(np.linspace(1.5, -0.5, 8, dtype=np.float32), "other"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3, 8]) for name in ("x", "y")]
    shaped = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3, size]) for name, size in outputs.items()
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, shaped, weights),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


def norm(source: str, weight: str, target: str) -> onnx.NodeProto:
    return helper.make_node("RMSNormalization", [source, weight], [target], axis=-1, epsilon=1e-5)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, 3, 8)).astype(np.float32) for name in ("x", "y")}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def fused(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    lifted = ir.from_proto(model)
    count = fuse_residuals(lifted)
    after = ir.to_proto(lifted)
    onnx.checker.check_model(after)
    return after, count


RESIDUAL = [
    helper.make_node("Add", ["x", "y"], ["sum"]),
    norm("sum", "weight", "normed"),
    helper.make_node("Mul", ["normed", "sum"], ["out"]),
]


def test_the_sum_stays_available():
    model = graph(RESIDUAL, {"out": 8})
    after, count = fused(model)
    assert count == 1
    assert [node.op_type for node in after.graph.node] == ["SkipSimplifiedLayerNormalization", "Mul"]
    for new, old in zip(run(after), run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        pytest.param([norm("x", "weight", "out")], {"out": 8}, id="no sum"),
        pytest.param(RESIDUAL[:2], {"normed": 8, "sum": 8}, id="the sum is an output"),
    ],
)
def test_left_alone(nodes, outputs):
    model = graph(nodes, outputs)
    after, count = fused(model)
    assert count == 0
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in model.graph.node]


def test_two_norms_of_one_sum():
    """The first takes the sum in; the second reads what it gives."""
    nodes = [*RESIDUAL[:2], norm("sum", "other", "again"), helper.make_node("Mul", ["normed", "again"], ["out"])]
    model = graph(nodes, {"out": 8})
    after, count = fused(model)
    assert count == 1
    for new, old in zip(run(after), run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)
