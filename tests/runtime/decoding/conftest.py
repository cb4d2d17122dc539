"""A decoder in place of a model: what it says depends on all that its row has taken in, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from intertitle.errors import OptionError

VOCABULARY = 12


class Oracle:
    """An ``Inference`` over histories. Embeddings are ``[S, 1]``, a token's embedding is its id.

    Every claim that a scheduler makes to it is checked: that rows agree up to ``start``, that a step takes in rows that
    hold something, that nothing outgrows ``max_length``.
    """

    def __init__(self, rows: int, max_length: int, vocabulary: int = VOCABULARY) -> None:
        self.rows, self.max_length, self.vocabulary = rows, max_length, vocabulary
        self.histories: list[list[float]] = [[] for _ in range(rows)]
        self.computed = 0
        self.steps: list[int] = []

    def logits(self, history: list[float]) -> np.ndarray:
        digest = hashlib.sha256(np.array(history).tobytes()).digest()
        return np.random.default_rng(list(digest)).standard_normal(self.vocabulary).astype(np.float32) * 2

    def prefill(self, row: int, embeds: np.ndarray, num_logits: int = 1, progress=None) -> np.ndarray:
        if len(self.histories[row]) + len(embeds) > self.max_length:
            raise OptionError("outgrown")
        rows = []
        for value in embeds[:, 0].tolist():
            self.histories[row].append(value)
            rows.append(self.logits(self.histories[row]))
        self.computed += len(embeds)
        if progress is not None:
            progress(len(embeds))
        return np.stack(rows[-num_logits:])

    shortlist_size = 0

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        assert 1 <= len(token_ids) <= self.rows
        self.steps.append(len(token_ids))
        out = []
        for history, token in zip(self.histories, token_ids.tolist(), strict=False):
            assert history, "a step over a row that holds nothing"
            assert len(history) < self.max_length
            history.append(float(token))
            out.append(self.logits(history))
        return np.stack(out)

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        for target, source in sources.items():
            assert self.histories[target][:start] == self.histories[source][:start]
        self.histories = [
            self.histories[sources.get(row, row)][: stop if row in sources else None] for row in range(self.rows)
        ]

    def truncate(self, row: int, length: int) -> None:
        assert 0 <= length <= len(self.histories[row])
        del self.histories[row][length:]


@pytest.fixture
def oracle() -> Callable[..., Oracle]:
    return Oracle
