"""A layer of several experts (``models.decoder.SparseMLP``) as a graph: only the chosen ones run, or all of them.

``GroupedExperts`` is for a runtime whose matmuls may have no rows. It sorts the tokens by expert and gives each expert
its own; an expert without tokens multiplies a matrix of no rows, which reads no weights. So no control flow is needed:
the graph stays one list of operators, and all weights are its initializers.

``DenseExperts`` is for engines, whose shapes may not depend on values: every expert takes every token, and the weights
of those that were not chosen are zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops

from ...models.decoder import Router, SparseMLP, choose_experts

#: Makes the form of one expert.
ExpertForm = Callable[..., nn.Module]


class ColumnRouter(nn.Module):
    """``models.decoder.Router`` with one matmul for each token, so that the other tokens do not change a bit of it.

    The weight is the left factor and each token a column: runtimes do not join such matmuls into one.
    """

    def __init__(self, original: Router) -> None:
        super().__init__()
        self.weight = original.weight

    def forward(self, x: Tensor) -> Tensor:
        scores = ops.symbolic(
            "MatMul",
            (self.weight, x.unsqueeze(-1)),
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.weight.shape[0], 1),
            version=13,
        )
        return scores.squeeze(-1)


class GroupedExperts(nn.Module):
    """Each expert takes the tokens that chose it.

    The operators are those of opset 18 on. Every one of them treats each token alone, so what a token gets does not
    depend on the others if the matmuls of the experts keep that promise.
    """

    def __init__(self, original: SparseMLP, expert: ExpertForm) -> None:
        super().__init__()
        self.experts_per_token = original.experts_per_token
        self.gate = ColumnRouter(original.gate)
        self.experts = nn.ModuleList(expert(each) for each in original.experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens, each = x.reshape(-1, x.shape[-1]), self.experts_per_token
        weights, chosen = choose_experts(self.gate(tokens), each)
        pairs = chosen.reshape(-1)
        count = pairs.shape[0]
        # The place in the key makes the order one and the same on every runtime.
        order = _order(pairs * count + torch.arange(count))
        sizes = (pairs.unsqueeze(1) == torch.arange(len(self.experts))).sum(0)
        token = ops.symbolic("Div", (order, torch.tensor(each)), dtype=order.dtype, shape=order.shape, version=14)
        grouped = F.embedding(token, tokens).unsqueeze(0)
        # For the trace, the sizes are numbers that are not known yet.
        groups = ops.symbolic_multi_out(
            "Split",
            (grouped, sizes),
            attrs={"axis": 1},
            dtypes=(x.dtype,) * len(self.experts),
            shapes=[(1, size, x.shape[-1]) for size in sizes.tolist()],
            version=18,
        )
        made = [expert(group) for expert, group in zip(self.experts, groups, strict=True)]
        joined = ops.symbolic("Concat", made, attrs={"axis": 1}, dtype=x.dtype, shape=grouped.shape, version=13)
        outputs = F.embedding(_order(order), joined.squeeze(0)).unflatten(0, (-1, each))
        return (outputs * weights.unsqueeze(-1)).sum(1).reshape(x.shape)


def _order(keys: Tensor) -> Tensor:
    """The places int64 ``[n]`` of ``keys`` (int64, all different) by rising key."""
    return keys.topk(keys.shape[0], largest=False)[1]


class DenseExperts(nn.Module):
    """Every expert takes every token."""

    def __init__(self, original: SparseMLP, expert: ExpertForm) -> None:
        super().__init__()
        self.experts_per_token = original.experts_per_token
        self.gate = original.gate
        self.experts = nn.ModuleList(expert(each) for each in original.experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = choose_experts(self.gate(x), self.experts_per_token)
        is_chosen = chosen.unsqueeze(-1) == torch.arange(len(self.experts))
        shares = (is_chosen.float() * weights.unsqueeze(-1)).sum(-2)
        outputs = [expert(x) * shares[..., number : number + 1] for number, expert in enumerate(self.experts)]
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total
