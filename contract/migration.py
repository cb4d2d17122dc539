"""``bundle.json`` of an older schema version, as one of today's. Works on JSON objects, before they are checked.

A migration raises ``KeyError``, ``TypeError``, ``AttributeError`` or ``IndexError`` for an object that was never a
manifest of its version; the caller makes one line of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]


def from_version_2(old: Json) -> Json:
    """Version 2 knew one pipeline: a tower frame by frame, one of three connectors, sound behind the last block."""
    new = {key: value for key, value in old.items() if key not in ("preprocessing", "prompts", "visual")}
    new["schema_version"] = 3
    spec, visual, components = old["preprocessing"], old["visual"], old["components"]
    stages = _visual_stages(visual, components)
    sound = spec.get("audio")
    if sound is not None:
        stages.append(
            _stage("audio", "sound", {"type": "sound"}, components, sound["num_tokens"]),
        )
        sound = {key: value for key, value in sound.items() if key != "num_tokens"}
    new["pipeline"] = {
        "sampling": {"rule": spec["frame_rule"], "count": spec["num_frames"]},
        "image": spec["image"],
        "sound": sound,
        "stages": stages,
        "prompts": {
            mode: {"pieces": _pieces(mode, prompt, visual.get("per_frame", False))}
            for mode, prompt in old["prompts"].items()
        },
    }
    return new


#: What makes of a version the next one.
MIGRATIONS: dict[int, Callable[[Json], Json]] = {2: from_version_2}


def _stage(name: str, source: str, unit: Json, components: Json, tokens: int | None) -> Json:
    """A stage of version 2: its graph has one input and one output."""
    graph = components[name]
    return {
        "name": name,
        "unit": unit,
        "inputs": [{"name": graph["inputs"][0]["name"], "source": source}],
        "output": graph["outputs"][0]["name"],
        "tokens": tokens,
    }


def _visual_stages(visual: Json, components: Json) -> list[Json]:
    each = {"type": "frame"}
    vision = _stage("vision", "pixels", each, components, None)
    patches = components["vision"]["outputs"][0]["shape"][1]
    ratios = visual.get("ratios", [])
    vision["tokens"] = ratios[0]["tokens_per_block"] if ratios else patches
    vision["variants"] = [
        {"keep": ratio["keep"], "graph": ratio["graph"], "tokens": ratio["tokens_per_block"]} for ratio in ratios
    ]
    stages, source = [vision], "vision"
    if "frame_connector" in components:
        stages.append(_stage("frame_connector", source, each, components, None))
        source = "frame_connector"
    if visual.get("per_frame"):
        unit, tokens = each, None if ratios else visual["tokens_per_block"]
    elif visual.get("pooled"):
        unit, tokens = {"type": "clip"}, visual["tokens_per_block"]
    else:
        kernel = visual.get("time_kernel", 1)
        unit = {"type": "window", "kernel": kernel, "stride": kernel, "padding": visual.get("time_padding", 0)}
        tokens = components["connector"]["outputs"][0]["shape"][1]
    return [*stages, _stage("connector", source, unit, components, tokens)]


def _pieces(mode: str, prompt: Json, per_frame: bool) -> list[Json]:
    bos = prompt.get("bos_token_id")
    pieces: list[Json] = [] if bos is None else [{"type": "ids", "ids": [bos]}]
    pieces.append({"type": "text", "text": prompt["prefix"]})
    if mode != "audio":
        separator = prompt.get("separator", "")
        pieces.append(
            {"type": "each", "stage": "connector", "separator": separator}
            if per_frame
            else {"type": "tokens", "stage": "connector"}
        )
    if mode in ("audio", "audiovideo"):
        # The sound follows the pictures without anything between.
        pieces.append({"type": "tokens", "stage": "audio"})
    return [*pieces, {"type": "text", "text": prompt["suffix"]}]
