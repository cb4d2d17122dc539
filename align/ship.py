"""The shipped captioner's folder: base, adapter, a clip of the test split, and what is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import OptionError
from .scenes import captions, draw_scene, write_clip

_KEPT = ("adapter_config.json", "adapter_model.safetensors")
MOST_BYTES = 40_000_000


def ship(base: Path, adapter: Path, scene: int, folder: Path) -> int:
    """Write ``base/``, ``synpo/``, ``clip.mp4``, ``clip.txt`` and ``scene.txt`` into ``folder``; returns its bytes.

    What of these is there is replaced; other files (the model card) stay. Raises ``OptionError`` where base and adapter
    are larger than a package should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("base", "synpo"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(base, folder / "base")
    (folder / "synpo").mkdir()
    for name in _KEPT:
        shutil.copyfile(adapter / name, folder / "synpo" / name)
    drawn = draw_scene("test", scene)
    write_clip(drawn, folder / "clip.mp4")
    (folder / "clip.txt").write_text(captions(drawn)[0] + "\n", encoding="utf-8")
    (folder / "scene.txt").write_text(f"test:{scene}\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise OptionError(f"base and adapter take {size / 1e6:.1f} MB; the package has room for {MOST_BYTES / 1e6:.0f}")
    return size


def draw_losses(work: Path, adapters: dict[str, Path], path: Path) -> Path:
    """A plot of the stages' losses and of the tunings' margins, from their logs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .train import read_log

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, stage in zip(axes, ("vision", "audio", "captions"), strict=False):
        lines = read_log(work, stage)
        for key in ("loss", "validation_loss"):
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], marker=".", label=key)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.legend()
    for name, folder in adapters.items():
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        window = 20
        means = [sum(line["accuracy"] for line in lines[i : i + window]) / window for i in range(len(lines) - window)]
        axes[3].plot(range(window, len(lines)), means, label=name)
    axes[3].set_title("pairs told apart (20 steps)")
    axes[3].set_xlabel("step")
    axes[3].legend()
    figure.savefig(path, dpi=100)
    return path
