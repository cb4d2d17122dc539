"""Turns made of a shortlist are those made of all logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from intertitle.runtime.decoding import BeamSearch, Settings, TokenSearch
from intertitle.runtime.decoding.scores import Combination, LogNormalizer, processed
from intertitle.runtime.decoding.search import step
from intertitle.runtime.inference import Choice, FullLogits, Shortlist

SIZE = 16


class Selecting(FullLogits):
    """Random logits, most of them far apart, and shortlists of them as the selection graph makes them."""

    rows, max_length, shortlist_size = 4, 1000, SIZE

    def __init__(self, seed: int, vocabulary: int = 200, size: int = SIZE, ties: bool = False) -> None:
        self.random, self.vocabulary, self.ties = np.random.default_rng(seed), vocabulary, ties
        self.shortlist_size = size
        self.fetched = self.listed = 0

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        logits = self.random.standard_normal((len(token_ids), self.vocabulary)).astype(np.float32) * 4
        return np.round(logits) if self.ties else logits

    def step_shortlist(self, token_ids, choices: list[Choice]) -> list[Shortlist]:
        logits, found = self.step(token_ids), []
        self.listed += 1

        def fetch(rows) -> list[np.ndarray]:
            self.fetched += 1
            return [logits[row] for row in rows]

        for choice in choices:
            full = scores = logits[choice.row]
            if choice.other is not None:
                beta = None if choice.log_beta == -np.inf else float(np.exp(choice.log_beta))
                scores = Combination(choice.alpha, beta)(full, logits[choice.other]).copy()
            # Equal scores in any order: kernels promise none.
            ids = np.lexsort((self.random.random(len(scores)), -scores))[: self.shortlist_size]
            normalize = LogNormalizer()
            found.append(
                Shortlist(
                    ids,
                    scores[ids],
                    full[ids],
                    normalize(full),
                    normalize(scores),
                    lambda rows=choice.rows: fetch(rows),
                )
            )
        return found


class Plain(Selecting):
    """The same logits without shortlists."""

    def __init__(self, seed: int, **how) -> None:
        super().__init__(seed, **how)
        self.shortlist_size = 0

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        logits = super().step(token_ids)
        # What breaking ties takes of the random numbers, to stay in step.
        for _ in range(self.draws):
            self.random.random(self.vocabulary)
        return logits

    draws = 1


def captions(inference, how: Settings, steps: int) -> list[tuple[int, float, float | None]]:
    search = TokenSearch(how)
    first = np.random.default_rng(9).standard_normal((search.streams, inference.vocabulary)).astype(np.float32)
    turn = search.start(list(first))
    tokens = [*turn.tokens]
    for _ in range(steps):
        turn = step(inference, np.asarray(turn.next_ids), [(search, range(search.rows))])[0]
        tokens += turn.tokens
    return [(token.id, token.logprob, token.contrast_logprob) for token in tokens]


asked = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["greedy", "sample"]),
        "repetition_penalty": st.sampled_from([1.0, 1.05, 1.3, 5.0]),
        "no_repeat_ngram": st.sampled_from([0, 1, 2]),
        "temperature": st.sampled_from([0.3, 1.0]),
        "top_p": st.sampled_from([0.8, 1.0]),
        "top_k": st.integers(1, SIZE // 2),
        "min_p": st.sampled_from([0.0, 0.1]),
        "contrast": st.sampled_from([None, (0.5, None), (1.0, 0.1), (0.0, 0.5)]),
    }
)


@hypothesis_settings(deadline=None, max_examples=120)
@given(asked, st.integers(0, 1000), st.booleans(), st.sampled_from([30, 200]))
def test_the_same_tokens_as_from_all_logits(how, seed, ties, vocabulary):
    settings = Settings(max_new_tokens=1000, eos_token_ids=(), seed=seed, **how)
    mine = captions(Selecting(seed, vocabulary=vocabulary, ties=ties), settings, 12)
    theirs = captions(Plain(seed, vocabulary=vocabulary, ties=ties), settings, 12)
    assert [token for token, *_ in mine] == [token for token, *_ in theirs]
    for got, want in zip(mine, theirs, strict=True):
        assert got[1] == pytest.approx(want[1], abs=1e-5)
        assert (got[2] is None) == (want[2] is None)
        assert got[2] is None or got[2] == pytest.approx(want[2], abs=1e-5)


def test_what_is_not_on_the_list_is_fetched():
    """A ban on every token said already empties a short list; a longer one suffices."""
    how = Settings(max_new_tokens=1000, eos_token_ids=(), no_repeat_ngram=1)
    short = Selecting(0, vocabulary=40, size=2)
    tokens = [token for token, *_ in captions(short, how, 20)]
    assert len(set(tokens)) == len(tokens)
    assert 0 < short.fetched < 20
    long = Selecting(0, vocabulary=40, size=32)
    captions(long, how, 20)
    assert (long.fetched, long.listed) == (0, 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 0.9},
        {"strategy": "sample", "top_k": 0},
        {"strategy": "sample", "top_k": SIZE},
    ],
)
def test_who_needs_all_logits_gets_them(changes):
    search = TokenSearch(Settings(max_new_tokens=4, eos_token_ids=(), **changes))
    assert search.choices([0], SIZE) == []
    inference = Selecting(0)
    captions(inference, search.settings, 3)
    assert inference.listed == 0


def test_one_that_needs_all_logits_decides_for_a_step():
    inference = Selecting(0)
    greedy = TokenSearch(Settings(max_new_tokens=9, eos_token_ids=()))
    sampled = TokenSearch(Settings(max_new_tokens=9, eos_token_ids=(), strategy="sample", top_k=0))
    for search in (greedy, sampled):
        search.start([np.zeros(200, np.float32)])
    step(inference, np.zeros(1, np.int64), [(greedy, [0])])
    assert inference.listed == 1
    turns = step(inference, np.zeros(2, np.int64), [(greedy, [0]), (sampled, [1])])
    assert [len(turn.next_ids) for turn in turns] == [1, 1]
    assert inference.listed == 1


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([0, 1, 2]),
    st.integers(1, 3),
    st.sampled_from([(), (3,)]),
    st.sampled_from([-1.0, 1.0]),
)
def test_beams_from_shortlists(seed, penalty, ngram, beams, eos, length_penalty):
    """The same hypotheses, beam by beam and turn by turn."""
    how = Settings(
        max_new_tokens=12,
        eos_token_ids=eos,
        strategy="beam",
        num_beams=beams,
        repetition_penalty=penalty,
        no_repeat_ngram=ngram,
        length_penalty=length_penalty,
    )
    first = np.random.default_rng(seed).standard_normal(60).astype(np.float32) * 3
    ended = []
    for inference in (Selecting(seed, vocabulary=60, size=24), Plain(seed, vocabulary=60)):
        inference.draws = beams
        search = BeamSearch(how, num_results=beams)
        turn, sources = search.start([first]), []
        while len(turn.next_ids):
            sources.append((list(turn.next_ids), turn.sources))
            # As many choices as there are beams, so that both draw alike.
            inference.draws = len(search.choices(range(beams), 24))
            turn = step(inference, np.asarray(turn.next_ids), [(search, range(beams))])[0]
        ended.append((sources, [[token.id for token in each] for each in search.results], turn))
    assert ended[0][:2] == ended[1][:2]
    for mine, theirs in zip(ended[0][2].tokens, ended[1][2].tokens, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_more_beams_than_a_list_has_room_for():
    search = BeamSearch(Settings(max_new_tokens=9, eos_token_ids=(2,), strategy="beam", num_beams=5))
    search.start([np.arange(60, dtype=np.float32)])
    assert search.choices(range(5), 16) == []
    assert [choice.row for choice in search.choices([4, 2, 1, 0, 3], 64)] == [4, 2, 1, 0, 3]


def test_a_ban_that_would_leave_nothing_is_none():
    """A cutoff left one token, and that one was said already."""
    scores = np.full(5, -np.inf, np.float32)
    scores[3] = 1
    how = Settings(max_new_tokens=9, eos_token_ids=(), no_repeat_ngram=1)
    with processed(scores, [3, 1], how):
        assert scores.argmax() == 3
    assert np.isfinite(scores).tolist() == [False, False, False, True, False]
