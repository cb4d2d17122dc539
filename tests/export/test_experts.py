"""Experts in graphs: each one takes only its tokens, and no token depends on the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from intertitle.calibration.recipe import Rounding, component_rules
from intertitle.contract.targets import get_target
from intertitle.export.components import component_graph
from intertitle.export.dialects.fused import read_fused
from intertitle.export.graph_writer import WeightReader, serialize, write_weights
from intertitle.export.trace import Signature
from intertitle.models.config import DecoderConfig
from intertitle.models.decoder import SparseMLP, choose_experts
from intertitle.runtime.graph_check import check_graph
from torch import Tensor, nn

WIDTH, EXPERTS = 128, 8
CONFIG = DecoderConfig(WIDTH, 96, 1, 4, 4, 32, 10, 1e-5, 1e4, 16, num_experts=EXPERTS, experts_per_token=2)


class Layer(nn.Module):
    """The layer has to be a child of what is lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SparseMLP(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in Layer().state_dict().items()}


@pytest.fixture
def session(tmp_path, state) -> Callable[..., onnxruntime.InferenceSession]:
    """``session(target, weights, tensors)``: the layer as that target has it."""

    def make(target: str, weights: str, tensors: dict[str, Tensor] | None = None) -> onnxruntime.InferenceSession:
        with torch.device("meta"):
            module = Layer().eval().requires_grad_(False)
        signature = Signature((torch.zeros(2, 5, WIDTH),), ({0: "rows", 1: "length"},), ("x",), ("y",))
        record = get_target(target)
        compiled = component_graph("layer", module, signature, record, weights)
        graph, reader = compiled.traced, WeightReader(read_fused((tensors or state).__getitem__), compiled.stored)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with (folder / "layer.data").open("wb") as file:
            size = sum(write_weights(graph, file, "layer.data", reader))
        (folder / "layer.onnx").write_bytes(serialize(graph))
        # What a bundle's graph may hold.
        check_graph((folder / "layer.onnx").read_bytes(), "layer.data", size)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        return onnxruntime.InferenceSession(folder / "layer.onnx", options, providers=["CPUExecutionProvider"])

    return make


def reference(state: dict[str, Tensor], x: np.ndarray, rounding: Rounding | None = None) -> np.ndarray:
    layer = Layer()
    layer.load_state_dict(state)
    if rounding is not None:
        rounding.apply(layer)
    with torch.no_grad():
        return layer(torch.from_numpy(x)).numpy()


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, length, WIDTH)).astype(np.float32)


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


#: Largest errors: float16 rounds to 1e-3; MatMulNBits on a CPU rounds activations to int8.
CASES = [
    ("cpu", "fp32", 1e-5),
    ("cpu", "int4", 3e-2),
    ("cuda", "fp16", 3e-3),
    ("cuda", "int4", 3e-3),
    ("tensorrt-rtx", "fp32", 1e-5),
    ("tensorrt-rtx", "fp16", 3e-3),
    ("tensorrt-rtx", "int4", 3e-3),
    ("tensorrt-10.3", "fp32", 1e-5),
    ("tensorrt-10.3", "int4", 3e-3),
]


@pytest.mark.parametrize(("target", "weights", "bound"), CASES)
def test_every_form_is_the_layer(target, weights, bound, session, state):
    record = get_target(target)
    rounding = Rounding(record.dialect, "layer", tuple(component_rules("layer", Layer(), record, weights)))
    graph = session(target, weights)
    for rows, length in ((1, 1), (1, 40), (3, 1), (2, 7)):
        x = tokens(rows, length, seed=rows * length)
        (mine,) = graph.run(None, {"x": x})
        assert relative_error(mine, reference(state, x, rounding)) < bound


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_a_token_does_not_depend_on_the_others(weights, session):
    """Not in one bit: alone, in a batch, and in a prompt."""
    graph, x = session("cpu", weights), tokens(17, 1)
    alone = np.concatenate([graph.run(None, {"x": row[np.newaxis]})[0] for row in x])
    for count in (2, 3, 5, 8, 16, 17):
        np.testing.assert_array_equal(graph.run(None, {"x": x[:count]})[0], alone[:count])
    np.testing.assert_array_equal(graph.run(None, {"x": x.swapaxes(0, 1)})[0][0], alone[:, 0])


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_an_expert_that_is_not_chosen_is_not_read(weights, session, state):
    """Its weights are not numbers. If a step multiplied anything with them, the result would not be one either."""
    x = tokens(2, 1)
    scores = torch.from_numpy(x).flatten(0, 1) @ state["mlp.gate.weight"].T
    chosen = {int(each) for each in choose_experts(scores, 2)[1].flatten()}
    assert 2 <= len(chosen) < EXPERTS
    graph = session("cpu", weights)
    (before,) = graph.run(None, {"x": x})

    def without(experts: set[int]) -> np.ndarray:
        broken = {
            name: value * torch.inf if "experts." in name and int(name.split(".")[2]) in experts else value
            for name, value in state.items()
        }
        return session("cpu", weights, broken).run(None, {"x": x})[0]

    np.testing.assert_array_equal(without(set(range(EXPERTS)) - chosen), before)
    # And the other way round: one that is chosen shows.
    assert not np.isfinite(without({min(chosen)})).all()
