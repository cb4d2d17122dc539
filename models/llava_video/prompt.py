"""LLaVA-Video's prompt: the conversation ``qwen_1_5``, and a sentence that tells the times of the frames
(docs/facts.md 8.4)."""

from __future__ import annotations

from typing import Literal

from ...contract.pipeline import Ids, Mode, Piece, PromptLayout, Text, Tokens
from ...errors import CheckpointError
from ..fields import Fields, shown

#: Where the learned vector stands: behind each row, each frame, the clip, or nowhere.
Newline = Literal["grid", "frame", "one_token", "no_token"]
_NEWLINES: tuple[Newline, ...] = ("grid", "frame", "one_token", "no_token")
Form = Literal["card", "demo"]

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
#: No space stands before "Please" in the original either.
TIMES = (
    "The video lasts for {seconds} seconds, and {count} frames are uniformly sampled from it. These frames are located "
    "at {times}.Please answer the following questions related to this video."
)
#: The model card's form has the sentence right behind the frames; the demo's, which is also that of the training, in a
#: line of its own.
_LEAD: dict[Form, str] = {"card": "", "demo": "\n"}
INSTRUCTION = "Please describe this video in detail."


def layouts(*, timed: bool, newline: int | None, form: Form = "card") -> dict[Mode, PromptLayout]:
    """The prompts by mode. ``timed``: the model was trained with the sentence. ``newline``: the row of the embedding
    table that stands behind the frames, if one does."""
    frames: tuple[Piece, ...] = (Text(BEFORE), Tokens("connector"))
    if newline is not None:
        frames = (*frames, Ids((newline,)))
    untimed = (*frames, Text(AFTER))
    if not timed:
        return {"video": PromptLayout(untimed)}
    return {"video": PromptLayout((*frames, Text(_LEAD[form] + TIMES + AFTER)), untimed)}


def read_newline(fields: Fields) -> Newline:
    """Where the learned vector stands in a video (llava_arch.py ``prepare_inputs_labels_for_multimodal``).

    Raises CheckpointError for a place or a merge type that the original does not know.
    """
    merge = fields.text("mm_patch_merge_type", "flat")
    if merge == "flat":
        return "no_token"
    if not merge.startswith("spatial"):
        raise CheckpointError(f"{fields.where}: mm_patch_merge_type {shown(merge)} is not supported")
    place = fields.text("mm_newline_position", "one_token")
    if place == "one_token" and "unpad" not in merge:
        return "no_token"
    for known in _NEWLINES:
        if place == known:
            return known
    raise CheckpointError(f"{fields.where}: mm_newline_position {shown(place)} is not one of {', '.join(_NEWLINES)}")
