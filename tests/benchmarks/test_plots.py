"""The two plots: every line and point has its name in a legend, and no texts overlap."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from intertitle.align.plots import STAGES, draw_losses
from intertitle.benchmarks.caption_quality import draw
from intertitle.benchmarks.harness import RESULTS
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.legend import Legend


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, which would be closed."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    return drawn


def texts(figure: Figure) -> list[str]:
    """The entries of all legends, once nothing is found to overlap: legends, titles, labels of axes, annotations."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(legend for axis in figure.axes if (legend := axis.get_legend()) is not None)]
    boxes: list[tuple[str, object]] = [("legend", legend.get_window_extent()) for legend in figure.legends]
    for axis in figure.axes:
        parts = [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        boxes += [(part.get_text(), part.get_window_extent()) for part in parts if part.get_text()]
        boxes += [("axes", axis.get_window_extent())] if not axis.texts else []
    for (a, one), (b, other) in combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)  # type: ignore[attr-defined]
    return [entry.get_text() for legend in legends for entry in _entries(legend)]


def _entries(legend: Legend) -> list[object]:
    return list(legend.get_texts())


def test_quality(tmp_path: Path, figures: list[Figure]):
    rows = json.loads((RESULTS / "caption-quality.json").read_text())["settings"]
    assert draw(rows, tmp_path / "a.png").stat().st_size > 10_000
    (figure,) = figures
    assert [name.partition(": ")[2] for name in texts(figure)] == [name for name in rows if name != "pytorch"]
    looks = {
        (line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines() if line.get_marker() in "os^DvP"
    }
    assert len(looks) == len(rows) - 1


def test_losses(tmp_path: Path, figures: list[Figure]):
    for stage in STAGES:
        lines = ({"step": 10 * n, "loss": 1 / n, "validation_loss": 2 / n} for n in range(1, 9))
        (tmp_path / f"{stage}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    adapters = {name: tmp_path / name for name in ("synpo-0.0003-120-0", "dpo-0.0003-120-0", "leanpo-0.0003-120-0")}
    for folder in adapters.values():
        folder.mkdir()
        (folder / "log.jsonl").write_text("\n".join(json.dumps({"accuracy": n % 2}) for n in range(60)))
    draw_losses(tmp_path, adapters, tmp_path / "a.png")
    (figure,) = figures
    assert texts(figure) == [*adapters, *["loss", "validation loss"] * 3]
