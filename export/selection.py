"""The graph behind a decoding step on a GPU: from the rows' logits to a few candidates of each.

    logits ─▶ contrast with another row ─▶ cutoff ─▶ the best tokens, their logits, both normalizers

What crosses the bus is then some hundred bytes a row instead of its logits (600 kB at 152k entries), and the passes
over the vocabulary run where they are cheap. The last word, with penalties and sampling, is had by the host
(``runtime.decoding.scores.shortlisted``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .trace import Signature

#: Tokens of a shortlist. A repetition penalty takes recent tokens off the top of it, sampling wants the ``top_k`` best.
SHORTLIST = 64


class Selection(nn.Module):
    """``count``: tokens of a shortlist."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, logits: Tensor, other: Tensor, alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, ...]:
        """logits float32 ``[rows, 1, V]``; of each row: ``other`` int64, the row it is contrasted with (itself without
        a contrast), ``alpha`` and ``log_beta`` float32 as in ``runtime.inference.Choice``.

        Returns ids int64, scores and the logits of the same tokens float32 ``[rows, count]``, and the normalizers of
        logits and scores ``[rows, 2]``.
        """
        full = logits[:, 0]
        scores = full * (1 + alpha).unsqueeze(1) - full.index_select(0, other) * alpha.unsqueeze(1)
        # Where nothing is weighed, nothing is computed either: 0 times a logit of -inf is no number.
        scores = torch.where((alpha == 0).unsqueeze(1), full, scores)
        # Not a maximum: cuDNN's, which ONNX Runtime takes for several rows, is 8 ms of an H100 at two rows of 152k.
        peak, _ = full.topk(1, dim=1)
        scores = torch.where(full < peak + log_beta.unsqueeze(1), -torch.inf, scores)
        best, ids = scores.topk(self.count, dim=1)
        normalizers = torch.cat([_normalizer(full, peak), _normalizer(scores, best[:, :1])], dim=1)
        return ids, best, full.gather(1, ids), normalizers


def _normalizer(scores: Tensor, peak: Tensor) -> Tensor:
    return peak + (scores - peak).exp().sum(1, keepdim=True).log()


def selection_signature(vocab_size: int) -> Signature:
    """Any number of rows."""
    rows = 2
    arguments = (
        torch.zeros(rows, 1, vocab_size),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows),
        torch.zeros(rows),
    )
    axes = {0: "rows"}
    return Signature(
        arguments,
        (axes, axes, axes, axes),
        ("logits", "other", "alpha", "log_beta"),
        ("ids", "scores", "values", "normalizers"),
    )
