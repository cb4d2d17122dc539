"""The ids of special tokens, from the files that declare them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .checkpoint import Checkpoint


def token_id(checkpoint: Checkpoint, content: str | None) -> int | None:
    """The id of a special token, ``None`` where no file of the tokenizer says.

    Asked are ``tokenizer_config.json``, ``added_tokens.json`` and ``tokenizer.json``, in this order.
    """
    for found, name in _declared(checkpoint):
        if name == content and isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            return found
    return None


def _declared(checkpoint: Checkpoint) -> Iterator[tuple[Any, Any]]:
    """Ids and contents as the files have them."""
    decoder = (checkpoint.json("tokenizer_config.json") or {}).get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and str(key).isdecimal():
            yield int(key), token.get("content")
    for name, found in (checkpoint.json("added_tokens.json") or {}).items():
        yield found, name
    listed = (checkpoint.json("tokenizer.json") or {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict):
            yield token.get("id"), token.get("content")
