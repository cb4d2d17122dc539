"""How a stage becomes a component: the axes of its inputs, and graphs of stages with several inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from intertitle.contract.pipeline import (
    EachUnit,
    ImagePlan,
    OneSound,
    Pipeline,
    Sampling,
    Stage,
    StageInput,
    Unit,
    Variant,
    WholeClip,
    Window,
)
from intertitle.contract.targets import get_target
from intertitle.export.components import component_graph, stage_signature
from intertitle.export.graph_writer import WeightReader, serialize, write_weights
from intertitle.models.stages import run_stage
from intertitle.runtime.encoder import Encoder, Units
from intertitle.runtime.ort import OrtComponent
from intertitle.runtime.timing import Stages
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn

WIDTH = 6


def stage(name: str, unit: Unit, *sources: str, **more: Any) -> Stage:
    inputs = tuple(StageInput(f"from_{source}", source) for source in sources)
    return Stage(name=name, unit=unit, inputs=inputs, output=f"{name}_tokens", tokens=more.pop("tokens", 4), **more)


def pipeline(*stages: Stage) -> Pipeline:
    image = ImagePlan("exact", 8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Pipeline(sampling=Sampling(rule="centered", count=5), image=image, stages=stages, prompts={})


TOWER = stage("tower", EachUnit(), "pixels")
VALUES = {
    "pixels": torch.zeros(2, 3, 8, 8),
    "sound": torch.zeros(1, 30, 7),
    "tower": torch.zeros(2, 4, WIDTH),
    "other": torch.zeros(2, 9, 3),
}


@pytest.mark.parametrize(
    ("unit", "sources", "shapes"),
    [
        (EachUnit(), ["pixels"], [["frames", 3, 8, 8]]),
        (EachUnit(), ["tower"], [["frames", 4, WIDTH]]),
        (Window(3, 2, 1), ["tower"], [["slots", 3, 4, WIDTH]]),
        (WholeClip(), ["tower"], [["frames", 4, WIDTH]]),
        (OneSound(), ["sound"], [[1, 30, 7]]),
        (EachUnit(), ["tower", "other"], [["frames", 4, WIDTH], ["frames", 9, 3]]),
        (Window(2, 2), ["other", "pixels"], [["slots", 2, 9, 3], ["slots", 2, 3, 8, 8]]),
    ],
)
def test_the_axes_of_the_inputs(unit, sources, shapes):
    last = stage("last", unit, *sources)
    made = stage_signature(last, pipeline(TOWER, stage("other", EachUnit(), "pixels", tokens=9), last), VALUES)
    assert made.inputs == tuple(f"from_{source}" for source in sources)
    assert made.outputs == ("last_tokens",)
    found = [
        [axes.get(place, size) for place, size in enumerate(value.shape)]
        for value, axes in zip(made.arguments, made.axes, strict=True)
    ]
    assert found == shapes
    # torch.export takes a 1 for a constant; the sound is one.
    if unit != OneSound():
        assert all(value.shape[0] > 1 for value in made.arguments)


@pytest.mark.parametrize(("unit", "place"), [(EachUnit(), 1), (WholeClip(), 1), (Window(2, 2), 2)])
@pytest.mark.parametrize("counts", [(4,), (4, 2)])
def test_tokens_vary_where_the_source_has_forms_with_other_numbers_of_them(unit, place, counts):
    variants = tuple(Variant(keep=1 / (i + 1), graph=f"{i}", tokens=count) for i, count in enumerate(counts))
    merging = stage("tower", EachUnit(), "pixels", variants=variants)
    # A stage between them gives as many as it takes; one of a fixed number gives no more and no fewer.
    between, fixed = stage("other", EachUnit(), "tower", tokens=None), stage("fixed", EachUnit(), "tower", tokens=9)
    values = VALUES | {"fixed": torch.zeros(2, 9, WIDTH)}
    whole = pipeline(merging, between, fixed)
    for source, varies in (("tower", len(counts) > 1), ("other", len(counts) > 1), ("fixed", False), ("pixels", False)):
        axes = stage_signature(stage("last", unit, source), whole, values).axes[0]
        assert axes.get(place) == ("tokens" if varies else None), source


class Both(nn.Module):
    """Each token of one input meets the mean of the other one's unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(3, 16)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        axes = (1, 2) if others.ndim == 4 else (1,)
        return self.first(tokens if tokens.ndim == 3 else tokens.mean(1)) + self.second(others.mean(axes)).unsqueeze(1)


@pytest.mark.parametrize("unit", [EachUnit(), Window(2, 1, 1)])
@pytest.mark.parametrize("orders", [([0, 1, 1, 0, 2], [0, 1, 1, 0, 2]), ([0, 1, 1, 0, 2], [2, 2, 1, 0, 0])])
def test_a_stage_with_two_inputs(unit, orders, tmp_path):
    """Traced, written and run on distinct units, against PyTorch on all of them."""
    torch.manual_seed(0)
    last = stage("last", unit, "tower", "other")
    signature = stage_signature(last, pipeline(TOWER, stage("other", EachUnit(), "pixels", tokens=9), last), VALUES)
    module = Both().eval().requires_grad_(False)
    with torch.device("meta"):
        hollow = Both().eval().requires_grad_(False)
    traced = component_graph("last", hollow, signature, get_target("cpu"), "fp32").traced
    with (tmp_path / "last.data").open("wb") as file:
        for _ in write_weights(traced, file, "last.data", WeightReader(module.state_dict().__getitem__, {})):
            pass
    (tmp_path / "last.onnx").write_bytes(serialize(traced))
    component = OrtComponent(tmp_path / "last.onnx")
    values = {"tower": torch.randn(3, 4, WIDTH), "other": torch.randn(3, 9, 3)}
    given = [Units(value.numpy(), np.array(order)) for value, order in zip(values.values(), orders, strict=True)]
    sizes = SimpleNamespace(visual=list, tokens=lambda *_: 500)
    backend: Any = SimpleNamespace(component=lambda *_: component)
    records = {"last": SimpleNamespace(graph="last.onnx")}
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(pipeline=sizes, components=records))
    found = Encoder(bundle, Tokenizer(BPE()), backend).run_stage(last, given, Stages())
    expanded = {name: value[order] for (name, value), order in zip(values.items(), orders, strict=True)}
    theirs = run_stage(last, module, expanded).numpy()
    assert theirs.shape == (unit.count(5), 4, 16)
    np.testing.assert_allclose(found.expand(), theirs, atol=1e-5)
    # Equal pairs of units, and equal windows of them, were computed once.
    assert len(found.values) <= (3 if orders[0] == orders[1] else 5) or unit != EachUnit()
