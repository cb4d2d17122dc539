"""What of a caption or a file name reaches a terminal. The judge is the Unicode database, not the module's table."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.plain_text import flat, one_line, safe, safe_json, safe_pieces

#: Whatever a terminal obeys, beside ordinary text and scripts that are written with joiners.
HOSTILE = st.text(
    st.one_of(
        st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]),
        st.characters(),
        st.sampled_from("\r\n\x1b\x9b\x07\u202e\u2066\u2028\x85\v\f"),
    )
)

#: Bidirectional classes of the characters that change direction (UAX #9), and the two marks that have none.
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def obeyed(character: str) -> bool:
    """Whether a terminal or a pager may act on a character."""
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in DIRECTIONS
        or character in "\u200e\u200f\u061c"
    )


@given(HOSTILE)
def test_nothing_that_a_terminal_obeys_comes_through(text: str):
    assert not [c for c in safe(text) if obeyed(c) and c not in "\n\t"]
    assert not [c for c in flat(text) if obeyed(c)]
    # No line break is left that some reader knows and others do not.
    assert safe(text).splitlines() == safe(text).removesuffix("\n").split("\n") * bool(safe(text))
    assert one_line(text).isprintable()


@given(HOSTILE, st.lists(st.integers(0, 40)))
def test_pieces_are_the_whole(text: str, cuts: list[int]):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert "".join(safe_pieces(pieces)) == safe(text)


@given(st.dictionaries(HOSTILE, HOSTILE | st.lists(HOSTILE)))
def test_json_says_the_same(value: dict[str, object]):
    text = safe_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value
    assert not [c for c in text if obeyed(c) and c != "\n"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("A dog.\nIt barks.\tTwice. é 犬 \u3000全角", "A dog.\nIt barks.\tTwice. é 犬 \u3000全角"),
        ("\x1b[2J\x1b]0;title\x07a", "\\x1b[2J\\x1b]0;title\\x07a"),
        ("\x9b31ma\x9d", "\\x9b31ma\\x9d"),
        ("cat\u202egpj.exe\u2069", "cat\\u202egpj.exe\\u2069"),
        ("a\r\nb\rc\vd\fe\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh"),
        # A family of three and a Persian prefix are written with joiners.
        ("\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c", "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c"),
    ],
)
def test_by_hand(text: str, shown: str):
    assert safe(text) == shown
    assert flat(text) == shown.replace("\n", " ").replace("\t", " ")


def test_a_sequence_that_is_split_over_pieces():
    assert "".join(safe_pieces(["a\x1b", "[31mred", "\r", "\nb\r"])) == "a\\x1b[31mred\nb\n"
