"""The bookkeeping of a cache's rows: prompts in chunks, and which positions are projected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.errors import OptionError
from intertitle.runtime.rows import FilledRows


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.integers(0, 20))
def test_chunks_are_the_prompt_and_give_the_logits_that_are_asked(length, num_logits, chunk, before):
    rows = FilledRows(2, 100)
    rows.filled[:] = before
    num_logits = min(num_logits, length)
    tokens, asked, filled = [], [], []
    for part in rows.append(1, length, num_logits, chunk):
        assert 0 < part.stop - part.start <= chunk
        assert len(part.asked)
        assert part.asked.max() < part.stop - part.start
        tokens += range(part.start, part.stop)
        if part.wanted:
            asked += (part.start + part.asked).tolist()
        filled.append(int(rows.filled[1]))
    assert tokens == list(range(length))
    assert asked == list(range(length - num_logits, length))
    assert filled == [before + min(stop, length) for stop in range(chunk, length + chunk, chunk)]
    assert rows.filled[0] == before


def test_what_does_not_fit_is_refused_before_anything_is_taken():
    rows = FilledRows(1, 8)
    rows.filled[0] = 5
    with pytest.raises(OptionError, match="row 0 has 5, 4 more are asked"):
        rows.append(0, 4, 1, 2)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"num_logits is {wrong} for 3 new tokens"):
            rows.append(0, 3, wrong, 2)
    assert np.array_equal(rows.filled, [5])
