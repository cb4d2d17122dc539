"""LLaVA-Video and LLaVA-NeXT-Video in the runtime: prompts token by token, captions from frames and from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from intertitle.contract.pipeline import Ids, PromptLayout, Text, Tokens
from intertitle.errors import BundleError
from intertitle.models import open_checkpoint
from intertitle.models.llava_next_video import prompt as next_prompt
from intertitle.models.llava_video import prompt as video_prompt
from intertitle.runtime.prompt import Slot, Timing, build_prompt, choose_pieces
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE


def ids_of(tokenizer: Tokenizer, layout: PromptLayout, instruction: str, timing: Timing | None, sentinel: int):
    count = 0 if timing is None else len(timing.times)
    built = build_prompt(tokenizer, choose_pieces(layout, timing), instruction, {"connector": count}, timing, count)
    return [token for part in built for token in ([sentinel] if isinstance(part, Slot) else part)]


def test_llava_video_prompt_ids(data_dir: Path, expected: Callable[[str], dict[str, np.ndarray]]) -> None:
    config, numbers = open_checkpoint(data_dir / "llava-video").config, expected("llava-video")
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    total, fps, *_ = numbers["clip"]
    timing = Timing(total / fps, numbers["frame_index"] / fps)
    layout = config.prompts["video"]
    for form, prefix in (("card", ""), ("demo", "demo.")):
        asked = layout if form == "card" else video_prompt.layouts(timed=True, newline=None, form="demo")["video"]
        wanted = numbers[f"{prefix}prompt_ids"].tolist()
        assert ids_of(tokenizer, asked, config.default_instruction, timing, -200) == wanted
    untimed = ids_of(tokenizer, layout, config.default_instruction, None, -200)
    assert untimed == numbers["untimed.prompt_ids"].tolist()


def test_llava_video_newline_behind_the_clip_is_a_token_of_the_prompt(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    layout = video_prompt.layouts(timed=False, newline=439)["video"]
    ids = ids_of(tokenizer, layout, "x", None, -200)
    assert ids[ids.index(-200) + 1] == 439
    without = ids_of(tokenizer, video_prompt.layouts(timed=False, newline=None)["video"], "x", None, -200)
    assert [token for token in ids if token != 439] == without


def test_llava_next_video_prompt_ids(data_dir: Path, expected: Callable[[str], dict[str, np.ndarray]]) -> None:
    config, numbers = open_checkpoint(data_dir / "llava-next-video").config, expected("llava-next-video")
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-next-video/tokenizer.json"))
    ids = ids_of(tokenizer, config.prompts["video"], config.default_instruction, None, 320)
    assert ids == numbers["prompt_ids"].tolist()


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_text_behind_a_tag_is_tokenized_as_in_the_whole_text(scheme: str) -> None:
    """The tokenizer of a Vicuna may put a space in front of the first word of a text only."""
    alphabet = sorted({*"▁USER:\nWhatisthis?ATNquestion<video>"})
    vocab = {"<unk>": 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens([AddedToken("<video>", special=True, normalized=False)])
    question = "What is this?"
    whole = tokenizer.encode(f"USER: <video>\n{question} ASSISTANT:", add_special_tokens=False).ids
    tag = tokenizer.token_to_id("<video>")
    layout = next_prompt.layouts(bos=0)["video"]
    assert ids_of(tokenizer, layout, question, None, tag) == [0, *whole]
    apart = [0, *tokenizer.encode("USER: ", add_special_tokens=False).ids, tag]
    apart += tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False).ids
    assert (apart == [0, *whole]) == (scheme != "first")


def test_a_tag_that_is_no_token_is_refused(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    with pytest.raises(BundleError, match="'<video>', which the prompt names"):
        build_prompt(tokenizer, (Ids((1,)), Tokens("connector"), Text("x", behind="<video>")), "", {})
