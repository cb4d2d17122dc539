"""Matrix products on the calling thread."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: OpenBLAS computes products of no more multiplications than this on the calling thread (``SMP_THRESHOLD_MIN`` times
#: ``GEMM_MULTITHREAD_THRESHOLD`` in its interface/gemm.c). It shares out larger ones, and whoever waits for a share on
#: a busy machine waits for the scheduler, with every product anew.
_LARGEST = 1 << 18


def matmul_alone(
    left: npt.NDArray[np.floating], right: npt.NDArray[np.floating], out: npt.NDArray[np.floating]
) -> None:
    """``left [m, k] @ right [k, n]`` into ``out [m, n]``, as products of few rows, which need no other thread."""
    count = len(left)
    rows = min(max(_LARGEST // max(right.size, 1), 1), count)
    whole = count // rows * rows if rows else 0
    if whole:
        # NumPy walks through a stack of matrices itself.
        # Splitting an axis never copies.
        stack, into = (array[:whole].reshape(-1, rows, array.shape[1]) for array in (left, out))
        np.matmul(stack, right, out=into)
    if whole < count:
        np.matmul(left[whole:], right, out=out[whole:])
