"""A residual sum and its norm become one operator: a graph pass of the ``ort`` dialect.

    Add(x, y) ─▶ RMSNormalization      becomes      SkipSimplifiedLayerNormalization(x, y) ─▶ norm, sum

One row of a decode step has a few thousand values, so the cost of an operator is its start, not its arithmetic.
"""

from __future__ import annotations

import onnx_ir as ir


def fuse_residuals(model: ir.Model) -> int:
    """Fuse every sum that is followed by a norm; returns their number.

    Norms must be over the last axis, and sums must have two tensors of the same shape (residuals do). Every other
    reader of the sum, such as a second norm, still reads the same values. A sum that is an output of the graph stays.
    """
    fused = 0
    for norm in list(model.graph):
        if norm.op_type != "RMSNormalization" or norm.domain not in ("", "ai.onnx"):
            continue
        total, weight = norm.inputs[:2]
        if total is None or weight is None or weight.shape is None or len(weight.shape) != 1:
            continue
        add = total.producer()
        if add is None or add.op_type != "Add":
            continue
        if total.is_graph_output():
            continue
        _replace(model, add, norm)
        fused += 1
    if fused:
        model.opset_imports.setdefault("com.microsoft", 1)
    return fused


def _replace(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    total, normed = add.outputs[0], norm.outputs[0]
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain="com.microsoft",
        num_outputs=4,
    )
    # The kernel never computes outputs 1 and 2 (mean and inverse deviation), so they have no names.
    for output, old in ((node.outputs[0], normed), (node.outputs[3], total)):
        output.shape, output.type = old.shape, old.type
    node.outputs[1].name = node.outputs[2].name = ""
    model.graph.insert_before(add, node)
    total.replace_all_uses_with(node.outputs[3])
    normed.replace_all_uses_with(node.outputs[0])
    names = total.name, normed.name
    model.graph.remove([norm, add], safe=True)
    node.outputs[3].name, node.outputs[0].name = names
