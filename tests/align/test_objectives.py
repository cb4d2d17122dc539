import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.align import objectives
from intertitle.align.objectives import dpo, leanpo, orpo, simpo, supervised, synpo
from torch import Tensor

W = [[-0.1, -0.5, -0.3], [-1.0, -2.0]]
L = [[-0.7, -0.9], [-0.4, -0.2, -0.6, -0.8]]
REFERENCE = [[-1.0, -2.5], [-1.5, -2.2]]
"""Sums of the chosen texts and of the rejected ones."""


def batch(rows: list[list[float]], width: int = 0, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    width = max(width, *map(len, rows))
    logp = torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return logp, mask


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(pair_loss: Callable[[list[float], list[float]], float]) -> float:
    return mean([pair_loss(w, rejected) for w, rejected in zip(W, L, strict=True)])


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *batch(W), *batch(L)


def references() -> tuple[Tensor, Tensor]:
    return torch.tensor(REFERENCE[0], dtype=torch.float64), torch.tensor(REFERENCE[1], dtype=torch.float64)


# --- values, with plain floats


def test_synpo_is_a_plain_sigmoid_of_geometric_means_and_the_mean_probability_of_the_chosen():
    # First pair: (-0.1 - 0.5 - 0.3) / 3 = -0.3 against (-0.7 - 0.9) / 2 = -0.8.
    first = -sigmoid(30 * (math.exp(-0.3) - math.exp(-0.8))) - 0.2 * mean([math.exp(x) for x in W[0]])
    second = -sigmoid(30 * (math.exp(-1.5) - math.exp(-0.5))) - 0.2 * mean([math.exp(x) for x in W[1]])
    loss, measures = synpo(*pairs())
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-12)
    margins = 30 * (math.exp(-0.3) - math.exp(-0.8)), 30 * (math.exp(-1.5) - math.exp(-0.5))
    assert float(measures["margin"]) == pytest.approx(sum(margins) / 2)
    assert float(measures["accuracy"]) == 0.5
    assert float(measures["logp_chosen"]) == pytest.approx((-0.3 - 1.5) / 2)
    assert float(measures["logp_rejected"]) == pytest.approx((-0.8 - 0.5) / 2)


def test_synpo_in_log_form():
    def pair(w: list[float], rejected: list[float]) -> float:
        margin = 30 * (math.exp(mean(w)) - math.exp(mean(rejected)))
        return -math.log(sigmoid(margin)) - 0.2 * mean([math.exp(x) for x in w])

    assert float(synpo(*pairs(), form="log")[0]) == pytest.approx(expected(pair))


@pytest.mark.parametrize("smoothing", ["none", "static", "dynamic"])
def test_leanpo(smoothing):
    def pair(w: list[float], rejected: list[float]) -> float:
        d = 2.0 * (mean(w) - mean(rejected))
        e = {"none": 0.0, "static": 0.3, "dynamic": 0.3 * sigmoid(-d / 0.5)}[smoothing]
        return -(1 - e) * math.log(sigmoid(d - 0.4)) - e * math.log(sigmoid(-(d - 0.4)))

    loss, _ = leanpo(*pairs(), beta=2.0, gamma=0.4, smoothing=smoothing, epsilon=0.3, temperature=0.5)
    assert float(loss) == pytest.approx(expected(pair))


def test_dynamic_smoothing_doubts_the_pairs_that_are_ordered_the_other_way_round():
    """The slope of a pair's loss is that of static smoothing with the share of its own margin."""
    logp_w, mask_w, logp_l, mask_l = pairs()
    logp_w.requires_grad_(True)
    leanpo(logp_w, mask_w, logp_l, mask_l, epsilon=0.4)[0].backward()
    got = logp_w.grad
    assert got is not None
    for row, (w, rejected) in enumerate(zip(W, L, strict=True)):
        d = 2.0 * (mean(w) - mean(rejected))
        e = 0.4 * sigmoid(-d)
        slope = -(1 - e) * sigmoid(0.5 - d) + e * sigmoid(d - 0.5)
        assert float(got[row, 0]) == pytest.approx(slope * 2.0 / len(w) / 2)


def test_dpo():
    # Sums: -0.9 and -3.0 against -1.6 and -2.0.
    margins = 0.1 * ((-0.9 + 1.0) - (-1.6 + 1.5)), 0.1 * ((-3.0 + 2.5) - (-2.0 + 2.2))
    loss, measures = dpo(*pairs(), *references())
    assert float(loss) == pytest.approx(-(math.log(sigmoid(margins[0])) + math.log(sigmoid(margins[1]))) / 2)
    assert float(measures["margin"]) == pytest.approx(sum(margins) / 2)
    assert float(measures["accuracy"]) == 0.5
    anchored, _ = dpo(*pairs(), *references(), anchor=0.1)
    assert float(anchored - loss) == pytest.approx(0.1 * (0.3 + 1.5) / 2)


def test_simpo():
    loss, _ = simpo(*pairs(), beta=2.5, gamma=1.4)
    assert float(loss) == pytest.approx(expected(lambda w, r: -math.log(sigmoid(2.5 * (mean(w) - mean(r)) - 1.4))))


def test_orpo():
    def odds(logp: float) -> float:
        return math.exp(logp) / (1 - math.exp(logp))

    def pair(w: list[float], rejected: list[float]) -> float:
        return -mean(w) - 0.1 * math.log(sigmoid(math.log(odds(mean(w)) / odds(mean(rejected)))))

    assert float(orpo(*pairs())[0]) == pytest.approx(expected(pair))


def test_supervised_is_the_cross_entropy_of_pytorch():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    tokens[0, 3:] = -100
    mask = tokens != -100
    logp = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=-100)
    assert float(supervised(logp, mask)[0]) == pytest.approx(float(want), abs=1e-6)


# --- gradients


def objective_of(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if name == "dpo":
        return lambda *given: dpo(*given, *references(), anchor=0.1)[0]
    if name == "leanpo":
        # Dynamic smoothing is without gradient on purpose: finite differences would see it.
        return lambda *given: leanpo(*given, smoothing="static")[0]
    if name == "synpo log":
        return lambda *given: synpo(*given, form="log")[0]
    if name == "supervised":
        return lambda *given: supervised(*given[:2])[0]
    return lambda *given: objectives.OBJECTIVES[name](*given)[0]


NAMES = ["synpo", "synpo log", "leanpo", "dpo", "simpo", "orpo", "supervised"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    of = objective_of(name)
    logp_w, mask_w, logp_l, mask_l = pairs()
    both = [logp_w.requires_grad_(True), logp_l.requires_grad_(True)]
    of(logp_w, mask_w, logp_l, mask_l).backward()
    step = 1e-6
    for values, mask in zip(both, (mask_w, mask_l), strict=True):
        grad = values.grad if values.grad is not None else torch.zeros_like(values)
        for place in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            ends = []
            for sign in (1, -1):
                moved = [each.detach().clone() for each in both]
                moved[0 if values is both[0] else 1][tuple(place)] += sign * step
                ends.append(float(of(moved[0], mask_w, moved[1], mask_l)))
            assert float(grad[tuple(place)]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)
        assert not grad[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_stands_in_padding_reaches_loss_or_gradient(name):
    of = objective_of(name)
    want = of(*pairs())
    logp_w, mask_w = batch(W, 6, -math.inf)
    logp_l, mask_l = batch(L, 5, math.nan)
    logp_w.requires_grad_(True)
    loss = of(logp_w, mask_w, logp_l, mask_l)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(want), abs=1e-12)
    assert logp_w.grad is not None
    assert logp_w.grad.isfinite().all()


def test_a_certain_text_has_finite_odds():
    logp, mask = batch([[0.0, 0.0]])
    logp.requires_grad_(True)
    loss, _ = orpo(logp, mask, *batch([[-1.0]]))
    loss.backward()
    assert bool(loss.isfinite())
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


# --- invariances

LOGPS = st.lists(st.floats(-8, -0.01), min_size=1, max_size=6)
BATCHES = st.lists(st.tuples(LOGPS, LOGPS), min_size=1, max_size=4)
PAIRED = sorted(set(objectives.OBJECTIVES) - {"supervised"})


def measures_of(name: str, w: list[list[float]], rejected: list[list[float]], width: int = 0) -> tuple[float, dict]:
    sums = [torch.zeros(len(w), dtype=torch.float64)] * 2 if name in objectives.NEED_REFERENCE else []
    loss, measures = objectives.OBJECTIVES[name](*batch(w, width), *batch(rejected, width), *sums)
    return float(loss), {key: float(value) for key, value in measures.items()}


@pytest.mark.parametrize("name", PAIRED)
@given(texts=BATCHES, width=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_padding_changes_nothing(name, texts, width):
    w, rejected = [list(each) for each in zip(*texts, strict=True)]
    loss, measures = measures_of(name, w, rejected)
    wide_loss, wide = measures_of(name, w, rejected, width)
    assert wide_loss == pytest.approx(loss, abs=1e-9)
    assert wide == pytest.approx(measures, abs=1e-9)


@pytest.mark.parametrize("name", PAIRED)
@given(texts=BATCHES)
@settings(max_examples=30, deadline=None)
def test_swapping_the_texts_mirrors_the_margin(name, texts):
    w, rejected = [list(each) for each in zip(*texts, strict=True)]
    _, one = measures_of(name, w, rejected)
    _, other = measures_of(name, rejected, w)
    assert other["margin"] == pytest.approx(-one["margin"], abs=1e-9)
    assert other["logp_chosen"] == one["logp_rejected"]


@pytest.mark.parametrize("name", PAIRED)
@given(texts=BATCHES)
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_batch_does_not_matter_and_measures_are_detached(name, texts):
    w, rejected = [list(each) for each in zip(*texts, strict=True)]
    assert measures_of(name, w[::-1], rejected[::-1])[0] == pytest.approx(measures_of(name, w, rejected)[0], abs=1e-9)
    logp, mask = batch(w)
    sums = [torch.zeros(len(w), dtype=torch.float64)] * 2 if name in objectives.NEED_REFERENCE else []
    _, measures = objectives.OBJECTIVES[name](logp.requires_grad_(True), mask, *batch(rejected), *sums)
    assert not any(value.requires_grad for value in measures.values())


@given(texts=BATCHES)
@settings(max_examples=30, deadline=None)
def test_dpo_is_log_2_where_the_policy_is_the_reference(texts):
    w, rejected = [list(each) for each in zip(*texts, strict=True)]
    given_w, given_l = batch(w), batch(rejected)
    loss, measures = dpo(
        *given_w, *given_l, objectives.sequence_sum(*given_w), objectives.sequence_sum(*given_l), beta=0.7
    )
    assert float(loss) == pytest.approx(math.log(2), abs=1e-12)
    assert float(measures["margin"]) == pytest.approx(0, abs=1e-12)
