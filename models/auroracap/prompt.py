"""AuroraCap's prompt: one image block a frame, single spaces between (docs/facts.md 2.4, xtuner
``utils/templates.py``)."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import PromptTemplate
from ..fields import Fields

IMAGE_SENTINEL = -200


def templates(checkpoint: Checkpoint) -> dict[str, PromptTemplate]:
    """The prompts by mode. The space between two frames is a token of the prompt; bos comes once, at the start."""
    bos = Fields(checkpoint.config, "config.json").integer("bos_token_id", 1, minimum=0)
    template = PromptTemplate(
        prefix="USER: ",
        suffix="\n{instruction}\n ASSISTANT:",
        separator=" ",
        bos_token_id=bos,
        sentinel=IMAGE_SENTINEL,
    )
    return {"video": template}
