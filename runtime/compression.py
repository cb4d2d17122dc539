"""Fewer visual tokens without training: the most similar tokens of a clip are merged between connector and decoder.

This is bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", 2023). It runs once on the output
of the connector instead of in every layer of a tower. Shapes: N tokens of a clip, M wanted tokens, H their width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .inference import FloatArray

#: Rows of the similarity matrix that are computed at once.
_CHUNK = 512


def merge_tokens(tokens: FloatArray, count: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Merge ``tokens [N, H]`` to ``[count, H]``; also returns how many of the N each one stands for, int64 ``[count]``.

    A round pairs each token at an even place (A) with the most similar token (cosine) at an odd place (B). The best
    pairs, no more than needed, become one token at B's place: their mean, weighted by the tokens that they stand for.
    The order of the places is kept. Ties go to the earlier token. ``ValueError`` for a count outside 1 to N.
    """
    if not 1 <= count <= len(tokens):
        raise ValueError(f"{len(tokens)} tokens cannot become {count}")
    values, sizes = tokens.astype(np.float32), np.ones(len(tokens), np.int64)
    while len(values) > count:
        values, sizes = _merge_round(values, sizes, len(values) - count)
    return values, sizes


def _merge_round(
    values: FloatArray, sizes: npt.NDArray[np.int64], surplus: int
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """One round. It merges ``surplus`` pairs, or every token of A if there are fewer."""
    directions = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    a, b = directions[::2], directions[1::2]
    best, partner = np.empty(len(a), np.float32), np.empty(len(a), np.int64)
    for start in range(0, len(a), _CHUNK):
        similarity = a[start : start + _CHUNK] @ b.T
        found = similarity.argmax(axis=1)
        partner[start : start + _CHUNK] = found
        best[start : start + _CHUNK] = similarity[np.arange(len(found)), found]
    chosen = np.argsort(-best, kind="stable")[:surplus]
    source, target = 2 * chosen, 2 * partner[chosen] + 1
    totals = values * sizes[:, np.newaxis].astype(np.float32)
    merged = values.copy()
    for place in np.unique(target):
        members = [place, *source[target == place]]
        merged[place] = totals[members].sum(axis=0) / np.float32(sizes[members].sum())
    counts = sizes.copy()
    np.add.at(counts, target, sizes[source])
    left = np.ones(len(values), bool)
    left[source] = False
    return merged[left], counts[left]
