"""How many tokens a checkpoint's tokenizer has, told from its files without loading it."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint


def tokenizer_length(checkpoint: Checkpoint) -> int:
    """``len(tokenizer)`` of transformers: the vocabulary, and the added tokens that are not in it.

    Read from ``vocab.json`` or ``tokenizer.json``. Raises CheckpointError where the folder has neither.
    """
    vocabulary = checkpoint.json("vocab.json")
    fast = checkpoint.json("tokenizer.json") or {}
    if vocabulary is None:
        vocabulary = _inner(fast, "model").get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: no vocab.json and no vocabulary in tokenizer.json; copy the released tokenizer there"
        )
    settings = checkpoint.json("tokenizer_config.json") or {}
    added = fast.get("added_tokens")
    listed = [*_inner(settings, "added_tokens_decoder").values(), *(added if isinstance(added, list) else [])]
    contents = (token.get("content") for token in listed if isinstance(token, dict))
    names = {*(checkpoint.json("added_tokens.json") or {}), *(text for text in contents if isinstance(text, str))}
    return len(names | vocabulary.keys())


def _inner(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}
