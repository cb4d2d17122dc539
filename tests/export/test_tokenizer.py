"""Tokenizers of every released form, id for id against transformers and sentencepiece on the same files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intertitle.errors import CheckpointError
from intertitle.export.tokenizer import collect_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

FIXTURES = Path(__file__).parents[1] / "data"

CORPUS = [
    "The camera follows a dog across the wet street, and then it isn't there anymore.",
    "It's 3 o'clock; we'll see 1234 birds & 56.7 per cent of THE sky! They'RE loud...",
    "A red ball bounces\ton the floor\r\n\r\n   twice, then   stops.\n",
    "Ein Fuß im Schnee, déjà vu, Łódź, naïve café: über alles.",
    "日本語のテキストと한국어、и немного русского.",
    "emoji 🎬🎞️👩‍🚀 and combining e\u0301 a\u030a, zero\u200bwidth, nbsp\u00a0here",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # code",
    "user system assistant video describe detail the the the then there them these",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   ",
    "\n",
    " leading and trailing ",
    "double  spaces   inside",
    "\u0000\u007f\ufffd\ue000",
    "𐍈𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "USER: ",
    "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n",
    "<0x0A> literal",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = " ".join(CORPUS).split(" ")
    joints = [" ", "  ", "\n", "", "\t", "é", "日", "🎬"]
    return ["".join(rng.choice(words) + rng.choice(joints) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def added(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | flags


# --- Qwen2: vocab.json + merges.txt


@pytest.fixture(scope="module")
def qwen2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.model.save(str(folder))
    return folder


def qwen2_checkpoint(folder: Path, files: Path, *, decoder: bool) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((files / name).read_bytes())
    size = len(json.loads((folder / "vocab.json").read_text()))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {name: size + i for i, name in enumerate(names)}
    tool = "<tool_call>"
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    if decoder:
        config["added_tokens_decoder"] = {str(i): added(name, special=True) for name, i in ids.items()}
        config["added_tokens_decoder"][str(size + 3)] = added(tool, special=False)
    dump(folder / "added_tokens.json", ids | ({tool: size + 3} if decoder else {}))
    dump(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("decoder", [True, False], ids=["tokens-in-config", "tokens-in-added_tokens"])
def test_qwen2_ids_equal_transformers(tmp_path: Path, qwen2_files: Path, decoder: bool) -> None:
    from transformers import Qwen2Tokenizer

    folder = qwen2_checkpoint(tmp_path, qwen2_files, decoder=decoder)
    oracle = Qwen2Tokenizer.from_pretrained(folder)
    ours = collect_tokenizer(folder)
    chat = "<|im_start|>user\n<tool_call>é{}<|im_end|>\n<|im_start|> assistant"
    for text in [*TEXTS, *random_texts(200), *(chat.format(text) for text in TEXTS)]:
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, text


def test_declared_ids_are_kept_even_with_a_hole(tmp_path: Path, qwen2_files: Path) -> None:
    folder = qwen2_checkpoint(tmp_path, qwen2_files, decoder=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["5000"] = added("<|far|>", special=True)
    dump(folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_str(collect_tokenizer(folder).to_str())
    assert tokenizer.token_to_id("<|far|>") == 5000
    assert tokenizer.encode("a<|far|>").ids[-1] == 5000
    assert tokenizer.decode([5000], skip_special_tokens=True) == ""
    assert tokenizer.token_to_id("<|im_end|>") == json.loads((folder / "added_tokens.json").read_text())["<|im_end|>"]


# --- sentencepiece: tokenizer.model


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path_factory.mktemp("spm")
    made: dict[str, Path] = {}

    def train(**options: Any) -> Path:
        key = repr(options)
        if key not in made:
            # Settings of the Llama and Mistral models, at a small size.
            settings: dict[str, Any] = {
                "model_type": "bpe",
                "vocab_size": 430,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "character_coverage": 0.99,
                "split_digits": True,
                "allow_whitespace_only_pieces": True,
                "minloglevel": 2,
            }
            prefix = folder / str(len(made))
            lines = (CORPUS + random_texts(60, seed=1)) * 2
            spm.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines), model_prefix=str(prefix), **(settings | options)
            )
            made[key] = prefix.with_suffix(".model")
        return made[key]

    return train


def sentencepiece_checkpoint(folder: Path, model: Path, **config: object) -> Path:
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    if config:
        dump(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}], ids=repr)
def test_sentencepiece_ids_equal_sentencepiece(
    tmp_path: Path, sentencepiece_model: Callable[..., Path], options: dict[str, Any]
) -> None:
    from sentencepiece import SentencePieceProcessor

    model = sentencepiece_model(**options)
    oracle = SentencePieceProcessor(model_file=str(model))
    ours = collect_tokenizer(sentencepiece_checkpoint(tmp_path, model))
    lengths = []
    for text in [*TEXTS, *random_texts(300)]:
        if "\0" in text:  # sentencepiece ends a text at NUL
            continue
        ids = oracle.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == oracle.decode(ids), text
        lengths.append((len(ids), len(text.encode())))
    ratio = sum(b for _, b in lengths) / sum(n for n, _ in lengths)
    assert ratio > 1.5, "the model merges too little for this test to mean much"


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_ids_equal_transformers(
    tmp_path: Path, sentencepiece_model: Callable[..., Path], legacy: bool
) -> None:
    from transformers.convert_slow_tokenizer import LlamaConverter, SentencePieceExtractor

    class Extractor(SentencePieceExtractor):
        def extract(self, _: object) -> tuple[None, list[tuple[str, str]]]:  # transformers 5 calls it the old way
            return None, super().extract(models.BPE)["merges"]

    class Converter(LlamaConverter):
        SpmExtractor = Extractor

    model = sentencepiece_model(user_defined_symbols=["<box>", "日本"])
    names = ["<unk>", "<s>", "</s>"]
    slow = SimpleNamespace(
        vocab_file=str(model), legacy=legacy, add_prefix_space=True, convert_ids_to_tokens=lambda i: names[i]
    )
    oracle = Converter(slow).converted()
    oracle.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    config["added_tokens_decoder"] = {str(i): added(name, special=True) for i, name in enumerate(names)}
    ours = collect_tokenizer(sentencepiece_checkpoint(tmp_path, model, **config))
    marked = ["<s>[INST] {}</s>", "<box>{}<s> {}", "日本{}</s></s>"]
    for text in [*TEXTS, *random_texts(300), *(mark.replace("{}", text) for mark in marked for text in TEXTS)]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip), text


# --- sentencepiece with special tokens in the text, against transformers' slow tokenizer


MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
PLACEHOLDERS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")


@pytest.fixture(scope="module")
def slow_and_ours(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Callable[..., Path]
) -> Callable[[str], tuple[Any, Tokenizer]]:
    """``slow_and_ours(name)``: two readers of the same files. Of the ids of the marks, two are those of pieces that the
    model file calls otherwise, as in InternLM2's release; the others stand behind the vocabulary."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    fixture = FIXTURES / "internvl2"
    options = {
        "prefix": {"user_defined_symbols": ["\n"]},
        "no-prefix": {"user_defined_symbols": ["\n"], "add_dummy_prefix": False},
        "renamed": {"user_defined_symbols": ["\n", *PLACEHOLDERS], "add_dummy_prefix": False},
    }
    made: dict[str, tuple[Any, Tokenizer]] = {}

    def read(name: str) -> tuple[Any, Tokenizer]:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        if name == "internvl2":
            for file in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
                (folder / file).write_bytes((fixture / file).read_bytes())
            declared = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
            ids = {token["content"]: int(i) for i, token in declared.items()}
        else:
            sentencepiece_checkpoint(folder, sentencepiece_model(**options[name]))
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            ids = {mark: pieces.get_piece_size() + i for i, mark in enumerate(MARKS)}
            ids |= {mark: pieces.piece_to_id(mark) for mark in MARKS[:2]}
            if name == "renamed":
                ids |= {mark: pieces.piece_to_id(p) for mark, p in zip(MARKS[2:4], PLACEHOLDERS, strict=True)}
            config = {str(i): added(mark, special=True) for mark, i in ids.items()}
            dump(folder / "tokenizer_config.json", {"added_tokens_decoder": config})
        tokens = {i: AddedToken(mark, special=True, normalized=False) for mark, i in ids.items()}
        slow = SentencePieceBackend(vocab_file=str(folder / "tokenizer.model"), added_tokens_decoder=tokens)
        made[name] = slow, collect_tokenizer(folder)
        return made[name]

    return read


SLOW = ["internvl2", "prefix", "no-prefix", "renamed"]


@pytest.mark.parametrize("name", SLOW)
def test_sentencepiece_ids_around_special_tokens_equal_the_slow_tokenizer(
    name: str, slow_and_ours: Callable[[str], tuple[Any, Tokenizer]]
) -> None:
    slow, ours = slow_and_ours(name)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(
            st.one_of(
                st.sampled_from(
                    [*MARKS, "\n", " ", "  ", "\t", "<0x0A>", "<", "Frame1: ", "</img>\nFrame2: ", *CORPUS]
                ),
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
            ),
            max_size=8,
        ).map("".join)
    )
    def check(text: str) -> None:
        ids = slow.convert_tokens_to_ids(slow.tokenize(text))
        assert ours.encode(text, add_special_tokens=False).ids == ids, text

    check()
    assert len({mark: ours.token_to_id(mark) for mark in MARKS}) == len(MARKS)


def test_a_renamed_piece_keeps_its_id_and_loses_its_name(
    slow_and_ours: Callable[[str], tuple[Any, Tokenizer]],
) -> None:
    slow, ours = slow_and_ours("renamed")
    end = ours.token_to_id("<|im_end|>")
    assert slow.sp_model.id_to_piece(end) == PLACEHOLDERS[1]
    assert ours.token_to_id(PLACEHOLDERS[1]) is None
    assert ours.encode("a<|im_end|>", add_special_tokens=False).ids[-1] == end
    assert ours.decode([end], skip_special_tokens=False) == "<|im_end|>"
    assert ours.decode([end], skip_special_tokens=True) == ""


def test_a_piece_that_text_becomes_is_not_renamed(tmp_path: Path, sentencepiece_model: Callable[..., Path]) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = sentencepiece_checkpoint(tmp_path, sentencepiece_model())
    word = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).piece_to_id("▁the")
    dump(folder / "added_tokens.json", {"<|im_end|>": word})
    assert f"'<|im_end|>' is declared with id {word}, which is '▁the'" in refused(folder)


def test_internvl2_prompt_from_the_sentencepiece_model_alone() -> None:
    """A release has no tokenizer.json."""
    with np.load(FIXTURES / "internvl2" / "expected.npz") as numbers:
        prompt, ids, tokens = str(numbers["prompt"]), numbers["prompt_ids"], numbers["shuffled_features"].shape[1]
    ours = collect_tokenizer(FIXTURES / "internvl2")
    text = prompt.replace("<image>", f"<img>{'<IMG_CONTEXT>' * tokens}</img>")
    assert [1, *ours.encode(text, add_special_tokens=False).ids] == ids.tolist()


def test_sentencepiece_with_added_tokens(tmp_path: Path, sentencepiece_model: Callable[..., Path]) -> None:
    folder = sentencepiece_checkpoint(tmp_path, sentencepiece_model())
    dump(folder / "added_tokens.json", {"<image>": 430, "<video>": 431})
    dump(folder / "special_tokens_map.json", {"additional_special_tokens": [added("<video>")], "pad_token": "<pad>"})
    tokenizer = collect_tokenizer(folder)
    assert tokenizer.token_to_id("<pad>") is None, "a token without an id has no embedding"
    ids = tokenizer.encode("a<image>b<video>", add_special_tokens=False).ids
    assert (ids.count(430), ids[-1]) == (1, 431)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<image> b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "only sentencepiece models of type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization 'nmt_nfkc' is not supported"),
    ],
)
def test_other_sentencepiece_models_are_refused(
    tmp_path: Path, sentencepiece_model: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        collect_tokenizer(sentencepiece_checkpoint(tmp_path, sentencepiece_model(**options)))


# --- tokenizer.json


@pytest.mark.parametrize("name", ["av-qwen2", "clip-mistral", "auroracap"])
def test_tokenizer_json_is_taken_as_it_is(name: str) -> None:
    ours = collect_tokenizer(FIXTURES / name)
    theirs = Tokenizer.from_file(str(FIXTURES / name / "tokenizer.json"))
    assert ours.to_str() == theirs.to_str()


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(FIXTURES / "av-qwen2" / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(collect_tokenizer(tmp_path).encode("A long sentence about nothing.").ids) > 8
    assert len(collect_tokenizer(tmp_path).encode("A").ids) == 1


def test_tokens_of_the_config_are_added_to_a_tokenizer_json(tmp_path: Path) -> None:
    source = FIXTURES / "av-qwen2" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    dump(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"369": added("<|extra|>", special=True)}})
    tokenizer = collect_tokenizer(tmp_path)
    assert tokenizer.encode("<|extra|>").ids == [369]
    assert tokenizer.decode([369], skip_special_tokens=True) == ""
    dump(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"400": added("<|extra|>", special=True)}})
    with pytest.raises(CheckpointError, match=r"lacks the token '<\|extra\|>' declared with id 400"):
        collect_tokenizer(tmp_path)


# --- bad input


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        collect_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert "no tokenizer" in refused(tmp_path)


def edit(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not a tokenizer"),
        ("vocab.json", "[1, 2]", "vocab.json: not a JSON object"),
        ("vocab.json", '{"a": "b"}', "vocab.json: not a mapping"),
        ("vocab.json", "{", "vocab.json: not readable as JSON"),
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt: line 2 is not a pair"),
        ("merges.txt", "nowhere tobefound\n", "merges.txt: does not fit its vocabulary"),
        ("merges.txt", b"\xff", "merges.txt: needed beside vocab.json"),
        ("added_tokens.json", '{"<|im_end|>": "x"}', "the id of '<|im_end|>' is not a number"),
        ("added_tokens.json", '{"<|other|>": 5}', "'<|other|>' is declared with id 5, which is"),
        ("added_tokens.json", '{"<|im_end|>": 9000}', "declared with two ids"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed entry 'x'"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "vocab.json of a GPT2Tokenizer"),
    ],
)
def test_malformed_files(tmp_path: Path, qwen2_files: Path, name: str, content: str | bytes, message: str) -> None:
    edit(qwen2_checkpoint(tmp_path, qwen2_files, decoder=True), name, content)
    assert message in refused(tmp_path)


def test_merges_missing(tmp_path: Path, qwen2_files: Path) -> None:
    (qwen2_checkpoint(tmp_path, qwen2_files, decoder=True) / "merges.txt").unlink()
    assert "merges.txt: needed beside vocab.json" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", b"\x0a\x05\x0a\x03abc"])
def test_malformed_sentencepiece(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("sentencepiece")
    edit(tmp_path, "tokenizer.model", content)
    assert "tokenizer.model: " in refused(tmp_path)
