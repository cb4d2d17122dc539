"""Preference objectives as functions of log-probabilities; no model inside.

Every one takes the token log-probabilities ``[B, N]`` of a chosen and a rejected text, each with its mask ``[B, N]``
(true where there is a token; what stands elsewhere, infinities included, is not looked at), and returns the mean loss
over the batch and its ``Measures``. The widths N of the two may differ.

The formulas are here, and not trl's trainers, because those want models of transformers: these are a few lines each
over the decoder that is also compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Measures = dict[str, Tensor]
"""Scalars without gradient: ``logp_chosen`` and ``logp_rejected`` (means of the mean token log-probability),
``margin`` (mean difference of the objective's own rewards) and ``accuracy`` (share of pairs with a positive one)."""

Objective = Callable[..., tuple[Tensor, Measures]]


def synpo(
    logp_w: Tensor,
    mask_w: Tensor,
    logp_l: Tensor,
    mask_l: Tensor,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    form: Literal["code", "log"] = "code",
) -> tuple[Tensor, Measures]:
    """SynPO without a reference model: ``-sigmoid(alpha (exp l_w - exp l_l)) - beta p_w`` (SynPO, train_synpo.py).

    l is the mean token log-probability, so that exp l is the geometric mean of the tokens' probabilities; p_w is the
    arithmetic mean of those of the chosen text and keeps its language up. ``form="log"`` has the log of the sigmoid, as
    other preference losses do; it is a comparison of ours, the paper's own equation was not read.
    """
    mean_w, mean_l = _mean(logp_w, mask_w), _mean(logp_l, mask_l)
    margin = alpha * (mean_w.exp() - mean_l.exp())
    preference = torch.sigmoid(margin) if form == "code" else F.logsigmoid(margin)
    language = _mean(_filled(logp_w, mask_w).exp(), mask_w)
    return (-preference - beta * language).mean(), _measures(margin, mean_w, mean_l)


def leanpo(
    logp_w: Tensor,
    mask_w: Tensor,
    logp_l: Tensor,
    mask_l: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    smoothing: Literal["none", "static", "dynamic"] = "dynamic",
    epsilon: float = 0.1,
    temperature: float = 1.0,
) -> tuple[Tensor, Measures]:
    """LeanPO: the reward is ``beta`` times the mean token log-probability, no reference model (arXiv 2506.05260).

    With d the difference of the rewards the loss is ``-(1 - e) log sigmoid(d - gamma) - e log sigmoid(gamma - d)``.
    The authors published no code and their smoothing formula was not to be had. What is here is an ASSUMPTION: SimPO's
    smoothed form, with e = ``epsilon`` ("static"), 0 ("none") or ``epsilon sigmoid(-d / temperature)`` without gradient
    ("dynamic"): a pair that the policy orders the other way round is the more likely to be mislabelled.
    """
    mean_w, mean_l = _mean(logp_w, mask_w), _mean(logp_l, mask_l)
    margin = beta * (mean_w - mean_l)
    if smoothing == "dynamic":
        share = epsilon * torch.sigmoid(-margin.detach() / temperature)
    else:
        share = torch.full_like(margin, epsilon if smoothing == "static" else 0.0)
    losses = -(1 - share) * F.logsigmoid(margin - gamma) - share * F.logsigmoid(gamma - margin)
    return losses.mean(), _measures(margin, mean_w, mean_l)


def dpo(
    logp_w: Tensor,
    mask_w: Tensor,
    logp_l: Tensor,
    mask_l: Tensor,
    reference_w: Tensor,
    reference_l: Tensor,
    *,
    beta: float = 0.1,
    anchor: float = 0.0,
) -> tuple[Tensor, Measures]:
    """DPO: ``-log sigmoid(beta ((s_w - s_w_ref) - (s_l - s_l_ref)))``, s the sum of token log-probabilities.

    ``reference_w`` and ``reference_l`` ``[B]`` are the reference model's sums (arXiv 2305.18290; beta as in SynPO's
    train_dpo_check.py). ``anchor`` times the chosen text's mean cross entropy is added: 0.1 in video-SALMONN 2's MrDPO,
    there of the ground truth.
    """
    sum_w, sum_l = sequence_sum(logp_w, mask_w), sequence_sum(logp_l, mask_l)
    margin = beta * ((sum_w - reference_w) - (sum_l - reference_l))
    mean_w, mean_l = _mean(logp_w, mask_w), _mean(logp_l, mask_l)
    return (-F.logsigmoid(margin) - anchor * mean_w).mean(), _measures(margin, mean_w, mean_l)


def simpo(
    logp_w: Tensor, mask_w: Tensor, logp_l: Tensor, mask_l: Tensor, *, beta: float = 2.0, gamma: float = 0.5
) -> tuple[Tensor, Measures]:
    """SimPO: ``-log sigmoid(beta (l_w - l_l) - gamma)``, l the mean token log-probability.

    arXiv 2405.14734; defaults of its scripts/simpo_config.py (gamma there as a quarter of beta).
    """
    return leanpo(logp_w, mask_w, logp_l, mask_l, beta=beta, gamma=gamma, smoothing="none")


def orpo(
    logp_w: Tensor, mask_w: Tensor, logp_l: Tensor, mask_l: Tensor, *, weight: float = 0.1
) -> tuple[Tensor, Measures]:
    """ORPO: the chosen text's cross entropy, and ``weight`` times the log odds ratio (arXiv 2403.07691).

    The odds are those of the geometric mean p of the token probabilities: ``p / (1 - p)``.
    """
    mean_w, mean_l = _mean(logp_w, mask_w), _mean(logp_l, mask_l)
    margin = _log_odds(mean_w) - _log_odds(mean_l)
    return (-mean_w - weight * F.logsigmoid(margin)).mean(), _measures(margin, mean_w, mean_l)


def supervised(logp_w: Tensor, mask_w: Tensor) -> tuple[Tensor, Measures]:
    """Cross entropy on the chosen text alone, the mean over all tokens of the batch: more of the supervised training.

    The only measure is ``logp_chosen``.
    """
    loss = -_filled(logp_w, mask_w).sum() / mask_w.sum().clamp(min=1)
    return loss, {"logp_chosen": _mean(logp_w, mask_w).mean().detach()}


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {"synpo": synpo, "leanpo": leanpo, "dpo": dpo, "simpo": simpo, "orpo": orpo, "supervised": supervised}
)
"""By name. All but ``supervised`` are of pairs."""

NEED_REFERENCE = frozenset({"dpo"})
"""Those that take the reference's sums."""


def sequence_sum(logp: Tensor, mask: Tensor) -> Tensor:
    """Sum of token log-probabilities ``[B]``."""
    return _filled(logp, mask).sum(-1)


def _filled(logp: Tensor, mask: Tensor) -> Tensor:
    # Not a product: an infinity times zero is not zero, nor is its gradient.
    return torch.where(mask.bool(), logp, torch.zeros_like(logp))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a text's tokens ``[B]``."""
    return _filled(values, mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _log_odds(logp: Tensor) -> Tensor:
    # A text that is all but certain has no finite odds.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _measures(margin: Tensor, mean_w: Tensor, mean_l: Tensor) -> Measures:
    return {
        "margin": margin.mean().detach(),
        "accuracy": (margin > 0).to(margin.dtype).mean().detach(),
        "logp_chosen": mean_w.mean().detach(),
        "logp_rejected": mean_l.mean().detach(),
    }
