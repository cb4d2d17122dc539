"""AuroraCap's prompt: one image block a frame, single spaces between (docs/facts.md 2.4, xtuner
``utils/templates.py``)."""

from __future__ import annotations

from ...contract.pipeline import EachOf, Ids, Mode, PromptLayout, Text
from ..checkpoint import Checkpoint
from ..fields import Fields


def layouts(checkpoint: Checkpoint) -> dict[Mode, PromptLayout]:
    """The prompts by mode. The space between two frames is a token of the prompt; bos comes once, at the start."""
    bos = Fields(checkpoint.config, "config.json").integer("bos_token_id", 1, minimum=0)
    frames = EachOf("connector", separator=" ")
    return {"video": PromptLayout((Ids((bos,)), Text("USER: "), frames, Text("\n{instruction}\n ASSISTANT:")))}
