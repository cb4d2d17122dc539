"""Weights back under the released names: what is read again is what was saved, and everything that was not is kept."""

from __future__ import annotations

import pytest
import torch
from intertitle.errors import OptionError
from intertitle.models import open_checkpoint
from intertitle.models.save import save_checkpoint


@pytest.fixture(scope="module")
def fixture(data_dir):
    return open_checkpoint(data_dir / "av-qwen2")


def states(opened):
    found = {name: opened.load(name).state_dict() for name in opened.components}
    return found | {"embedding": {"weight": opened.embedding().float()}}


def test_entries_come_back_equal(fixture, tmp_path):
    """Every entry changed, those made of several tensors (weight norm, the gate's fours) too."""
    torch.manual_seed(0)
    changed = {
        component: {name: value + 0.1 * torch.randn(value.shape) for name, value in entries.items()}
        for component, entries in states(fixture).items()
    }
    path = save_checkpoint(fixture, changed, tmp_path / "saved", torch.float32)
    again = states(open_checkpoint(path))
    assert {name: set(entries) for name, entries in again.items()} == {n: set(e) for n, e in changed.items()}
    for component, entries in changed.items():
        for name, value in entries.items():
            torch.testing.assert_close(again[component][name], value, rtol=1e-5, atol=1e-6, msg=f"{component}.{name}")


def test_what_no_component_uses_is_kept(fixture, tmp_path):
    path = save_checkpoint(fixture, states(fixture), tmp_path / "saved", torch.float32)
    again = open_checkpoint(path)
    assert set(again.checkpoint.tensors) == set(fixture.checkpoint.tensors)
    names = [name for name in fixture.checkpoint.tensors if "predictor" in name or "post_layernorm" in name]
    assert names
    for name in names:
        assert again.checkpoint.equal(name, name)
        assert torch.equal(again.checkpoint.tensor(name).float(), fixture.checkpoint.tensor(name).float())
    for name in ("config.json", "tokenizer.json", "tiny-siglip/config.json"):
        assert (path / name).read_bytes() == (fixture.path / name).read_bytes()


def test_a_path_that_is_taken_is_left_alone(fixture, tmp_path):
    with pytest.raises(OptionError, match="exists already"):
        save_checkpoint(fixture, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
