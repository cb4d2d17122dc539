"""Streamed text against the tokenizers' own whole-text decoding."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.errors import BundleError, OptionError
from intertitle.runtime.text import IncrementalDecoder, StopStrings
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

DATA = Path(__file__).parents[1] / "data"


def fixture_tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(DATA / name / "tokenizer.json"))


def sentencepiece_like(**decoder: object) -> Tokenizer:
    """Llama-shaped: three specials, 256 byte tokens, pieces with and without the leading-space mark."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁a", "a", "b", "é", "▁été", "日", "▁the", "the", "\ufffd", "▁<0x", "x▁y", "\n"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.add_tokens([AddedToken("<tool> é▁", normalized=False)])
    tokenizer.decoder = decoder.get("decoder", llama_decoder())  # type: ignore[assignment]
    return tokenizer


def llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def byte_level() -> Tokenizer:
    tokenizer = fixture_tokenizer("av-qwen2")
    tokenizer.add_tokens([AddedToken("<tool é日>"), AddedToken("▁ ")])
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


# --- incremental decoding

BYTE_LEVEL = byte_level()
LLAMA = sentencepiece_like()
METASPACE = sentencepiece_like(decoder=decoders.Metaspace())
UNDECODED = sentencepiece_like(decoder=None)
GEMMA = sentencepiece_like(
    decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
)
TOKENIZERS = [BYTE_LEVEL, LLAMA, METASPACE, UNDECODED, GEMMA]


BYTE_CHARACTERS = bytes_to_unicode()


def spelled(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The ids that spell bytes, one byte a token."""
    if tokenizer is BYTE_LEVEL:
        return [tokenizer.token_to_id(BYTE_CHARACTERS[byte]) for byte in text]
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text]


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    size = tokenizer.get_vocab_size()
    any_id = st.integers(0, size + 3)
    text = st.text(max_size=6).map(lambda text: spelled(tokenizer, text.encode()))
    # Half of a character, then something else, is what a model does when it goes wrong.
    broken = st.tuples(st.text(min_size=1, max_size=2), st.integers(1, 3)).map(
        lambda pair: spelled(tokenizer, pair[0].encode()[: -pair[1]])
    )
    return st.lists(st.one_of(any_id.map(lambda i: [i]), text, broken), max_size=24).map(
        lambda parts: list(chain(*parts))
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "llama", "metaspace", "none", "gemma"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(id_lists(tokenizer))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["byte-level", "llama"])
@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40))
def test_any_bytes(tokenizer: Tokenizer, raw: bytes) -> None:
    ids = spelled(tokenizer, raw)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_is_shown_when_its_last_byte_comes() -> None:
    ids = spelled(BYTE_LEVEL, "é日🎬".encode())
    assert pieces_of(BYTE_LEVEL, ids) == ["", "é", "", "", "日", "", "", "", "🎬", ""]


def test_a_run_of_byte_tokens_is_shown_when_it_ends() -> None:
    ids = [LLAMA.token_to_id("▁a"), *spelled(LLAMA, "é".encode()), LLAMA.token_to_id("▁the")]
    assert pieces_of(LLAMA, ids) == ["a", "", "", "é the", ""]
    # One stray byte spoils the run, which is why it cannot be shown before.
    assert pieces_of(LLAMA, [*ids[:3], *spelled(LLAMA, b"\xff")]) == ["a", "", "", "", "\ufffd" * 3]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    assert pieces_of(BYTE_LEVEL, spelled(BYTE_LEVEL, "🎬".encode()[:3])) == ["", "", "", "\ufffd"]


def test_only_the_leading_space_of_the_whole_text_goes() -> None:
    ids = [LLAMA.token_to_id(piece) for piece in ("▁", "▁a", "</s>", "▁a")]
    assert pieces_of(LLAMA, ids) == ["", " a", "", " a", ""]


def test_a_decoder_can_be_used_again() -> None:
    for tokenizer in (BYTE_LEVEL, LLAMA):
        decoder = IncrementalDecoder(tokenizer)
        ids = [*spelled(tokenizer, b"\xe6 ok"), tokenizer.token_to_id("a")]
        first = "".join(decoder.push(i) for i in ids) + decoder.finish()
        assert "".join(decoder.push(i) for i in ids) + decoder.finish() == first


def test_a_push_costs_the_same_in_a_long_text() -> None:
    class Counting:
        decoded = 0

        def __getattr__(self, name: str) -> object:
            return getattr(LLAMA, name)

        def decode(self, ids: list[int], **options: bool) -> str:
            Counting.decoded += len(ids)
            return LLAMA.decode(ids, **options)

    decoder = IncrementalDecoder(Counting())  # type: ignore[arg-type]
    ids = [LLAMA.token_to_id(piece) for piece in ("▁the", "a", "<0x0A>", "b")] * 500
    text = "".join(decoder.push(i) for i in ids) + decoder.finish()
    assert text == LLAMA.decode(ids)
    assert Counting.decoded <= 4 * len(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("aa", "b")]),
    ],
)
def test_a_decoder_that_needs_the_whole_text_is_refused(decoder: decoders.Decoder) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json: its decoder"):
        IncrementalDecoder(sentencepiece_like(decoder=decoder))


# --- stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string that a reader of single characters sees completed."""
    for end in range(1, len(text) + 1):
        seen = [stop for stop in stops if text[:end].endswith(stop)]
        if seen:
            return text[: end - max(map(len, seen))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_wherever_the_pieces_are_cut(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    shown, stopped = "", False
    for piece in pieces:
        emit, stopped = stop.push(piece)
        shown += emit
        assert cut("".join(pieces), stops)[0].startswith(shown), "shown past a stop string"
    assert (shown + stop.finish(), stopped) == cut("".join(pieces), stops)


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    stop = StopStrings(["</s>", "###"])
    assert stop.push("one <") == ("one ", False)
    assert stop.push("b #") == ("<b ", False)
    assert stop.push("#</") == ("##", False)
    assert stop.push("s> more") == ("", True)
    assert stop.push("again") == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(OptionError, match="empty"):
        StopStrings(["</s>", ""])
