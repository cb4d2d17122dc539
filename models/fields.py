"""Typed access to a JSON object from a checkpoint, every complaint naming the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

_REQUIRED: Any = object()
#: No size in a config is larger; a hostile one must not exhaust the memory.
_LARGEST = 1 << 21
MOST_LAYERS = 1000
MOST_EXPERTS = 1000
_SHOWN = 80


def shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Fields:
    """The keys of one JSON object. A key that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, ``default`` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def _require(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return value

    def integer(self, key: str, default: int = _REQUIRED, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """A whole number from ``minimum`` to ``maximum``."""
        value = self._require(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise CheckpointError(
                f"{self.where}: {key} must be a whole number from {minimum} to {maximum}, not {shown(value)}"
            )
        return value

    def number(self, key: str, default: float = _REQUIRED, least: float = 1e-30, most: float = 1e30) -> float:
        """A number from ``least`` to ``most``, by default any positive one that float32 holds well."""
        value = self._require(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise CheckpointError(
                f"{self.where}: {key} must be a number from {least:g} to {most:g}, not {shown(value)}"
            )
        return float(value)

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """A string."""
        value = self._require(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} must be a string, not {shown(value)}")
        return value

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """true or false."""
        value = self._require(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} must be true or false, not {shown(value)}")
        return value

    def child(self, key: str) -> Fields | None:
        """A nested object, None where it is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} must be an object, not {shown(value)}")
        return Fields(value, f"{self.where}: {key}")
