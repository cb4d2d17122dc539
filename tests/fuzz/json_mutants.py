"""Mutations of JSON values: what a hand edit, bit rot or a liar would write."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400, -(2**63), 0.0, -0.0, 0.5, 1.5, 1e-300,
    1e308, float("inf"), float("-inf"), float("nan"), None, True, False, "", "x", "\0", "\ud800", "../x", "/etc/passwd",
    "é" * 9, "{", "%s", "{instruction}", "\x1b[31m", "\u202e", "a" * 70_000, [], {}, [[]], [None], {"": None},
    [1] * 999, "1", "true", "null", "float32", "int4", ".*", "(a+)+$", "[", "1e999",
)  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of ``value`` with some of its nodes changed, removed, moved or repeated."""
    value = copy.deepcopy(value)
    for _ in range(min(int(rng.expovariate(1.2)) + 1, 6)):
        holder, key = _pick(value, rng)
        if holder is None:
            return rng.choice(_ODD)
        _change(holder, key, value, rng)
    return value


def to_bytes(value: Any, rng: random.Random) -> bytes:
    """As JSON, sometimes in another form of the same."""
    try:
        text = json.dumps(value, indent=rng.choice((None, None, 1)), ensure_ascii=rng.random() < 0.7)
    except (ValueError, RecursionError):
        text = "{}"
    if rng.random() < 0.02:
        depth = rng.choice((50, 2000, 200_000))
        text = text.replace("null", "[" * depth + "]" * depth, 1)
    return text.encode("utf-8", "replace" if rng.random() < 0.5 else "surrogatepass")


def _pick(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container in ``value`` and a key of it; deeper ones as likely as shallow ones."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        # Long lists (a vocabulary) would hide everything else.
        for key in list(keys)[:64]:
            places.append((node, key))
            waiting.append(node[key])
    return rng.choice(places) if places else (None, None)


def _change(holder: Any, key: Any, root: Any, rng: random.Random) -> None:
    old = holder[key]
    way = rng.random()
    if way < 0.2:
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    elif way < 0.45:
        # Of the same type: a reader that checks types goes on.
        holder[key] = copy.deepcopy(rng.choice([odd for odd in _ODD if type(odd) is type(old)] or _ODD))
    elif way < 0.6:
        holder[key] = _near(old, rng)
    elif way < 0.75:
        del holder[key]
    elif way < 0.9:
        other, name = _pick(root, rng)
        holder[key] = copy.deepcopy(other[name]) if other is not None else None
    elif isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", "", "__class__", str(key).upper()))] = copy.deepcopy(old)
    else:
        holder.extend(copy.deepcopy([old] * rng.choice((1, 2, 50))))


def _near(old: Any, rng: random.Random) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old // 2, str(old), [old]))
    if isinstance(old, str):
        place = rng.randrange(len(old) + 1)
        return rng.choice((old[:place], old + old, old[:place] + "\n" + old[place:], old.upper(), [old], old + "\0"))
    if isinstance(old, list):
        return rng.choice((old[:-1], old + old, old[::-1], old[:1] * 3))
    return [old]
