"""Random-weight checkpoints in the released layout of VideoLLaMA2.1-7B-AV, for measuring and for the demo.

Names, shapes and files are those of the release (docs/facts.md 1.1 to 1.4, 1.7): sharded bf16 safetensors with an
index; the audio tower and its projector both inside the shards and beside them as bf16 pickles, the pickle holding the
tied table of relative positions once (which brings ``audio_tower.bin`` within 405 of the released 181,514,532 bytes);
the vision tower's unused last layer, norm and head; generation defaults; a tokenizer of our own, its special tokens at
Qwen2's ids.

Every tensor is drawn from its own generator, seeded by its name, straight into bf16 (220 million values a second on one
core: no tricks needed), and leaves memory before the next one comes. The two pickles are the most held at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ..errors import OptionError
from ..whole_files import whole
from .config import AudioConfig, VisionConfig
from .random_layout import PREDICTOR_CLASSES, SIZES, RandomTensor, Size, layout

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

_CHUNK = 1 << 24
"""Values drawn at a time."""


def write_checkpoint(
    path: str | Path,
    size: str | Size,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    audio_in_shards: bool = True,
    text: Sequence[str] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all, and return its path.

    ``size`` is a key of ``SIZES`` or dimensions of one's own; the same size and seed give the same bytes on one version
    of PyTorch. Without ``audio_in_shards`` the audio tensors are only in the two pickles beside the shards. ``text`` is
    what the tokenizer's merges come from, as many as the vocabulary has room for.
    Raises ``OptionError`` for an unknown size, a path that is taken, or a disk that is full.
    """
    path = Path(path)
    if isinstance(size, str):
        if size not in SIZES:
            raise OptionError(f"size {size!r} is not one of {', '.join(SIZES)}")
        size = SIZES[size]
    if path.exists():
        raise OptionError(f"{path} exists already: give a new path, or remove it first")
    try:
        with whole(path) as partial:
            partial.mkdir(parents=True)
            _write(partial, size, seed, progress or (lambda done, total: None), audio_in_shards, text)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def _write(
    folder: Path, size: Size, seed: int, progress: Progress, audio_in_shards: bool, text: Sequence[str] | None
) -> None:
    specials = _write_tokenizer(folder, size, text)
    for name, content in _config_files(size, specials).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors, pickles = layout(size, audio_in_shards)
    shards = _shards(tensors, size.shard_bytes)
    total = sum(tensor.bytes for part in (*shards, *pickles.values()) for tensor in part)
    done = 0

    def values(tensor: RandomTensor) -> Iterator[Tensor]:
        nonlocal done
        for chunk in _draw(tensor, seed):
            yield chunk
            done += 2 * chunk.numel()
            progress(done, total)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_safetensors(file, shard, values)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    index = {"metadata": {"total_size": sum(t.bytes for shard in shards for t in shard)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, part in pickles.items():
        state = {tensor.name: torch.cat([*values(tensor)]).reshape(tensor.shape) for tensor in part}
        try:
            torch.save(state, folder / name)
        except RuntimeError as error:  # how PyTorch reports a failed write
            raise OSError(f"{name}: {str(error).splitlines()[0]}") from None


def _draw(tensor: RandomTensor, seed: int) -> Iterator[Tensor]:
    """The values in bf16, flat, in chunks."""
    digest = hashlib.sha256(f"{seed}:{tensor.seeded_as}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = math.prod(tensor.shape)
    for start in range(0, count, _CHUNK):
        values = torch.empty(min(_CHUNK, count - start), dtype=torch.bfloat16)
        yield values.normal_(tensor.mean, tensor.std, generator=generator)


def _shards(tensors: Iterable[RandomTensor], limit: int) -> list[list[RandomTensor]]:
    """Tensors in order, a new shard where one would pass the limit (as transformers' ``save_pretrained``)."""
    shards: list[list[RandomTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.bytes
    return shards


def _write_safetensors(
    file: BinaryIO, tensors: list[RandomTensor], values: Callable[[RandomTensor], Iterator[Tensor]]
) -> None:
    """The safetensors format by hand, because its own writer wants the whole shard in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": span}
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for chunk in values(tensor):
            file.write(chunk.view(torch.int16).numpy().data)


# --- config and tokenizer

ENDOFTEXT, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_TRAINING_TEXT = (
    *["system You are a helpful assistant. user <video> Describe the video in detail. assistant"] * 3,
    "The camera follows a red ball over a grey floor while music plays and people talk in the background of the scene.",
)
"""What the tokenizer's few merges come from, so that a prompt takes about as many tokens as with the real one."""

_NUM_ORDINARY = 317
"""256 bytes and the merges."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's, with its default system turn."""


def _write_tokenizer(folder: Path, size: Size, text: Sequence[str] | None) -> dict[str, int]:
    """Write ``tokenizer.json``, its merges learnt from ``text`` if given, and return the ids of the special tokens.

    A byte-level BPE: bytes, a few merges, placeholders up to the special tokens. Ids past those (the released
    embedding table has 418 more rows than Qwen2 has tokens) stand for nothing.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    ordinary = _NUM_ORDINARY if text is None else size.decoder.vocab_size - len(SPECIALS)
    trainer = trainers.BpeTrainer(vocab_size=ordinary, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_TRAINING_TEXT if text is None else text, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    first = len(vocab) if size.first_special_id is None else size.first_special_id
    vocab |= {f"<|unused_{i}|>": i for i in range(len(vocab), first)}
    ids = {token: first + i for i, token in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.BPE(vocab | ids, [(left, right) for left, right in model["merges"]]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return ids


def _config_files(size: Size, specials: dict[str, int]) -> dict[str, Any]:
    """The JSON files, by name (docs/facts.md 1.1, 1.7)."""
    d, v, a = size.decoder, size.vision, size.audio
    bos, eos = specials[ENDOFTEXT], specials[IM_END]
    config: dict[str, Any] = {
        "architectures": ["Videollama2Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": d.hidden_size,
        "hidden_size_a": d.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": size.std,
        "intermediate_size": d.intermediate_size,
        "max_position_embeddings": d.context_length,
        "max_window_layers": 28,
        "mm_audio_tower": "audio_tower.bin",
        "mm_hidden_size": v.hidden_size,
        "mm_hidden_size_a": a.hidden_size,
        "mm_projector_a_type": a.projector_kind,
        "mm_projector_type": "stc_connector_v35",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": v.select_layer,
        "mm_vision_tower": size.vision_tower,
        "model_type": "videollama2_qwen2",
        "num_attention_heads": d.num_heads,
        "num_frames": size.num_frames,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_kv_heads,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope_theta,
        "sliding_window": d.context_length,
        "tie_word_embeddings": d.tie_embeddings,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": d.vocab_size,
    }
    if a != AudioConfig(out_size=a.out_size):
        # The release has no such key: its BEATs dimensions are fixed in the code.
        config["beats_config"] = {
            "encoder_layers": a.num_layers,
            "embed_dim": a.embed_dim,
            "encoder_embed_dim": a.hidden_size,
            "encoder_ffn_embed_dim": a.intermediate_size,
            "encoder_attention_heads": a.num_heads,
            "conv_pos": a.conv_pos,
            "conv_pos_groups": a.conv_pos_groups,
            "input_patch_size": a.patch_size,
            "finetuned_model": True,
            "predictor_class": PREDICTOR_CLASSES,
        }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": bos,
            "do_sample": True,
            "eos_token_id": [eos, bos],
            "pad_token_id": bos,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.42.3",
        },
        "added_tokens.json": specials,
        "special_tokens_map.json": {
            "additional_special_tokens": [IM_START, IM_END],
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in specials.items()},
            "additional_special_tokens": [IM_START, IM_END],
            "bos_token": None,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": 2048,
            "pad_token": ENDOFTEXT,
            "padding_side": "right",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    if "/" not in size.vision_tower:
        files |= _tower_files(size.vision_tower, v)
    return files


def _tower_files(folder: str, v: VisionConfig) -> dict[str, Any]:
    """Config and image processor of a tower that is not a released one; its weights are in the shards."""
    return {
        f"{folder}/config.json": {
            "architectures": ["SiglipVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": v.hidden_act,
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.layer_norm_eps,
            "model_type": "siglip_vision_model",
            "num_attention_heads": v.num_heads,
            "num_channels": 3,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
        },
        f"{folder}/preprocessor_config.json": {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": v.image_size, "width": v.image_size},
        },
    }
