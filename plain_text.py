"""Text of captions and file names, made fit for a terminal, a line or a subtitle file.

A caption comes from a model and a file name from a stranger, so either may hold control characters. A terminal obeys
them: they clear the screen, set the title or reorder what was written. Here they become visible escapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: What ``str.splitlines`` takes for the end of a line.
_LINE_ENDS = re.compile("\r\n|[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")

#: What a terminal, an editor or a player acts on: C0 (but for tab and line feed), DEL and C1; invisible format
#: characters, among them all that change the direction of the text (UAX #9); tags; halves of surrogate pairs. The zero
#: width joiner and non-joiner stay: emoji, Persian and the scripts of India are written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff\ud800-\udfff]"
)


def safe(text: str) -> str:
    """``text`` with control characters as escapes like ``\\x1b``.

    Every kind of line break becomes ``\\n``. Tabs stay.
    """
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], _LINE_ENDS.sub("\n", text))


def safe_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """``safe`` for text that comes in pieces: the pieces together are ``safe`` of the whole text."""
    held = ""
    for piece in pieces:
        piece, held = held + piece, ""
        if piece.endswith("\r"):
            # The line feed of a CR LF may be in the next piece.
            piece, held = piece[:-1], "\r"
        if piece:
            yield safe(piece)
    if held:
        yield safe(held)


def flat(text: str) -> str:
    """``safe`` text on one line and in one column: a line break or a tab becomes a space."""
    return safe(text).replace("\n", " ").replace("\t", " ")


def one_line(text: object) -> str:
    """A name or a message on one line: line breaks and whatever is not printable as escapes like ``\\n``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def safe_json(text: str) -> str:
    """JSON ``text`` that means the same, with unsafe characters of its strings as ``\\u`` escapes.

    ``text`` is already escaped where JSON demands it (U+0000 to U+001F); its own line breaks stay.
    """

    def escape(found: re.Match[str]) -> str:
        units = found[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))

    return _UNSAFE.sub(escape, text)
