"""Layers that share a tensor of a checkpoint, and ids of special tokens, by hand."""

from __future__ import annotations

import json

import pytest
import torch
from intertitle.models.checkpoint import Checkpoint
from intertitle.models.sources import from_fused
from intertitle.models.token_ids import token_id


def test_rows_of_a_joined_tensor():
    """Two groups: three rows of a layer, one of another, two of a third."""
    joined = torch.arange(12.0)[:, None].expand(12, 2)
    wanted = [[0, 1, 2, 6, 7, 8], [3, 9], [4, 5, 10, 11]]
    sources = [from_fused("w", (len(rows), 2), (3, 1, 2), part, 2) for part, rows in enumerate(wanted)]
    back = torch.zeros(12, 2)
    for source, rows in zip(sources, wanted, strict=True):
        assert source.shapes == ((12, 2),)
        entry = source.build(joined)
        assert entry[:, 0].tolist() == rows
        (part,) = source.split(entry)
        assert part.count_nonzero() == entry.count_nonzero()
        assert torch.equal(source.build(part), entry)
        back += part
    assert torch.equal(back, joined)


def test_a_bias_is_cut_as_its_weight():
    source = from_fused("b", (4,), (4, 4), 1)
    assert source.shapes == ((8,),)
    assert source.build(torch.arange(8.0)).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<end>"}}}),
        ("added_tokens.json", {"<end>": 7}),
        ("tokenizer.json", {"added_tokens": [{"id": 3, "content": "<x>"}, {"id": 7, "content": "<end>"}]}),
    ],
)
def test_the_id_of_a_special_token_stands_in_any_of_three_files(file, content, copied):
    copy = copied("clip-mistral")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (copy.path / name).write_text("{}")
    checkpoint = Checkpoint.open(copy.path)
    assert token_id(checkpoint, "<end>") is None
    (copy.path / file).write_text(json.dumps(content))
    assert token_id(checkpoint, "<end>") == 7
    assert token_id(checkpoint, None) is None
    (copy.path / file).write_text(json.dumps(content).replace("7", "true"))
    assert token_id(checkpoint, "<end>") is None
