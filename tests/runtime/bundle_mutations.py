"""Bundles that lie: a number, a text or bytes of a file changed, and every hash made right again.

``outcome`` is what a user would do with one: load it and caption a clip.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from intertitle import Captioner, Decoding
from intertitle.errors import IntertitleError

#: What a changed number becomes: next to it, multiples, and what overflows something.
_NUMBERS = (0, 1, 2, 3, -1, 7, 64, 255, 1000, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, 0.5, 1e-300, 1e300)
_FRAMES = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), dtype=np.uint8)


def mutate_manifest(manifest: dict[str, Any], chance: random.Random) -> str:
    """Change one or two values of a ``bundle.json`` in place; what was changed."""
    said = []
    for _ in range(chance.choice((1, 1, 2))):
        # Most of a manifest are the inputs and outputs of its graphs, which are compared with the graphs' own.
        aside = ("files", "provenance", "components") if chance.random() < 0.8 else ("files", "provenance")
        places = [path for path in _leaves(manifest) if path[0] not in aside]
        path = chance.choice(places)
        tree = manifest
        for key in path[:-1]:
            tree = tree[key]
        old = tree[path[-1]]
        if isinstance(old, bool):
            new: Any = not old
        elif isinstance(old, (int, float)):
            near = (old + 1, old - 1, old * 2, old // 2, old * 10)
            new = chance.choice(near if chance.random() < 0.5 else _NUMBERS)
        elif isinstance(old, str):
            new = chance.choice(("", "x", old * 1000, old + "x", "{instruction}", "\u202e\x00"))
        else:
            new = chance.choice((1, "x", [], {}))
        tree[path[-1]] = new
        said.append(f"{path} {str(old)[:40]!r} -> {str(new)[:40]!r}")
    return "; ".join(said)


def mutate_file(data: bytes, chance: random.Random) -> bytes:
    """A few bytes of a file changed, cut out or doubled."""
    changed, flips = bytearray(data), chance.random() < 0.6
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(max(1, len(changed)))
        kind = 3 if flips else chance.randrange(3)
        if kind == 0 and changed:
            changed[place % len(changed)] = chance.randrange(256)
        elif kind == 1:
            del changed[place : place + chance.randrange(1, 64)]
        elif kind == 2:
            changed[place:place] = changed[place : place + chance.randrange(1, 64)]
        elif changed:
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def write_mutant(bundle: Path, place: Path, seed: int) -> str:
    """A mutant of ``bundle`` at ``place``, the same for the same seed; what was changed.

    Half of them have another manifest, the others another tokenizer or graph.
    """
    chance = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    for name in manifest["files"]:
        os.link(bundle / name, place / name)
    if chance.random() < 0.5:
        said = mutate_manifest(manifest, chance)
    else:
        names = [name for name in sorted(manifest["files"]) if name.endswith((".onnx", ".json"))]
        name = chance.choice(names)
        data = mutate_file((bundle / name).read_bytes(), chance)
        (place / name).unlink()
        (place / name).write_bytes(data)
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        said = name
    (place / "bundle.json").write_text(json.dumps(manifest))
    return f"seed {seed}: {said}"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values that hold no others."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return [path]
    return [leaf for key, value in items for leaf in _leaves(value, (*path, key))]


def outcome(bundle: Path) -> str:
    """``captioned``, or the class of ours that was raised; anything else that is raised comes through."""
    try:
        captioner = Captioner.load(bundle, threads=1)
        captioner.caption(frames=_FRAMES, decoding=Decoding(max_new_tokens=3))
    except IntertitleError as error:
        message = str(error)
        return type(error).__name__ if message.isprintable() and len(message) < 1500 else f"message {message!r}"
    return "captioned"
