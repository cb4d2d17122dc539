"""Near-duplicate frames: thumbnails against OpenCV's area means, and what may be dropped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from intertitle.errors import OptionError
from intertitle.runtime.preprocess.duplicates import distinct_frames, thumbnail


def grey(*levels: int) -> np.ndarray:
    return np.stack([np.full((20, 30, 3), level, np.uint8) for level in levels])


def test_thumbnails_are_opencvs_area_means() -> None:
    cv2 = pytest.importorskip("cv2")
    frame = np.random.default_rng(0).integers(0, 256, (96, 160, 3)).astype(np.uint8)
    wanted = cv2.cvtColor(
        cv2.resize(frame.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY
    )
    np.testing.assert_allclose(thumbnail(frame), wanted, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (17, 31), (16, 16)])
def test_thumbnails_of_any_size_keep_a_plain_level(size: tuple[int, int]) -> None:
    small = thumbnail(np.full((*size, 3), 77, np.uint8))
    assert small.shape == (min(size[0], 16), min(size[1], 16))
    np.testing.assert_allclose(small, 77)


def test_slow_drift_is_not_swallowed() -> None:
    # Each frame is one level from the last, yet the third is two from the first and so on.
    assert distinct_frames(grey(*range(100, 108)), 2.0).tolist() == [0, 0, 0, 3, 3, 3, 6, 6]
    assert distinct_frames(grey(10, 10, 50, 10), 2.0).tolist() == [0, 0, 2, 3]
    assert distinct_frames(grey(10, 10, 11), 0.0).tolist() == [0, 0, 2]


@given(arrays.arrays(np.uint8, (12, 4, 6, 3), elements=st.integers(90, 110)), st.floats(0, 8))
def test_a_dropped_frame_is_near_the_kept_one_and_kept_ones_are_apart(frames: np.ndarray, threshold: float) -> None:
    stands = distinct_frames(frames, threshold)

    def apart(a: int, b: int) -> float:
        # At 4 x 6 pixels a thumbnail is the grey frame itself.
        luma = frames.astype(float) @ [0.299, 0.587, 0.114]
        return float(np.abs(luma[a] - luma[b]).mean())

    assert stands[0] == 0
    for index, stand in enumerate(stands):
        assert stands[stand] == stand <= index
        assert apart(index, stand) <= threshold + 1e-9
    kept = np.unique(stands)
    assert all(apart(a, b) > threshold - 1e-9 for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize("threshold", [-1.0, 256.0, float("nan")])
def test_thresholds_that_are_refused(threshold: float) -> None:
    with pytest.raises(OptionError, match="0 to 255"):
        distinct_frames(grey(1), threshold)
