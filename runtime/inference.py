"""The seam between decoding strategies and whatever runs the decoder.

A strategy sees a few methods over a static key/value cache of some rows; ONNX Runtime, TensorRT and PyTorch are
implementations of it, so that every strategy is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Inference(Protocol):
    """A decoder with its cache: ``rows`` sequences of at most ``max_length`` tokens each, of different lengths.

    What a row computes does not depend on the other rows, not even in the last bit: a caption is the same alone and in
    a batch.
    """

    @property
    def rows(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def prefill(
        self, row: int, embeds: FloatArray, num_logits: int = 1, progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Append tokens, given as embeddings ``[S, H]``, to one row; ``progress`` hears how many are in.

        Returns float32 logits ``[num_logits, V]`` of the last ``num_logits`` positions. ``OptionError`` when the row
        would outgrow ``max_length``.
        """
        ...

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        """Append one token to each of the first n rows (``[n]``) and return their logits ``[n, V]``.

        The returned array is a view that the next call overwrites.
        """
        ...

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        """Row ``t`` continues as a copy of row ``sources[t]``, all at once (beams, shared prefixes, moved rows).

        Their first ``start`` tokens are equal already and stay; ``stop`` keeps no more than the first ``stop`` tokens.
        """
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a row."""
        ...
