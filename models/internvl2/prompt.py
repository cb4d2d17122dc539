"""InternVL2's prompt: a numbered span for each frame, then the question (docs/facts.md 10.3).

Sources: internvl/conversation.py (template ``internlm2-chat``: no newline stands behind ``<|im_end|>``),
eval/mvbench/evaluate_mvbench.py (``Frame1: <image>`` and a newline for each frame), modeling_internvl_chat.py
(``chat``: what ``<image>`` becomes).
"""

from __future__ import annotations

from ...contract.pipeline import EachOf, Ids, Mode, PromptLayout, Text

#: The punctuation is the reference's: full-width once, a comma with a space once.
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"  # noqa: RUF001
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
END = "<|im_end|>"
"""The token that ends a turn, the answer's too."""


def layouts(bos_token_id: int) -> dict[Mode, PromptLayout]:
    """The prompts by mode."""
    system = Text(f"<|im_start|>system\n{SYSTEM}{END}<|im_start|>user\n")
    frames = EachOf("connector", before="Frame{index}: <img>", after="</img>\n")
    question = Text(f"{{instruction}}{END}<|im_start|>assistant\n")
    return {"video": PromptLayout((Ids((bos_token_id,)), system, frames, question))}
