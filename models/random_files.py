"""The files beside the weights of a random checkpoint that several families share: a tokenizer of our own, the JSON of
a vision tower.

The tokenizer is a byte-level BPE: 256 bytes, some merges, and the special tokens of the released vocabulary at their
released ids. Ids past those stand for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .config import VisionConfig
from .hf_config import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD

_TRAINING_TEXT = (
    *["system You are a helpful assistant. user <video> Describe the video in detail. assistant"] * 3,
    "The camera follows a red ball over a grey floor while music plays and people talk in the background of the scene.",
)
"""What the tokenizer's few merges come from, so that a prompt takes about as many tokens as with the real one."""

_NUM_ORDINARY = 317
"""256 bytes and the merges."""

ENDOFTEXT, IM_START, IM_END = QWEN2_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNK, BOS, EOS = LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")

QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's, with its default system turn."""

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral's, with the system turn in front of the first instruction."""


def as_json(content: Any) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def byte_level_bpe(
    specials: Sequence[str], first_id: int | None, vocab_size: int, text: Sequence[str] | None
) -> tuple[str, dict[str, int]]:
    """``tokenizer.json``, and the ids of the special tokens.

    ``first_id``: the id of the first special token, 0 or behind the ordinary ones (the ids between are placeholders);
    ``None`` puts them right behind the ordinary ones. The merges come from ``text``, as many as fit into
    ``vocab_size``; ``None``: a few from a text of our own.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_ORDINARY if text is None else vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_TRAINING_TEXT if text is None else text, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    first = len(vocab) if first_id is None else first_id
    if first == 0:
        vocab = {token: place + len(specials) for token, place in vocab.items()}
    vocab |= {f"<|unused_{i}|>": i for i in range(len(vocab), first)}
    ids = {token: first + i for i, token in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocab | ids, [(left, right) for left, right in model["merges"]]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer.to_str(), ids


def qwen2_files(
    first_id: int | None, vocab_size: int, text: Sequence[str] | None, template: str = QWEN2_TEMPLATE
) -> tuple[dict[str, str], dict[str, int]]:
    """The files of Qwen2's tokenizer, and the ids of its special tokens; arguments as for ``byte_level_bpe``."""
    tokenizer, ids = byte_level_bpe(QWEN2_SPECIALS, first_id, vocab_size, text)
    named = {
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": ENDOFTEXT,
        "unk_token": None,
    }
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": _declared(ids),
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 2048,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    return {
        "tokenizer.json": tokenizer,
        "added_tokens.json": as_json(ids),
        "special_tokens_map.json": as_json({name: token for name, token in named.items() if token is not None}),
        "tokenizer_config.json": as_json(dict(sorted((settings | named).items()))),
    }, ids


def qwen2_generation(bos: int, eos: int) -> dict[str, Any]:
    """What ``generation_config.json`` of the released Qwen2 fine-tunes says; ``bos`` is ``<|endoftext|>``."""
    return {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": [eos, bos],
        "pad_token_id": bos,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }


def llama_files(vocab_size: int, text: Sequence[str] | None, template: str | None = None) -> dict[str, str]:
    """The files of a tokenizer with the special tokens of Llama, Vicuna and Mistral, whose ids are 0, 1 and 2."""
    tokenizer, ids = byte_level_bpe(LLAMA_SPECIALS, 0, vocab_size, text)
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": UNK, "unk_token": UNK}
    settings = {
        **named,
        "added_tokens_decoder": _declared(ids),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if template is None else {"chat_template": template}),
    }
    return {
        "tokenizer.json": tokenizer,
        "special_tokens_map.json": as_json(named),
        "tokenizer_config.json": as_json(dict(sorted(settings.items()))),
    }


def _declared(ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(i): {"content": token, **flags} for token, i in ids.items()}


def tower_files(folder: str, v: VisionConfig) -> dict[str, str]:
    """Config and image processor of a tower that is not a released one, in its folder inside the checkpoint."""
    return {f"{folder}/config.json": tower_config(v), f"{folder}/preprocessor_config.json": image_processor(v)}


def tower_config(v: VisionConfig) -> str:
    """``config.json`` of a CLIP or SigLIP tower."""
    kind = {"clip": "CLIP", "siglip": "Siglip"}[v.kind]
    return as_json(
        {
            "architectures": [f"{kind}VisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": v.hidden_act,
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.layer_norm_eps,
            "model_type": f"{v.kind}_vision_model",
            "num_attention_heads": v.num_heads,
            "num_channels": 3,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
        }
    )


def image_processor(v: VisionConfig) -> str:
    """``preprocessor_config.json`` of a CLIP or SigLIP tower."""
    if v.kind == "siglip":
        own = {
            "image_mean": SIGLIP_MEAN,
            "image_processor_type": "SiglipImageProcessor",
            "image_std": SIGLIP_STD,
            "size": {"height": v.image_size, "width": v.image_size},
        }
    else:
        own = {
            "crop_size": {"height": v.image_size, "width": v.image_size},
            "do_center_crop": True,
            "image_mean": CLIP_MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": CLIP_STD,
            "size": {"shortest_edge": v.image_size},
        }
    common = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255}
    return as_json(dict(sorted((common | own).items())))
