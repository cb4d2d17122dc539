"""VideoLLaMA2's prompts: the checkpoint's own chat template, rendered once and cut at the media tag.

Sources: videollama2/__init__.py (``mm_infer``: the system turn, tag + newline + instruction), constants.py (tags and
sentinels), mm_utils.py (text pieces are tokenized on their own, without special tokens).
"""

from __future__ import annotations

from ...contract.pipeline import Mode, Piece, PromptLayout, Text, Tokens
from ...errors import CheckpointError
from ..bounded import run_bounded
from ..checkpoint import Checkpoint
from ..token_ids import token_id

#: Mistral and Mixtral only. The double space is the reference's.
SYSTEM = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\nIf a question does not "
    "make any sense, or is not factually coherent, explain why instead of answering something not correct. If you "
    "don't know the answer to a question, please don't share false information.\n<</SYS>>"
)
VIDEO, AUDIO = "<video>", "<audio>"
_INSTRUCTION = "intertitle.instruction"


def layouts(checkpoint: Checkpoint, *, system_turn: bool, audio: bool) -> dict[Mode, PromptLayout]:
    """The prompts by mode. Sound that goes with a video has no tag of its own: its tokens follow the video's
    (VideoLLaMA2 ``prepare_inputs_labels_for_multimodal``)."""
    seen, heard = Tokens("connector"), Tokens("audio")
    prompts: dict[Mode, PromptLayout] = {"video": _layout(checkpoint, VIDEO, [seen], system_turn=system_turn)}
    if audio:
        prompts["audio"] = _layout(checkpoint, AUDIO, [heard], system_turn=system_turn)
        prompts["audiovideo"] = _layout(checkpoint, VIDEO, [seen, heard], system_turn=system_turn)
    return prompts


def eos_token_id(checkpoint: Checkpoint) -> int | None:
    """Id of the tokenizer's eos token, None where the tokenizer's files do not say."""
    return token_id(checkpoint, special_tokens(checkpoint).get("eos_token"))


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """The named special tokens (bos_token, eos_token, ...) as text."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in (checkpoint.json(file) or {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _layout(checkpoint: Checkpoint, tag: str, tokens: list[Piece], *, system_turn: bool) -> PromptLayout:
    messages = [{"role": "system", "content": SYSTEM}] if system_turn else []
    messages.append({"role": "user", "content": f"{tag}\n{_INSTRUCTION}"})
    text = _render(checkpoint, messages)
    if text.count(tag) != 1 or text.count(_INSTRUCTION) != 1:
        raise CheckpointError(f"{checkpoint.path}: the chat template does not keep the user's turn as it is")
    before, after = (Text(part.replace(_INSTRUCTION, "{instruction}")) for part in text.split(tag))
    return PromptLayout((before, *tokens, after))


def _chat_template(checkpoint: Checkpoint) -> str:
    template = checkpoint.text("chat_template.jinja")
    if template is None:
        template = (checkpoint.json("tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{checkpoint.path}: no chat_template in tokenizer_config.json; copy the released tokenizer's files there"
        )
    return template


def _render(checkpoint: Checkpoint, messages: list[dict[str, str]]) -> str:
    request = {"template": _chat_template(checkpoint), "messages": messages, "tokens": special_tokens(checkpoint)}
    return run_bounded("render", request, f"{checkpoint.path}: the chat template")
