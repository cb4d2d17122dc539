"""The shipped captioner's folder: base, adapter, a clip of the test split, and what is in it."""

from __future__ import annotations

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
