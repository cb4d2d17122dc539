"""The text side of a captioner, with ``tokenizers`` alone: the tokenizer, UTF-8 text out, stop strings."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import BundleError, OptionError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How sentencepiece spells the 256 tokens of its byte fallback."""

#: Normalizers of released captioners replace a space by one character and put one in front.
_MOST_GROWTH = 256


def check_text(name: str, value: str) -> str:
    """``value``, if it is text that can be encoded. ``OptionError`` otherwise, naming the argument ``name``.

    A lone surrogate is what Python makes of bytes in an argument that are not UTF-8.
    """
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text (str), not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} is not valid Unicode text: character {error.start + 1} is half a pair") from None
    return value


def load_tokenizer(path: Path) -> Tokenizer:
    """A bundle's tokenizer. ``BundleError`` for a file that is none, or that makes much of little.

    Whatever the file says, nothing is cut off or padded.
    """
    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        growth = 1 if tokenizer.normalizer is None else _growth(json.loads(tokenizer.normalizer.__getstate__()))
    except BaseException as error:
        # tokenizers raises bare Exceptions, and pyo3's PanicException, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{path}: not a tokenizer: {str(error)[:200]}") from None
    if growth > _MOST_GROWTH:
        raise BundleError(f"{path}: its normalizer makes texts {growth} times as long")
    return tokenizer


def _growth(step: dict) -> int:
    """How much longer a normalizer can make a text of one character."""
    if step["type"] == "Sequence":
        return math.prod(_growth(inner) for inner in step["normalizers"])
    return max(1, len(step.get("content") or "")) + len(step.get("prepend") or "")


class IncrementalDecoder:
    """Token ids to text, piece by piece, each piece complete UTF-8.

    The pieces of ``push`` and the one of ``finish``, joined, equal ``tokenizer.decode(ids, skip_special_tokens=True)``
    for any ids, those included that spell invalid UTF-8 or that the tokenizer does not know. A push costs the same
    however long the text is. What cannot be shown yet is held back: an unfinished UTF-8 sequence; under sentencepiece's
    byte fallback a whole run of byte tokens, because one invalid byte turns every byte of the run into U+FFFD.

    Raises ``BundleError`` for a tokenizer whose decoder cannot work piece by piece.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skipped = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        steps = _decoder_steps(tokenizer)
        self._utf8: codecs.IncrementalDecoder | None = None
        if [step["type"] for step in steps] == ["ByteLevel"]:
            # Python and Rust replace invalid UTF-8 alike: one U+FFFD for each maximal subpart (Unicode 3.9).
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        elif not _is_piecewise(steps):
            kinds = ", ".join(step["type"] for step in steps)
            raise BundleError(f"tokenizer.json: its decoder ({kinds}) cannot turn tokens into text one at a time")
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        # The last token shown and what follows it: the first token of a text is decoded differently (its leading space
        # goes), so new tokens are always decoded behind one that was shown.
        self._window: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(_byte_level_bytes(token))
        self._window.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return ""
        piece = self._decode(self._window)[len(self._shown) :]
        self._window = [token_id]
        self._shown = self._decode(self._window)
        return piece

    def finish(self) -> str:
        """What was held back, invalid bytes as U+FFFD. The decoder is then ready for another text."""
        if self._utf8 is not None:
            piece = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return piece
        piece = self._decode(self._window)[len(self._shown) :]
        self._window, self._shown = [], ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Holds text back until no stop string can begin in it, and ends the text before the first one completed.

    The result does not depend on how the text is cut into pieces. Raises ``OptionError`` for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise OptionError("a stop string is empty: give at least one character, or none at all")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """``(emit, stopped)``: the text to show, and whether a stop string has been seen (then nothing follows)."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            # The one that ends first is the one that a reader of single characters would have seen first; of two that
            # end together the longer.
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """The text held back when the tokens end without a stop string. Ready for another text after it."""
        held, self._held, self._stopped = self._held, "", False
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` (and is shorter than it)."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _decoder_steps(tokenizer: Tokenizer) -> list[dict]:
    """The tokenizer's decoder as ``tokenizer.json`` describes it, a sequence of steps."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _is_piecewise(steps: list[dict]) -> bool:
    """Whether the text of a token depends on no other token but the one before, runs of byte tokens aside."""
    fused = False
    for step in steps:
        kind = step["type"]
        fused = fused or kind == "Fuse"
        if kind == "Strip":
            # Cutting one character at the front only touches the first token; at the end it would touch what is shown.
            if step["stop"] != 0 or step["start"] > 1:
                return False
        elif kind == "Replace":
            if fused or not step["content"] or "String" not in step["pattern"]:
                return False
        elif kind not in ("ByteFallback", "Fuse", "Metaspace"):
            return False
    return True


def _byte_level_table() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2 ``bytes_to_unicode``).

    Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token with other characters stands for its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
