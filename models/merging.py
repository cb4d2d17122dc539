"""Token merging inside AuroraCap's vision tower (Bolya et al., "Token Merging: Your ViT But Faster", 2023).

The schedule and the variant are those of AuroraCap's encoder (xtuner ``model/aurora.py``, ``model/tome.py``): the same
number of tokens is merged in every layer, between the attention residual and the MLP, and the class token is kept out
of it. Every shape is static: the selections are TopK, the sums are matmuls with one-hot matrices, which is also
deterministic on a GPU where a scatter-add is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import VisionConfig


def merge_counts(config: VisionConfig) -> tuple[int, ...]:
    """Tokens that each used layer merges away; all zero for a tower without merging.

    ``int(image area / patch area * (1 - keep) / num_layers)``, with the released depth and at most half of the tokens
    that are left beside the class token (AuroraCap ``reset_tome_r`` and ``bipartite_soft_matching``).
    """
    if config.keep is None:
        return (0,) * config.num_used_layers
    # The reference's order of operations: the truncation below is decided by the last bits.
    wanted = int(config.image_size * config.image_size / config.patch_size**2 * (1 - config.keep) / config.num_layers)
    tokens, counts = config.num_patches + 1, []
    for _ in range(config.num_used_layers):
        counts.append(max(0, min(wanted, (tokens - 1) // 2)))
        tokens -= counts[-1]
    return tuple(counts)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [N, K]`` of ``x [N, S, D]``: one plain Gather over the flattened rows, not one per element."""
    batch, length, width = x.shape
    flat = index + torch.arange(batch, device=x.device).unsqueeze(1) * length
    return x.reshape(-1, width).index_select(0, flat.reshape(-1)).reshape(batch, -1, width)


def merge_tokens(x: Tensor, size: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge the ``count`` most similar pairs of tokens.

    x ``[N, S, D]``, class token first; size ``[N, S, 1]``: how many patches a token stands for; metric ``[N, S, M]``:
    what similarity is measured on. Even tokens (set A) each look for their most similar odd token (set B); the
    ``count`` best pairs become one token, the mean weighted by size. Returns x ``[N, S - count, D]``, A's remaining
    tokens in order and then B, and their sizes.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    # The class token is the first of A: leaving it out of the choice is what protects it.
    merged = best[:, 1:].topk(count).indices + 1
    num_a, num_b = similarity.shape[1:]
    # Positions as float32, since TopK over integers is not available on every target.
    positions = torch.arange(num_a, device=x.device, dtype=torch.float32)
    taken = (merged.unsqueeze(-1) == torch.arange(num_a, device=x.device)).to(torch.float32).sum(1)
    kept = (positions + taken * num_a).topk(num_a - count, largest=False).indices
    target = partner.gather(1, merged)
    assign = (target.unsqueeze(-1) == torch.arange(num_b, device=x.device)).to(x.dtype).transpose(1, 2)

    a, b, size_a, size_b = x[:, ::2], x[:, 1::2], size[:, ::2], size[:, 1::2]
    merged_size = _rows(size_a, merged)
    total_size = size_b + assign @ merged_size
    total = (b * size_b + assign @ (_rows(a, merged) * merged_size)) / total_size
    return torch.cat((_rows(a, kept), total), dim=1), torch.cat((_rows(size_a, kept), total_size), dim=1)
