"""The shipped captioner's files in the package: base, adapter, the bundle compiled from them, a clip of the test split.

The checkpoint and the adapter lie in ``align/shipped``, which only a checkout has. The bundle and the clip lie in
``runtime/shipped``, which the wheel carries.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import OptionError
from ..export.compile import compile_bundle
from .scenes import captions, draw_scene, write_clip

_KEPT = ("adapter_config.json", "adapter_model.safetensors")
#: What the wheel may weigh is 12 MB; the bundle's files shrink by a third in it.
MOST_BUNDLE_BYTES = 15_000_000


def ship(
    base: Path,
    adapter: Path,
    package: Path,
    scene: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Write the shipped captioner below ``package``, the package's folder; returns the bytes of what the wheel carries.

    Written are ``align/shipped/base`` and ``align/shipped/synpo`` (unless ``base`` and ``adapter`` are these), their
    bundle ``runtime/shipped/captioner`` (decoder int4, encoders int8), and for a ``scene`` its clip ``clip.mp4``, the
    caption ``clip.txt`` and its index ``scene.txt``; without one the clip that is there stays. Other files (the model
    card) stay too. Raises ``OptionError`` where the bundle is larger than a package should be, and what
    ``compile_bundle`` raises.
    """
    trained, carried = package / "align" / "shipped", package / "runtime" / "shipped"
    if scene is None and not (carried / "clip.mp4").exists():
        raise OptionError(f"{carried}: there is no clip yet; choose its scene (--scene)")
    trained.mkdir(parents=True, exist_ok=True)
    carried.mkdir(parents=True, exist_ok=True)
    _copy(base, trained / "base")
    _copy(adapter, trained / "synpo", _KEPT)
    compiled = compile_bundle(
        trained / "base",
        carried / "captioner",
        adapter=trained / "synpo",
        weights="int4",
        encoder_weights="int8",
        overwrite=True,
        progress=progress,
    )
    if scene is not None:
        drawn = draw_scene("test", scene)
        write_clip(drawn, carried / "clip.mp4")
        (carried / "clip.txt").write_text(captions(drawn)[0] + "\n", encoding="utf-8")
        (carried / "scene.txt").write_text(f"test:{scene}\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in compiled.path.iterdir())
    if size > MOST_BUNDLE_BYTES:
        raise OptionError(f"the bundle takes {size / 1e6:.1f} MB; the wheel has room for {MOST_BUNDLE_BYTES / 1e6:.0f}")
    return sum(path.stat().st_size for path in carried.rglob("*") if path.is_file())


def _copy(source: Path, target: Path, names: tuple[str, ...] | None = None) -> None:
    """Replace ``target`` by the folder ``source``, or by these files of it; nothing where they are the same folder."""
    if target.exists() and target.samefile(source):
        return
    shutil.rmtree(target, ignore_errors=True)
    if names is None:
        shutil.copytree(source, target)
        return
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
