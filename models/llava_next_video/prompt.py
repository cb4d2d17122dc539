"""LLaVA-NeXT-Video's prompt: all frames in the place of one tag, in Vicuna's turn (docs/facts.md 9.4)."""

from __future__ import annotations

from ...contract.pipeline import Ids, Mode, PromptLayout, Text, Tokens

#: The tag while the text is tokenized; all of the prompt is tokenized as one text (transformers' processor).
TAG = "<video>"


def layouts(bos: int) -> dict[Mode, PromptLayout]:
    """The prompts by mode; bos comes once, at the start."""
    question = Text("\n{instruction} ASSISTANT:", behind=TAG)
    return {"video": PromptLayout((Ids((bos,)), Text("USER: "), Tokens("connector"), question))}
