"""Merging of visual tokens: by hand, and what holds for any tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from intertitle.runtime import compression
from intertitle.runtime.compression import merge_tokens

values = st.floats(-8, 8, width=32)
tokens_and_count = st.integers(1, 40).flatmap(
    lambda n: st.tuples(arrays.arrays(np.float32, (n, 5), elements=values), st.integers(1, n))
)


def test_by_hand():
    """Tokens 0, 2, 4 look among 1, 3: 4 is parallel to 3, then 2 is nearer to 3 than 0 is to 1."""
    tokens = np.array([[1, 0], [0, 1], [2, 3], [3, 3], [6, 6]], np.float32)
    merged, sizes = merge_tokens(tokens, 4)
    np.testing.assert_allclose(merged, [[1, 0], [0, 1], [2, 3], [4.5, 4.5]])
    assert sizes.tolist() == [1, 1, 1, 2]
    merged, sizes = merge_tokens(tokens, 3)
    np.testing.assert_allclose(merged, [[1, 0], [0, 1], [11 / 3, 4]])
    assert sizes.tolist() == [1, 1, 3]


def test_rounds_go_on_until_one_is_left():
    tokens = np.arange(14, dtype=np.float32).reshape(7, 2) + 1
    merged, sizes = merge_tokens(tokens, 1)
    np.testing.assert_allclose(merged, tokens.mean(0, keepdims=True), rtol=1e-6)
    assert sizes.tolist() == [7]


@settings(max_examples=150, deadline=None)
@given(tokens_and_count)
def test_whatever_the_tokens(case):
    tokens, count = case
    before = tokens.copy()
    merged, sizes = merge_tokens(tokens, count)
    assert np.array_equal(tokens, before)
    assert (merged.shape, merged.dtype, sizes.shape) == ((count, 5), np.float32, (count,))
    assert sizes.sum() == len(tokens)
    assert sizes.min() >= 1
    # Weighted means: the sum is kept, and no value leaves the range of its feature.
    np.testing.assert_allclose((merged * sizes[:, None]).sum(0), tokens.sum(0), rtol=1e-3, atol=1e-3)
    assert (merged >= tokens.min(0) - 1e-4).all()
    assert (merged <= tokens.max(0) + 1e-4).all()
    again, _ = merge_tokens(tokens, count)
    assert np.array_equal(merged, again)
    if count == len(tokens):
        assert np.array_equal(merged, tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31))
def test_identical_tokens_merge_first_and_the_order_stays(pairs, seed):
    """Every distinct token twice in a row: half as many tokens are those, in their order."""
    distinct = np.random.default_rng(seed).standard_normal((pairs, 16)).astype(np.float32)
    merged, sizes = merge_tokens(np.repeat(distinct, 2, axis=0), pairs)
    np.testing.assert_allclose(merged, distinct, rtol=1e-5)
    assert sizes.tolist() == [2] * pairs


def test_untouched_tokens_keep_their_order():
    tokens = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    merged, sizes = merge_tokens(tokens, 45)
    alone = [int(np.flatnonzero((tokens == row).all(1))[0]) for row in merged[sizes == 1]]
    assert len(alone) >= 30
    assert alone == sorted(alone)


def test_the_similarity_is_taken_in_chunks(monkeypatch):
    tokens = np.random.default_rng(1).standard_normal((101, 8)).astype(np.float32)
    whole, sizes = merge_tokens(tokens, 20)
    monkeypatch.setattr(compression, "_CHUNK", 7)
    chunked, chunked_sizes = merge_tokens(tokens, 20)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-6)
    assert np.array_equal(chunked_sizes, sizes)


def test_tokens_of_nothing_but_zeros():
    merged, sizes = merge_tokens(np.zeros((6, 3), np.float32), 2)
    assert np.array_equal(merged, np.zeros((2, 3)))
    assert sizes.sum() == 6


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_count_that_cannot_be(count):
    with pytest.raises(ValueError, match="3 tokens cannot become"):
        merge_tokens(np.zeros((3, 2), np.float32), count)
