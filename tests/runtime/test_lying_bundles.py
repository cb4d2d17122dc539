"""Bundles whose hashes are right and whose contents lie: an error of ours, or a caption."""

from __future__ import annotations

import json
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intertitle import Captioner
from intertitle.errors import BundleError
from intertitle.runtime.text import load_tokenizer

from .bundle_mutations import outcome, write_mutant


def test_mutants(compiled: Callable[..., Path], tmp_path: Path):
    # A copy: mutants are links to its files, and a bundle that other tests use at the same time must not change.
    bundle = shutil.copytree(compiled("clip-mistral"), tmp_path / "bundle")
    found, wrong = Counter[str](), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(180):
        said = write_mutant(bundle, tmp_path / "mutant", seed)
        try:
            found[outcome(tmp_path / "mutant")] += 1
        except BaseException as error:
            wrong.append(f"{said}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
    assert set(found) <= {"BundleError", "OptionError", "captioned"}, found
    assert found["BundleError"] > 50, found
    assert found["captioned"] > 10, found
    # KiB on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


TOKENIZERS: dict[str, dict[str, Any]] = {
    "padding": {"padding": {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None}},
    "truncation": {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_would_cut_or_pad(case: str, data_dir: Path, tmp_path: Path):
    state = json.loads((data_dir / "av-qwen2" / "tokenizer.json").read_bytes()) | TOKENIZERS[case]
    if state.get("padding"):
        state["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    plain = load_tokenizer(data_dir / "av-qwen2" / "tokenizer.json")
    text = "A dog runs along the beach."
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == plain.encode(text).ids


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a tokenizer"),
        (b"\xff\xfe", "not a tokenizer"),
    ],
)
def test_what_is_no_tokenizer(data: bytes, message: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_normalizer_that_makes_much_of_little(data_dir: Path, tmp_path: Path):
    state = json.loads((data_dir / "av-qwen2" / "tokenizer.json").read_bytes())
    step = {"type": "Replace", "pattern": {"Regex": "x"}, "content": "x" * 100}
    state["normalizer"] = {"type": "Sequence", "normalizers": [step] * 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(BundleError, match="its normalizer makes texts 10000000000 times as long"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_bundle_that_changes_while_it_is_used(compiled: Callable[..., Path], tmp_path: Path):
    """Graphs are opened when they are first needed, long after they were verified."""
    bundle = tmp_path / "bundle"
    write_mutant(shutil.copytree(compiled("clip-mistral"), tmp_path / "copy"), bundle, 0)
    for file in compiled("clip-mistral").iterdir():
        (bundle / file.name).unlink(missing_ok=True)
        (bundle / file.name).write_bytes(file.read_bytes())
    captioner = Captioner.load(bundle, threads=1)
    data = bytearray((bundle / "vision.onnx.data").read_bytes())
    data[0] ^= 1
    (bundle / "vision.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"'vision.onnx.data' was changed after it was verified"):
        captioner.caption(frames=np.zeros((1, 8, 8, 3), np.uint8))
