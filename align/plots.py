"""How a training went, drawn from its logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import OptionError
from .train import read_log

STAGES = ("vision", "audio", "captions")
_WINDOW = 20


def draw_losses(work: Path, adapters: Mapping[str, Path], path: Path) -> Path:
    """The losses of the stages of ``work``, and what share of pairs each of ``adapters`` (by name) tells apart.

    Raises ``OptionError`` for a folder without the logs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    try:
        stages = {stage: read_log(work, stage) for stage in STAGES}
        tunings = {
            name: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for name, folder in adapters.items()
        }
    except OSError as error:
        raise OptionError(f"{error.filename}: {error.strerror}; give folders in which a training has run") from None
    for axis, (stage, lines) in zip(axes, stages.items(), strict=False):
        for key in ("loss", "validation_loss"):
            steps, losses = [line["step"] for line in lines], [line[key] for line in lines]
            axis.plot(steps, losses, marker=".", label=key.replace("_", " "))
        axis.set_title(f"training of {stage}")
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        axis.legend()
    for name, lines in tunings.items():
        right, ends = [line["accuracy"] for line in lines], range(_WINDOW, len(lines) + 1)
        axes[3].plot(ends, [sum(right[end - _WINDOW : end]) / _WINDOW for end in ends], label=name)
    axes[3].set_title("preference training")
    axes[3].set_xlabel("step")
    axes[3].set_ylabel(f"pairs told apart, mean of {_WINDOW} steps")
    axes[3].grid(alpha=0.3)
    if tunings:
        # Below the axes: among the lines there is no free corner.
        figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower right", ncols=len(tunings), fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
