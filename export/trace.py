"""Tracing: a module on the meta device becomes an ONNX graph whose large weights are still only names.

The parameters are fake tensors while ``torch.onnx.export`` runs, so that tracing a 7 B decoder costs as much memory as
tracing a tiny one; the writer fills the initializers in afterwards, one at a time.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..models import attention


@dataclass(frozen=True)
class Weight:
    """An initializer to be filled in: which state-dict entry of the module it is, and whether transposed."""

    entry: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class TracedGraph:
    """A graph without its weights.

    ``weights`` maps an initializer's name to what fills it; the initializers not in it hold their (small or computed)
    values already.
    """

    model: ir.Model
    weights: dict[str, Weight]


@dataclass(frozen=True)
class Signature:
    """How a module is called while it is traced.

    ``arguments`` are its positional arguments (tensors, or lists of tensors); ``axes`` has the same structure with, in
    place of each tensor, the names of the axes that may vary: ``{0: "batch"}``. ``inputs`` and ``outputs`` name the
    graph's inputs and outputs, lists flattened.
    """

    arguments: tuple[Any, ...]
    axes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(module: nn.Module, signature: Signature, attention_form: attention.Attention, opset: int) -> TracedGraph:
    """Trace one call of ``module``.

    Its parameters and buffers on the meta device become ``TracedGraph.weights``, an initializer's name being that of
    the state-dict entry (with ``.T`` where it is stored transposed); buffers that are real keep their values. The
    module is not usable afterwards.
    """
    entries = {name for name, value in _state(module).items() if value.is_meta}
    _fake_meta_tensors(module)
    dims: dict[str, Any] = {}
    with torch.no_grad(), attention.use(attention_form), _quiet():
        program = torch.onnx.export(
            module.eval(),
            signature.arguments,
            dynamo=True,
            dynamic_shapes=_named_dims(signature.axes, dims),
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    graph = TracedGraph(program.model, {})
    for name, value in graph.model.graph.initializers.items():
        if name in entries:
            assert value.shape is not None
            assert value.dtype is not None
            graph.weights[name] = Weight(name, value.dtype, _static(value.shape))
    _fold_transposes(graph)
    _strip(graph.model)
    return graph


def _strip(model: ir.Model) -> None:
    """Drop stack traces and module paths: they tell of the machine that compiled, which is nobody's business."""
    for node in model.graph:
        for described in (node, *node.outputs):
            described.metadata_props.clear()
            described.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "intertitle"


def _static(shape: ir.Shape) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise RuntimeError(f"a weight has a shape that is not fixed: {shape}")
    return sizes


def _named_dims(axes: Any, dims: dict[str, Any]) -> Any:
    """The structure of ``axes`` with one ``torch.export.Dim`` for each name, shared wherever the name recurs."""
    if isinstance(axes, dict):
        return {axis: dims.setdefault(label, torch.export.Dim(label)) for axis, label in axes.items()}
    return type(axes)(_named_dims(item, dims) for item in axes)


def _state(module: nn.Module) -> dict[str, Tensor]:
    # A tensor that two modules share counts under both names: the export chooses one of them.
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _fake_meta_tensors(module: nn.Module) -> None:
    """Meta tensors become fake CPU ones in place: the export must not see two devices."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    replaced: dict[int, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is None or not value.is_meta:
                    continue
                if id(value) not in replaced:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                    is_parameter = isinstance(value, nn.Parameter)
                    replaced[id(value)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
                table[name] = replaced[id(value)]  # type: ignore[assignment]


def _fold_transposes(graph: TracedGraph) -> None:
    """``MatMul(x, Transpose(w))`` of a linear layer: store w transposed instead of transposing it at every load."""
    model = graph.model
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.name not in graph.weights:
            continue
        weight = graph.weights[source.name]
        perm = node.attributes["perm"].as_ints()
        if len(weight.shape) != 2 or list(perm) != [1, 0]:
            continue
        name = f"{source.name}.T"
        if name not in model.graph.initializers:
            shape = (weight.shape[1], weight.shape[0])
            folded = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(weight.dtype))
            # The writer replaces this; an initializer must have some value to be registered.
            folded.const_value = ir.LazyTensor(
                _never_read, dtype=weight.dtype, shape=ir.Shape(shape), name=name, cache=False
            )
            model.graph.initializers[name] = folded
            graph.weights[name] = Weight(weight.entry, weight.dtype, shape, transposed=True)
        node.outputs[0].replace_all_uses_with(model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        if not source.uses():
            del model.graph.initializers[source.name]
            del graph.weights[source.name]


def _never_read() -> ir.TensorProtocol:
    raise RuntimeError("an initializer was read before the writer filled it in")


@contextmanager
def _quiet():
    """The exporter's warnings are about its own workings; nothing in them is for the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
