"""The bookkeeping of a cache's rows: prompts in chunks, and which positions are projected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.errors import OptionError
from intertitle.runtime.rows import FilledRows, PositionedRows


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


ROWS, LENGTH = 3, 12

moves = st.one_of(
    st.tuples(st.just("prefill"), st.integers(0, ROWS - 1), st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.just("given"), st.integers(0, ROWS - 1), st.lists(st.integers(0, 40), min_size=1, max_size=5)),
    st.tuples(st.just("step"), st.integers(1, ROWS)),
    st.tuples(
        st.just("rearrange"),
        st.dictionaries(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), max_size=ROWS),
        st.none() | st.integers(0, LENGTH),
    ),
    st.tuples(st.just("truncate"), st.integers(0, ROWS - 1), st.integers(0, LENGTH)),
)


@given(st.lists(moves, max_size=25))
def test_a_row_knows_its_next_position_whatever_is_done_to_it(script):
    """Against lists of positions, which are copied and cut."""
    rows, lists = PositionedRows(ROWS, LENGTH, 1000), [list[int]() for _ in range(ROWS)]

    def following(row: int) -> int:
        return max(lists[row], default=-1) + 1

    def append(row: int, positions: list[int], given: np.ndarray | None, chunk: int) -> None:
        if len(lists[row]) + len(positions) > LENGTH:
            return
        parts = rows.append(row, len(positions), 1, chunk, given)
        assert [each for part in parts for each in part.positions.tolist()] == positions
        lists[row] += positions

    for kind, *arguments in script:
        if kind == "prefill":
            row, count, chunk = arguments
            append(row, list(range(following(row), following(row) + count)), None, chunk)
        elif kind == "given":
            row, positions = arguments
            append(row, positions, np.array(positions), 2)
        elif kind == "step" and max(map(len, lists[: arguments[0]])) < LENGTH:
            wanted = [following(row) for row in range(arguments[0])]
            assert rows.step(arguments[0]).tolist() == wanted
            for each, position in zip(lists, wanted, strict=False):
                each.append(position)
        elif kind == "rearrange":
            sources, stop = arguments
            rows.rearrange(sources, stop)
            lists = [lists[sources.get(row, row)][: stop if row in sources else None] for row in range(ROWS)]
        elif kind == "truncate":
            row, length = arguments[0], min(arguments[1], len(lists[arguments[0]]))
            rows.truncate(row, length)
            lists[row] = lists[row][:length]
        assert rows.filled.tolist() == [len(each) for each in lists]
