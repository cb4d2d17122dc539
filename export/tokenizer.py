"""A checkpoint's tokenizer, whatever files it comes in, as one ``tokenizers.Tokenizer``.

Three forms are read, in this order: ``tokenizer.json``; the ``vocab.json`` and ``merges.txt`` of Qwen2 (what the
released VideoLLaMA2.1 repositories hold); a sentencepiece ``tokenizer.model`` (Mistral, Llama, Vicuna, InternLM2). The
tokens that ``added_tokens.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` declare keep their ids and
flags.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..errors import CheckpointError
from ..models.tensor_files import refuse_pointer

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 cuts text before merging (transformers ``tokenization_qwen2.py``; contractions, words, single digits)."""

_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_SPACE = "▁"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def collect_tokenizer(checkpoint_dir: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, without truncation or padding.

    Raises ``CheckpointError`` when the folder has no tokenizer, or one that is malformed or of another kind.
    """
    folder = Path(checkpoint_dir)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_json(folder)
    elif (folder / "vocab.json").is_file():
        tokenizer = _from_qwen2(folder)
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(folder)
    else:
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json, vocab.json + merges.txt or tokenizer.model)")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# --- the three forms


def _from_json(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        # tokenizers raises bare Exceptions, and pyo3's PanicException, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: not a tokenizer: {_first_line(error)}") from None
    declared = _declared_tokens(folder, tokenizer.get_vocab(with_added_tokens=True))
    known = tokenizer.get_added_tokens_decoder()
    for token_id, token in sorted(declared.items()):
        if token_id in known:
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(f"{path}: lacks the token {token.content!r} declared with id {token_id}")
    return tokenizer


def _from_qwen2(folder: Path) -> Tokenizer:
    name = _read_json(folder / "tokenizer_config.json").get("tokenizer_class", _QWEN2_CLASSES[0])
    if name not in _QWEN2_CLASSES:
        raise CheckpointError(f"{folder}: vocab.json of a {name} is not supported; save it as a tokenizer.json")
    vocab: dict[str, int] = _read_json(folder / "vocab.json")
    if not vocab or not all(isinstance(token_id, int) for token_id in vocab.values()):
        raise CheckpointError(f"{folder / 'vocab.json'}: not a mapping from tokens to ids")
    merges = _read_merges(folder / "merges.txt")
    tokenizer = _build_bpe(folder / "merges.txt", vocab, merges, _declared_tokens(folder, vocab))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_sentencepiece(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    model = _read_sentencepiece(path)
    merges = _merges_of_scores(model)
    merged = {left + right for left, right in merges}
    unreached = {piece for piece in model.scores if len(piece) > 1 and piece not in merged}
    named = _declared_tokens(folder, model.vocab, placeholders=unreached | model.defined)
    # A token in the place of a placeholder: the piece is gone, its id stays (InternLM2, docs/facts.md 10.4).
    gone = {piece for piece, i in model.vocab.items() if i in named and named[i].content != piece}
    vocab = {piece: token_id for piece, token_id in model.vocab.items() if piece not in gone}
    merges = [pair for pair in merges if gone.isdisjoint((*pair, pair[0] + pair[1]))] if gone else merges
    declared = {token_id: token for token_id, token in model.added.items() if token.content in vocab} | named
    options = {"fuse_unk": True, "byte_fallback": model.byte_fallback, "unk_token": model.unk_token}
    tokenizer = _build_bpe(path, vocab, merges, declared, **options)
    config = _read_json(folder / "tokenizer_config.json")
    prefix = model.dummy_prefix and config.get("add_prefix_space", True) is not False
    steps: list[normalizers.Normalizer] = []
    if model.single_spaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    # A null or missing "legacy" is the legacy behaviour (transformers tokenization_llama.py before version 5): a space
    # in front of every text between special tokens, not only in front of the first.
    if config.get("legacy") is not False:
        steps += [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    else:
        if steps:
            tokenizer.normalizer = normalizers.Sequence(steps)
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    decoder: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)] if prefix else decoder)
    return tokenizer


def _build_bpe(
    path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], declared: dict[int, AddedToken], **options: Any
) -> Tokenizer:
    """A BPE tokenizer with the declared tokens at exactly their ids.

    They are put into the vocabulary too: ``tokenizers`` numbers a token that is not there by itself.
    """
    vocab = vocab | {token.content: token_id for token_id, token in declared.items()}
    try:
        tokenizer = Tokenizer(BPE(vocab, merges, **options))
    except Exception as error:
        raise CheckpointError(f"{path}: does not fit its vocabulary: {_first_line(error)}") from None
    tokenizer.add_tokens([token for _, token in sorted(declared.items())])
    return tokenizer


# --- declared tokens


def _declared_tokens(folder: Path, vocab: dict[str, int], placeholders: Collection[str] = ()) -> dict[int, AddedToken]:
    """The added and special tokens by id, from the three files that may declare them, the most explicit one winning.

    A token that is only named (``pad_token`` and the like) and has no id has no embedding either, so it is left out.
    ``placeholders``: entries of ``vocab`` that no text becomes; a token of another name may have their id.
    """
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(config) | _named_tokens(_read_json(folder / "special_tokens_map.json"))
    tokens: dict[int, AddedToken] = {}
    for content in named:
        if content in vocab:
            tokens[vocab[content]] = AddedToken(content, special=True, normalized=False)
    path = folder / "added_tokens.json"
    for content, token_id in _read_json(path).items():
        if not isinstance(token_id, int):
            raise CheckpointError(f"{path}: the id of {content!r} is not a number")
        # Found in the raw text, as the slow tokenizers that write this file do.
        tokens[token_id] = AddedToken(content, special=content in named, normalized=False)
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is not an object")
    for key, fields in decoder.items():
        try:
            flags = {flag: bool(fields.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word", "special")}
            normalized = bool(fields.get("normalized", not flags["special"]))
            tokens[int(key)] = AddedToken(fields["content"], normalized=normalized, **flags)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise CheckpointError(f"{path}: malformed entry {key!r} of added_tokens_decoder") from None
    contents = {token_id: content for content, token_id in vocab.items() if content not in placeholders}
    ids: dict[str, int] = {}
    for token_id, token in sorted(tokens.items()):
        there = contents.get(token_id, token.content)
        if there != token.content or vocab.get(token.content, token_id) != token_id:
            raise CheckpointError(f"{folder}: {token.content!r} is declared with id {token_id}, which is {there!r}")
        if ids.setdefault(token.content, token_id) != token_id:
            raise CheckpointError(
                f"{folder}: {token.content!r} is declared with two ids, {ids[token.content]} and {token_id}"
            )
    return tokens


def _named_tokens(fields: dict[str, Any]) -> set[str]:
    """Contents of the tokens that a config names: ``eos_token`` and its like, ``additional_special_tokens``."""
    values = [fields.get(name) for name in _NAMED]
    further = fields.get("additional_special_tokens")
    values += further if isinstance(further, list) else []
    contents = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {content for content in contents if isinstance(content, str)}


# --- files


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is absent."""
    if path.exists():
        refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: needed beside vocab.json, not readable: {_first_line(error)}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise CheckpointError(f"{path}: line {number} is not a pair of tokens")
        merges.append((parts[0], parts[1]))
    return merges


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- sentencepiece


@dataclass(frozen=True)
class _Sentencepiece:
    """What a BPE model file says: the id of every piece, the scores of those that text is merged to, and its switches.

    ``added``: control pieces (special), and those that are user-defined (``defined``) and have several characters; one
    of a single character takes part in no merge, so it needs no mark. ``dummy_prefix``: a space goes in front of a
    text. ``single_spaces``: runs of spaces count as one, spaces at both ends as none.
    """

    vocab: dict[str, int]
    scores: dict[str, float]
    added: dict[int, AddedToken]
    defined: frozenset[str]
    unk_token: str
    byte_fallback: bool
    dummy_prefix: bool
    single_spaces: bool


def _read_sentencepiece(path: Path) -> _Sentencepiece:
    try:
        proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise CheckpointError(f"{path}: to read it, install sentencepiece and protobuf ({error})") from None
    refuse_pointer(path)
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError derives from nothing narrower
        raise CheckpointError(f"{path}: not a sentencepiece model: {_first_line(error)}") from None
    kinds = proto.ModelProto.SentencePiece
    if not model.pieces:
        raise CheckpointError(f"{path}: not a sentencepiece model: it has no pieces")
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        raise CheckpointError(f"{path}: only sentencepiece models of type BPE are supported")
    if model.normalizer_spec.precompiled_charsmap:
        raise CheckpointError(
            f"{path}: its normalization {model.normalizer_spec.name!r} is not supported, only identity"
        )
    vocab = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise CheckpointError(f"{path}: a piece occurs twice")
    unknown = [piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN]
    if len(unknown) != 1 or any(piece.type == kinds.UNUSED for piece in model.pieces):
        raise CheckpointError(f"{path}: a model with unused pieces or without one unknown piece is not supported")
    special = (kinds.CONTROL, kinds.UNKNOWN)
    defined = {piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED and len(piece.piece) > 1}
    return _Sentencepiece(
        vocab=vocab,
        scores={piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL},
        added={
            vocab[piece.piece]: AddedToken(piece.piece, special=piece.type in special, normalized=False)
            for piece in model.pieces
            if piece.type in special or piece.piece in defined
        },
        defined=frozenset(defined),
        unk_token=unknown[0],
        byte_fallback=model.trainer_spec.byte_fallback,
        dummy_prefix=model.normalizer_spec.add_dummy_prefix,
        single_spaces=model.normalizer_spec.remove_extra_whitespaces,
    )


def _merges_of_scores(model: _Sentencepiece) -> list[tuple[str, str]]:
    """Merges in the order in which sentencepiece applies them: the pair whose joined piece scores highest goes first.

    The file keeps no merges: every way to cut a piece into two other pieces is one. Only ordinary pieces take part;
    control, unknown and byte pieces never come from text (sentencepiece ``bpe_model.cc``).
    """
    scores, vocab = model.scores, model.vocab
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], vocab[piece])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in scores and right in scores]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
