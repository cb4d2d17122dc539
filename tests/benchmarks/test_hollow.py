"""A bundle that travels without its weights: the same but for them, and them of the same kind."""

from __future__ import annotations

import numpy as np
import pytest
from intertitle.benchmarks.hollow import fill, hollow
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.decoding import Decoding


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_there_and_back(weights, compiled, tmp_path):
    original = compiled("av-qwen2", weights)
    size = hollow(original, tmp_path / "hollow")
    assert size == sum(path.stat().st_size for path in (tmp_path / "hollow").iterdir())
    fill(tmp_path / "hollow", tmp_path / "filled")
    mine, theirs = (Bundle.open(path, verify="full") for path in (tmp_path / "filled", original))
    assert {name: file.size for name, file in mine.manifest.files.items()} == {
        name: file.size for name, file in theirs.manifest.files.items()
    }
    # What is drawn has the spread of what it was drawn from, here the table of embeddings.
    ids = np.arange(mine.manifest.decoder.vocab_size)
    tables = [bundle.embed(ids) for bundle in (mine, theirs)]
    assert tables[0].std() == pytest.approx(tables[1].std(), rel=0.1)
    assert not np.array_equal(*tables)
    # Small tensors, such as norms, are those that were there, and the whole computes numbers.
    caption = Captioner(mine).caption(
        frames=np.random.default_rng(0).integers(0, 256, (8, 60, 80, 3), dtype=np.uint8),
        decoding=Decoding(max_new_tokens=4),
    )
    assert np.isfinite(caption.token_logprobs).all()
