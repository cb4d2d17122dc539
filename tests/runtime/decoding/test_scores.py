"""Options, scores and token-by-token strategies over a table in place of a decoder; transformers as oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intertitle.contract.records import Generation
from intertitle.errors import OptionError
from intertitle.runtime.decoding import Decoding, Settings, TokenSearch, generate, log_likelihoods, resolve
from intertitle.runtime.decoding.scores import Combination, cut, penalty_applied, repeated_ngram_tokens
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DEFAULTS = Generation(
    eos_token_ids=[2], repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=2048
)


class Table:
    """An ``Inference`` whose logits depend on the last token only: row t of a matrix."""

    rows, max_length, shortlist_size = 1, 10_000, 0

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        return self.table[token_ids]


def settings(**changes) -> Settings:
    values = {
        "strategy": "greedy",
        "max_new_tokens": 8,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "eos_token_ids": (2,),
        "seed": 0,
    }
    return Settings(**{**values, **changes})


def run(table: np.ndarray, first: int, how: Settings) -> list:
    return list(generate(Table(table), table[first], TokenSearch(how)))  # type: ignore[arg-type]


def test_greedy_follows_the_largest_logit_and_ends_with_eos():
    table = np.full((5, 5), -1.0, np.float32)
    table[0, 3], table[3, 1], table[1, 2] = 4, 4, 4
    tokens = run(table, 0, settings())
    assert [token.id for token in tokens] == [3, 1, 2]
    assert [token.is_eos for token in tokens] == [False, False, True]
    # log softmax of one 4 among four -1, by hand: 4 - log(e^4 + 4 e^-1).
    assert tokens[0].logprob == pytest.approx(4 - np.log(np.exp(4) + 4 * np.exp(-1)), rel=1e-6)


def test_length_limit_counts_generated_tokens():
    table = np.eye(5, k=1, dtype=np.float32)
    assert [token.id for token in run(table[[0, 0, 0, 0, 0]], 0, settings(max_new_tokens=1))] == [1]
    assert len(run(table[[0, 0, 0, 0, 0]], 0, settings(max_new_tokens=6))) == 6


@given(st.lists(st.integers(0, 30), max_size=12), st.floats(0.5, 2), st.integers(0, 2**31))
def test_repetition_penalty_equals_transformers(seen, penalty, seed):
    logits = np.random.default_rng(seed).standard_normal(31).astype(np.float32) * 3
    before = logits.copy()
    with penalty_applied(logits, seen, penalty):
        mine = logits.copy()
    np.testing.assert_array_equal(logits, before)
    ids = torch.tensor([seen], dtype=torch.int64)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(before.copy())[None])[0]
    np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-6)


def test_penalty_sees_generated_tokens_only():
    # Token 1 leads by a little after token 1: the penalty on the first 1 hands the second place to 3.
    table = np.zeros((4, 4), np.float32)
    table[:, 1], table[:, 3] = 2.0, 1.95
    plain, penalized_run = (run(table, 0, settings(max_new_tokens=2, repetition_penalty=p)) for p in (1.0, 1.05))
    assert [token.id for token in plain] == [1, 1]
    assert [token.id for token in penalized_run] == [1, 3]
    # The likelihood is the model's own, whatever the penalty made of the logits.
    assert penalized_run[1].logprob == pytest.approx(1.95 - np.log(2 + np.exp(2.0) + np.exp(1.95)), rel=1e-5)


@given(
    st.integers(0, 2**31),
    st.floats(0.1, 3),
    st.integers(0, 40),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.sampled_from([31, 5, 1, 21_000]),
)
def test_sampling_cuts_equal_transformers(seed, temperature, top_k, top_p, min_p, size):
    scores = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 2
    wide = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores).double()[None])
    if top_k:
        wide = TopKLogitsWarper(top_k)(None, wide)
    if top_p < 1:
        wide = TopPLogitsWarper(top_p)(None, wide)
    if min_p:
        wide = MinPLogitsWarper(min_p)(None, wide)
    theirs = torch.softmax(wide[0], -1).numpy()
    index, probabilities = cut(scores, settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    mine = np.zeros(size)
    mine[index] = probabilities / probabilities.sum()
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


@given(st.lists(st.integers(0, 3), max_size=14), st.integers(1, 5))
def test_repeated_ngrams_equal_transformers(seen, size):
    scores = torch.zeros(1, 4)
    theirs = NoRepeatNGramLogitsProcessor(size)(torch.tensor([seen], dtype=torch.int64), scores)[0]
    assert repeated_ngram_tokens(seen, size) == torch.nonzero(torch.isinf(theirs)).flatten().tolist()


def test_no_ngram_comes_twice():
    table = np.random.default_rng(3).standard_normal((6, 6)).astype(np.float32)
    before = table.copy()
    ids = [token.id for token in run(table, 0, settings(max_new_tokens=20, no_repeat_ngram=2, eos_token_ids=()))]
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs) == 19
    np.testing.assert_array_equal(table, before)


def test_contrast_combines_two_streams_as_computed_by_hand():
    full, other = np.array([2.0, 1.8, -1.0], np.float32), np.array([3.0, 1.0, -9.0], np.float32)
    # (1 + 0.5) * full - 0.5 * other = [1.5, 2.2, 3.0].
    np.testing.assert_allclose(Combination(0.5, None)(full, other), [1.5, 2.2, 3.0], rtol=1e-6)
    # Token 2 has exp(-3) = 0.0498 of the likeliest one's probability in the full stream.
    np.testing.assert_allclose(Combination(0.5, 0.06)(full, other), [1.5, 2.2, -np.inf], rtol=1e-6)
    np.testing.assert_allclose(Combination(0.5, 0.04)(full, other), [1.5, 2.2, 3.0], rtol=1e-6)
    turn = TokenSearch(settings(contrast=(0.5, 0.06))).start([full, other])
    assert (list(turn.next_ids), turn.tokens[0].id) == ([1, 1], 1)
    assert turn.tokens[0].logprob == pytest.approx(1.8 - np.log(np.exp(2) + np.exp(1.8) + np.exp(-1)), rel=1e-6)
    assert turn.tokens[0].contrast_logprob == pytest.approx(2.2 - np.log(np.exp(1.5) + np.exp(2.2)), rel=1e-6)


def test_forced_tokens_count_as_generated_for_the_penalty():
    row = np.array([1.0, 0.99, 0.0], np.float32)
    assert TokenSearch(settings(repetition_penalty=1.5)).start([row], forced=[0]).tokens[0].id == 1
    assert TokenSearch(settings(repetition_penalty=1.5)).start([row]).tokens[0].id == 0


def test_sampling_is_reproducible_and_follows_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    table = np.tile(logits, (4, 1))
    how = {"strategy": "sample", "max_new_tokens": 4000, "eos_token_ids": ()}
    tokens = [token.id for token in run(table, 0, settings(**how, seed=7))]
    assert tokens == [token.id for token in run(table, 0, settings(**how, seed=7))]
    assert tokens != [token.id for token in run(table, 0, settings(**how, seed=8))]
    counts = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_log_likelihoods_equal_log_softmax():
    logits = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32) * 10
    tokens = [3, 4, 49, 0, 0, 7]
    theirs = torch.log_softmax(torch.from_numpy(logits).double(), -1)[torch.arange(6), torch.tensor(tokens)]
    np.testing.assert_allclose(log_likelihoods(logits, tokens), theirs.numpy(), atol=1e-5)


def test_open_values_come_from_the_checkpoint():
    resolved = resolve(Decoding(), DEFAULTS)
    assert (resolved.repetition_penalty, resolved.temperature, resolved.top_p) == (1.05, 0.7, 0.8)
    assert (resolved.top_k, resolved.max_new_tokens, resolved.eos_token_ids) == (20, 2048, (2,))
    assert resolve(Decoding(repetition_penalty=1.0, top_k=0, max_new_tokens=5), DEFAULTS).max_new_tokens == 5
    assert resolve(Decoding(top_k=0), DEFAULTS).top_k == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("strategy", "psychic"),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("seed", -1),
        ("min_p", 1.5),
        ("no_repeat_ngram", -1),
        ("num_beams", 0),
        ("length_penalty", float("inf")),
        ("contrast", "moral"),
        ("contrast_alpha", 1.0),
        ("confidence", 0.5),
        ("confidence", -1.0),
        ("noise_step", 1000),
    ],
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(OptionError, match=option.split("_")[0]):
        Decoding(**{option: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contrast": "temporal", "strategy": "beam"}, "beams"),
        ({"contrast": "temporal", "contrast_alpha": -1.0}, "contrast_alpha"),
        ({"contrast": "noise", "contrast_beta": 2.0}, "contrast_beta"),
        ({"retrospective": True, "retrospective_template": "again"}, "{caption}"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(OptionError, match=words):
        Decoding(**options)


def test_contrast_defaults_are_those_of_the_papers():
    assert resolve(Decoding(contrast="temporal"), DEFAULTS).contrast == (0.5, None)
    assert resolve(Decoding(contrast="noise"), DEFAULTS).contrast == (1.0, 0.1)
    assert resolve(Decoding(contrast="noise", contrast_alpha=2.0), DEFAULTS).contrast == (2.0, 0.1)
    assert resolve(Decoding(contrast="noise"), DEFAULTS, contrast=False).contrast is None
    assert [resolve(Decoding(contrast=c), DEFAULTS).rows for c in (None, "temporal")] == [1, 2]  # type: ignore[arg-type]
