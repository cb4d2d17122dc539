"""Tracing: names, values and axes of small modules, run on ONNX Runtime against PyTorch."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from intertitle.contract.targets import TARGETS, get_target
from intertitle.export.components import component_graph, lower
from intertitle.export.dialects import ort
from intertitle.export.graph_writer import WeightReader, serialize, write_weights
from intertitle.export.trace import Signature, TracedGraph, trace
from intertitle.models import attention
from torch import Tensor, nn

WIDTH = 8


class Block(nn.Module):
    """A linear layer, a parameter that is no layer, a computed buffer, and a list of inputs."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 6)
        self.twin = self.first
        self.scale = nn.Parameter(torch.ones(6))
        with torch.device("cpu"):
            self.register_buffer("table", torch.arange(6.0).sqrt(), persistent=False)

    def forward(self, x: Tensor, more: list[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.twin(x) + self.table
        return self.first(x) * self.scale, torch.cat([hidden, *more], dim=1)


SIGNATURE = Signature(
    (torch.zeros(2, 3, WIDTH), [torch.zeros(2, 4, 6), torch.zeros(2, 4, 6)]),
    ({0: "batch", 1: "length"}, [{0: "batch", 1: "extra"}, {0: "batch", 1: "extra"}]),
    ("x", "more.0", "more.1"),
    ("scaled", "joined"),
)


def on_meta(factory) -> nn.Module:
    with torch.device("meta"):
        return factory()


@pytest.fixture(scope="module")
def block() -> TracedGraph:
    return trace(on_meta(Block), SIGNATURE, ort.OrtAttention(), ort.OPSET)


def run(
    graph: TracedGraph, state: dict[str, Tensor], tmp_path, feeds: dict[str, np.ndarray], layers=None
) -> list[np.ndarray]:
    """Fill the graph with a state dict and run it."""
    with (tmp_path / "graph.data").open("wb") as file:
        list(write_weights(graph, file, "graph.data", WeightReader(state.__getitem__, layers)))
    (tmp_path / "graph.onnx").write_bytes(serialize(graph))
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def test_weights_are_named_as_the_state_dict(block):
    state = on_meta(Block).state_dict()
    entries = sorted(weight.entry.replace("twin.", "first.") for weight in block.weights.values())
    # A layer under two names is stored once, under either.
    assert entries == ["first.bias", "first.weight", "scale"]
    for name, weight in block.weights.items():
        shape = tuple(state[weight.entry].shape)
        assert weight.shape == (shape[::-1] if weight.transposed else shape)
        assert weight.transposed == name.endswith(".T") == weight.entry.endswith(".weight")
        assert name.removesuffix(".T") == weight.entry
        assert weight.dtype == ir.DataType.FLOAT
        initializer = block.model.graph.initializers[name]
        assert tuple(initializer.shape or ()) == weight.shape


def test_a_computed_buffer_keeps_its_value(block):
    assert "table" not in block.weights
    value = block.model.graph.initializers["table"].const_value
    assert value is not None
    assert np.array_equal(value.numpy(), np.sqrt(np.arange(6, dtype=np.float32)))


def test_inputs_outputs_and_axes_are_named(block):
    graph = block.model.graph

    def shapes(values):
        return {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in values}

    assert shapes(graph.inputs) == {
        "x": ["batch", "length", WIDTH],
        "more.0": ["batch", "extra", 6],
        "more.1": ["batch", "extra", 6],
    }
    outputs = shapes(graph.outputs)
    assert list(outputs) == ["scaled", "joined"]
    assert outputs["scaled"] == ["batch", "length", 6]
    assert outputs["joined"][0] == "batch"
    assert graph.name == "intertitle"


def test_nothing_is_transposed_and_nothing_tells_of_the_code(block):
    assert "Transpose" not in {node.op_type for node in block.model.graph}
    for node in block.model.graph:
        assert not node.metadata_props
        assert not node.doc_string
        assert not any(value.metadata_props for value in node.outputs)


def test_filled_with_weights_it_computes_what_the_module_does(tmp_path):
    torch.manual_seed(0)
    module = Block()
    graph = trace(on_meta(Block), SIGNATURE, ort.OrtAttention(), ort.OPSET)
    # Sizes that were not traced, one of them 1.
    x, more = torch.randn(1, 7, WIDTH), [torch.randn(1, 2, 6), torch.randn(1, 2, 6)]
    feeds = {"x": x.numpy(), "more.0": more[0].numpy(), "more.1": more[1].numpy()}
    ours = run(graph, dict(module.state_dict()), tmp_path, feeds)
    with torch.no_grad():
        theirs = module(x, more)
    for mine, reference in zip(ours, theirs, strict=True):
        assert np.allclose(mine, reference.numpy(), atol=1e-6)


class Tower(nn.Module):
    """Full attention with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return attention.current().full(self.query(x), self.key(x), self.value(x), 2, bias)


def test_attention_takes_the_form_of_the_dialect(tmp_path):
    torch.manual_seed(0)
    module, x, bias = Tower().eval(), torch.randn(3, 5, WIDTH), torch.randn(1, 2, 5, 5)
    signature = Signature((torch.zeros(2, 5, WIDTH), bias), ({0: "batch"}, {}), ("x", "bias"), ("y",))
    graph = trace(on_meta(Tower), signature, ort.OrtAttention(), ort.OPSET)
    assert [node.op_type for node in graph.model.graph].count("MultiHeadAttention") == 1
    (ours,) = run(graph, dict(module.state_dict()), tmp_path, {"x": x.numpy(), "bias": bias.numpy()})
    with torch.no_grad():
        assert np.allclose(ours, module(x, bias).numpy(), atol=1e-5)
    # Outside of the trace the reference is in force again.
    assert isinstance(attention.current(), attention.ReferenceAttention)


def test_the_exporter_is_silent_and_logging_is_as_before(capfd):
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(on_meta(Block), SIGNATURE, ort.OrtAttention(), ort.OPSET)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


def test_lowering_replaces_exact_types_only():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Special(4, 4), nn.Linear(4, 2)))
    lowered = lower(module, {nn.Linear: lambda linear: nn.Identity()})
    assert lowered is module
    assert [type(child) for child in lowered.modules() if not list(child.children())] == [
        nn.Identity,
        Special,
        nn.Identity,
    ]


@pytest.mark.parametrize(("width", "bias"), [(64, True), (100, False)])
def test_an_int4_layer(width, bias, tmp_path):
    """Two layers lowered: codes and scales in place of weights, widths that a block does not fill, optional biases."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, 48, bias=bias), nn.Tanh(), nn.Linear(48, 5, bias=bias))

    torch.manual_seed(0)
    module = build()
    signature = Signature((torch.zeros(2, width),), ({0: "rows"},), ("x",), ("y",))
    compiled = component_graph("decoder", on_meta(build), signature, get_target("cpu"), "int4")
    assert compiled.parameters == sum(parameter.numel() for parameter in module.parameters())
    entries = [weight.entry for weight in compiled.traced.weights.values()]
    leaves = ["qweight", "scales", *(["bias"] if bias else [])]
    assert sorted(entries) == sorted(f"{layer}.{leaf}" for layer in (0, 2) for leaf in leaves)
    assert [node.op_type for node in compiled.traced.model.graph].count("MatMulNBits") == 2
    x = torch.randn(7, width)
    (ours,) = run(compiled.traced, dict(module.state_dict()), tmp_path, {"x": x.numpy()}, compiled.stored)
    theirs = module(x).detach().numpy()
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert 1e-4 < error < 0.25


def test_targets():
    assert get_target("cpu") is TARGETS["cpu"]
    for name, target in TARGETS.items():
        assert target.name == name
        # Attention over a cache knows no float32 on ONNX Runtime's CUDA provider.
        assert ("fp32" in target.decoder_formats) == (name != "cuda")
        # MatMulNBits takes blocks of powers of two from 16.
        assert {size for sizes in target.block_sizes.values() for size in sizes} <= {16, 32, 64, 128, 256}
