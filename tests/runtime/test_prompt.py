"""Prompts against the fixtures' ids, and what may stand in a layout."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.contract.pipeline import EachOf, Ids, Piece, PromptLayout, Text, Tokens
from intertitle.errors import OptionError
from intertitle.runtime.prompt import Slot, Timing, build_prompt, choose_pieces, joined, segments
from tokenizers import Tokenizer

DATA = Path(__file__).parents[1] / "data"
INSTRUCTION = "Describe the video in detail."
CLIP = Tokens("clip")


def fixture_tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(DATA / name / "tokenizer.json"))


def texts(prompt: str, tag: str) -> list[Text]:
    return [Text(part.replace(INSTRUCTION, "{instruction}")) for part in prompt.split(tag)]


def ids_of(built: list[list[int] | Slot], sentinel: int) -> list[int]:
    """As the reference implementation's ``input_ids``: a negative id for each block."""
    return [token for part in built for token in ([sentinel] if isinstance(part, Slot) else part)]


@pytest.mark.parametrize(
    ("name", "key", "sentinel"),
    [
        ("av-qwen2", "prompt_ids", -201),
        ("av-qwen2", "audio.prompt_ids", -202),
        ("clip-mistral", "prompt_ids", -201),
    ],
)
def test_ids_of_one_block(name: str, key: str, sentinel: int) -> None:
    expected = np.load(DATA / name / "expected.npz")
    before, after = texts(str(expected["prompt"]), "<video>")
    built = build_prompt(fixture_tokenizer(name), (before, CLIP, after), INSTRUCTION, {"clip": 4})
    assert [part for part in built if isinstance(part, Slot)] == [Slot("clip")]
    assert ids_of(built, sentinel) == expected[key].tolist()


def test_ids_with_the_bos_as_an_id() -> None:
    expected = np.load(DATA / "clip-mistral" / "expected.npz")
    before, after = texts(str(expected["prompt"]).removeprefix("<s>"), "<video>")
    pieces = (Ids((1,)), before, CLIP, after)
    built = build_prompt(fixture_tokenizer("clip-mistral"), pieces, INSTRUCTION, {"clip": 1})
    assert ids_of(built, -201) == expected["prompt_ids"].tolist()


def test_ids_of_a_block_a_frame() -> None:
    expected = np.load(DATA / "auroracap" / "expected.npz")
    around = str(expected["prompt"]).split("<image>")
    assert set(around[1:-1]) == {" "}
    pieces = (Ids((1,)), Text(around[0]), EachOf("clip", separator=" "), Text("\n{instruction}\n ASSISTANT:"))
    built = build_prompt(fixture_tokenizer("auroracap"), pieces, INSTRUCTION, {"clip": len(around) - 1})
    assert [part.unit for part in built if isinstance(part, Slot)] == [*range(len(around) - 1)]
    assert ids_of(built, -200) == expected["prompt_ids"].tolist()


def test_no_special_tokens_are_added_to_a_text() -> None:
    tokenizer = fixture_tokenizer("auroracap")
    assert tokenizer.encode("USER").ids[0] == 1, "the fixture's tokenizer adds a BOS by itself"
    built = build_prompt(tokenizer, (Text("USER"), EachOf("clip"), Text("x")), "", {"clip": 2})
    assert 1 not in chain(*(part for part in built if isinstance(part, list)))


def said(pieces: tuple[Piece, ...], instruction: str = "", **more: object) -> list[str | Slot]:
    tokenizer = fixture_tokenizer("av-qwen2")
    built = build_prompt(tokenizer, pieces, instruction, {"clip": 3}, **more)  # type: ignore[arg-type]
    return [part if isinstance(part, Slot) else tokenizer.decode(part) for part in built]


def test_braces_of_an_instruction_are_text() -> None:
    instruction = "{0} {instruction} {times} {x!r}"
    assert said((Text("a"), CLIP, Text("{instruction}{b}")), instruction) == ["a", Slot("clip"), instruction + "{b}"]


def test_variables_of_a_clip() -> None:
    timing = Timing(12.5, np.array([0.0, 2.4666, 12.4666]))
    text = Text("{count} frames of {seconds} s at {times}: {instruction}")
    (whole,) = said((text,), "go", timing=timing, places=3)
    assert whole == "3 frames of 12.50 s at 0.00s,2.47s,12.47s: go"


def test_texts_around_each_unit_are_joined_and_numbered_from_one() -> None:
    frames = EachOf("clip", before="F{index}: <", after=">", separator="\n")
    assert said((Text("A "), frames, Text(" Z"))) == [
        "A F1: <",
        Slot("clip", 0),
        ">\nF2: <",
        Slot("clip", 1),
        ">\nF3: <",
        Slot("clip", 2),
        "> Z",
    ]


def test_ids_part_texts() -> None:
    tokenizer = fixture_tokenizer("av-qwen2")
    apart = build_prompt(tokenizer, (Text("video"), Ids(()), Text("in")), "", {})
    assert apart == [tokenizer.encode(text, add_special_tokens=False).ids for text in ("video", "in")]
    together = build_prompt(tokenizer, (Text("video"), Text("in")), "", {})
    assert together == [tokenizer.encode("videoin", add_special_tokens=False).ids]


def test_a_prompt_that_speaks_of_time_needs_times() -> None:
    timed, untimed = (Text("{seconds}"), CLIP), (Text("a clip"), CLIP)
    timing = Timing(1.0, np.zeros(1))
    assert choose_pieces(PromptLayout(timed, untimed), None) == untimed
    assert choose_pieces(PromptLayout(timed, untimed), timing) == timed
    assert choose_pieces(PromptLayout(untimed), None) == untimed
    with pytest.raises(OptionError, match="frame_times="):
        choose_pieces(PromptLayout(timed), None)


@given(st.lists(st.sampled_from([[1], [2, 3], "block"]), min_size=1, max_size=8))
def test_segments_are_the_prompt_cut_at_its_clip(kinds: list[list[int] | str]) -> None:
    pieces = [np.zeros((2, 4), np.float32) if kind == "block" else kind for kind in kinds]
    parts = segments(pieces)  # type: ignore[arg-type]
    assert [id(piece) for part in parts for piece in part] == [id(piece) for piece in pieces]
    assert all(isinstance(piece, list) for part in (parts[0], parts[2]) for piece in part)
    assert not parts[1] or not (isinstance(parts[1][0], list) or isinstance(parts[1][-1], list))


def test_pieces_are_joined_to_the_decoder_s_input() -> None:
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole = joined([[5, 0], np.full((1, 2), 7, np.float32), [1]], lambda ids: table[ids])
    assert whole.tolist() == [[10, 11], [0, 1], [7, 7], [2, 3]]
