"""Matmuls in float16, everything else in float32, and the graph passes for this.

Linear layers, convolutions and attention take and give float16. Residual sums, norms, rotary embedding and activations
stay in float32, because Qwen2's residual stream exceeds float16. If the runtime does not fuse the operators between two
matmuls of an MLP, they are float16 too (``narrow_activations``, ``fused.HalfMLP``).
"""

from __future__ import annotations

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from ...contract.formats import LAYOUTS
from ..trace import TracedGraph, Weight

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
#: Tensors of layouts whose elements are int4.
_INT4_CODES = {
    tensor
    for layout in LAYOUTS.values()
    for tensor, kind in zip(layout.tensors, layout.types, strict=True)
    if kind == "int4"
}


class Half(nn.Module):
    """A linear layer or a convolution in float16 between float32 neighbours. It has the names of the original."""

    def __init__(self, original: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.weight = half_parameter(original.weight)
        self.bias = None if original.bias is None else half_parameter(original.bias)
        # The tuple hides the module from torch: its own parameters do not belong to the graph.
        self._original = (original,)

    def forward(self, x: Tensor) -> Tensor:
        (original,) = self._original
        if isinstance(original, nn.Linear):
            return F.linear(x.half(), self.weight, self.bias).float()
        return original._conv_forward(x.half(), self.weight, self.bias).float()


def half_parameter(parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape on the same device in float16."""
    return nn.Parameter(torch.empty_like(parameter, dtype=torch.float16), requires_grad=False)


def finish(graph: TracedGraph) -> None:
    """Graph passes of the dialect, in place.

    Constants are computed (TensorRT needs axes as constants), but not those that depend on weights, which are missing
    at this point. int4 codes get their type. Casts that undo or repeat each other are removed.
    """
    lacking = set(graph.weights)

    def should_fold(node: ir.Node) -> bool | None:
        if lacking & {value.name for value in node.inputs if value is not None}:
            return False
        # Store tables (such as rotary ones) in the type in which they are used, whatever their size.
        return True if node.op_type == "Cast" else None

    fold_constants(graph.model, should_fold=should_fold)
    RemoveUnusedNodesPass()(graph.model)
    initializers = graph.model.graph.initializers
    for name, weight in list(graph.weights.items()):
        if name not in initializers:
            del graph.weights[name]
        elif weight.entry.rpartition(".")[2] in _INT4_CODES:
            initializers[name].type = ir.TensorType(ir.DataType.INT4)
            graph.weights[name] = Weight(weight.entry, ir.DataType.INT4, weight.shape, weight.transposed)
    fold_casts(graph.model)
    # TensorRT names layers after nodes and values, and refuses two layers with the same name.
    for index, node in enumerate(graph.model.graph):
        node.name = f"{node.op_type}.{index}"


def fold_casts(model: ir.Model) -> int:
    """Remove casts that change nothing; returns their number.

    A cast from float16 to float32 and back gives the same bits. A second cast of a value to the same type repeats the
    first.
    """
    folded, known = 0, dict[tuple[ir.Value, ir.DataType | None], ir.Value]()
    for node in list(model.graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or source is None or output.is_graph_output():
            continue
        inner = source.producer()
        if inner is not None and inner.op_type == "Cast" and inner.inputs[0] is not None:
            types = inner.inputs[0].dtype, source.dtype, output.dtype
            same = inner.inputs[0] if types == (_HALF, _SINGLE, _HALF) else None
        else:
            same = None
        if same is None:
            same = known.setdefault((source, output.dtype), output)
        if same is output or output.dtype is None:
            continue
        output.replace_all_uses_with(same)
        model.graph.remove(node, safe=True)
        if not source.uses() and inner is not None and inner.op_type == "Cast" and not source.is_graph_output():
            known.pop((inner.inputs[0], source.dtype), None)  # type: ignore[arg-type]
            model.graph.remove(inner, safe=True)
        folded += 1
    return folded


def narrow_activations(model: ir.Model) -> int:
    """Compute GELU between two float16 matmuls in float16, without the two casts; returns the number of changes.

    This is for a runtime that fuses nothing into the end of a matmul. There, the cost of a pointwise operator is its
    memory traffic. GELU gives no larger values than it takes, so float16 does not overflow.
    """
    narrowed = 0
    for node in list(model.graph):
        widened = node.inputs[0] if node.op_type == "Gelu" else None
        cast, output = widened and widened.producer(), node.outputs[0]
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or cast.inputs[0].dtype != _HALF:
            continue
        readers = [use.node for use in output.uses()]
        if output.is_graph_output() or any(
            each.op_type != "Cast" or each.outputs[0].dtype != _HALF for each in readers
        ):
            continue
        node.replace_input_with(0, cast.inputs[0])
        output.type = ir.TensorType(_HALF)
        for each in readers:
            each.outputs[0].replace_all_uses_with(output)
            model.graph.remove(each, safe=True)
        if not cast.outputs[0].uses():
            model.graph.remove(cast, safe=True)
        narrowed += 1
    return narrowed
