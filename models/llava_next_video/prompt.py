"""LLaVA-NeXT-Video's prompt: all frames in the place of one tag, in Vicuna's turn (docs/facts.md 9.4)."""

from __future__ import annotations

from ...contract.pipeline import Ids, Mode, PromptLayout, Text, Tokens


def layouts(bos: int) -> dict[Mode, PromptLayout]:
    """The prompts by mode; bos comes once, at the start."""
    turn = (Ids((bos,)), Text("USER: "), Tokens("connector"), Text("\n{instruction} ASSISTANT:"))
    return {"video": PromptLayout(turn)}
