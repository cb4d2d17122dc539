"""Pixels: the resize bit for bit against Pillow, the whole against the fixtures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.contract.pipeline import ImagePlan
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.preprocess.image import _banded_weights, preprocess_frames
from intertitle.runtime.preprocess.products import matmul_alone

Image = pytest.importorskip("PIL.Image")

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Undo the division by 255: ``[T, H, W, 3]``."""
    return np.rint(pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pillow's resize in the order of its passes before version 13: first the width, then the height."""
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(frame).resize((width, frame.shape[0]), bicubic).resize((width, height), bicubic))


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise, or black and white only, where the cubic overshoots and is clipped."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        return rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 90), st.integers(0, 9))
def test_exact_resize_is_pillow(height: int, width: int, size: int, seed: int) -> None:
    frame = picture(height, width, seed)
    pixels = preprocess_frames(frame[np.newaxis], ImagePlan("exact", size, size, **PLAIN))
    assert pixels.shape == (1, 3, size, size)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(as_uint8(pixels)[0], resized(frame, size, size))


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 140), st.integers(2, 140), st.integers(2, 60), st.data())
def test_shortest_edge_and_crop_is_pillow(height: int, width: int, size: int, data: st.DataObject) -> None:
    crop = data.draw(st.integers(1, size))
    frame = picture(height, width, size)
    pixels = preprocess_frames(frame[np.newaxis], ImagePlan("shortest_edge", size, crop, **PLAIN))
    if width <= height:
        whole = resized(frame, size, int(size * height / width))
    else:
        whole = resized(frame, int(size * width / height), size)
    top, left = (whole.shape[0] - crop) // 2, (whole.shape[1] - crop) // 2
    np.testing.assert_array_equal(as_uint8(pixels)[0], whole[top : top + crop, left : left + crop])


# The last has more than 64 taps across, which needs float64 sums.
VIDEO_SIZES = [(360, 640, 384), (1080, 1920, 384), (1920, 1080, 336), (91, 161, 378), (40, 2600, 24)]


@pytest.mark.parametrize(("height", "width", "size"), VIDEO_SIZES)
def test_video_sizes_are_pillow(height: int, width: int, size: int) -> None:
    frame = picture(height, width, 1)
    pixels = preprocess_frames(frame[np.newaxis], ImagePlan("exact", size, size, **PLAIN))
    np.testing.assert_array_equal(as_uint8(pixels)[0], resized(frame, size, size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200))
def test_sums_stay_exact_in_float32(in_size: int, out_size: int) -> None:
    # Whole numbers below 2**24, in the unit of each half, whatever the pixels (at most 255) are.
    for block in _banded_weights(in_size, out_size, 0, out_size).blocks:
        if block.high.dtype == np.float32:
            for half, unit in ((block.high, 1), (block.low, 2048)):
                scaled = np.abs(half.astype(np.float64)) * unit
                np.testing.assert_array_equal(scaled, np.rint(scaled))
                assert (255 * scaled.sum(axis=0) < 2**24).all()


def test_landscape_is_pillow_in_one_go() -> None:
    # Every version of Pillow begins with the width here.
    frame = picture(90, 160, 2)
    pixels = preprocess_frames(frame[np.newaxis], ImagePlan("exact", 70, 70, **PLAIN))
    whole = np.asarray(Image.fromarray(frame).resize((70, 70), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(as_uint8(pixels)[0], whole)


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap"])
def test_pixels_of_the_fixtures(data_dir: Path, expected: Callable[[str], dict[str, np.ndarray]], variant: str) -> None:
    configs = sorted((data_dir / variant).rglob("preprocessor_config.json"))
    config = json.loads(configs[0].read_text())
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    if "crop_size" in config:
        spec = ImagePlan("shortest_edge", config["size"]["shortest_edge"], config["crop_size"]["height"], mean, std)
    else:
        spec = ImagePlan("exact", config["size"]["height"], config["size"]["height"], mean, std)
    numbers = expected(variant)
    pixels = preprocess_frames(numbers["frames_uint8"], spec)
    assert pixels.shape == numbers["pixel_values"].shape
    np.testing.assert_allclose(pixels, numbers["pixel_values"], rtol=0, atol=2e-7)


def test_refusals() -> None:
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(OptionError, match="cannot crop 9"):
        preprocess_frames(frames, ImagePlan("shortest_edge", 8, 9, **PLAIN))
    with pytest.raises(OptionError, match="unknown way"):
        preprocess_frames(frames, ImagePlan("squash", 8, 8, **PLAIN))  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="uint8"):
        preprocess_frames(frames.astype(np.float32), ImagePlan("exact", 8, 8, **PLAIN))
    with pytest.raises(MediaError, match=r"\[1, 4, 4\]"):
        preprocess_frames(frames[..., 0], ImagePlan("exact", 8, 8, **PLAIN))


def test_no_other_thread_is_waited_for() -> None:
    code = (
        "import time\n"
        "import numpy as np\n"
        "from intertitle.runtime.preprocess.fbank import kaldi_fbank\n"
        "from intertitle.contract.pipeline import ImagePlan\n"
        "from intertitle.runtime.preprocess.image import preprocess_frames\n"
        "spec = ImagePlan('shortest_edge', 336, 336, (0.5,) * 3, (0.5,) * 3)\n"
        "frames, sound = np.zeros((2, 2160, 3840, 3), np.uint8), np.zeros(480_000, np.float32)\n"
        "preprocess_frames(frames, spec), kaldi_fbank(sound)\n"
        "all_threads, this_thread = time.process_time(), time.thread_time()\n"
        "preprocess_frames(frames, spec), kaldi_fbank(sound)\n"
        "print(time.process_time() - all_threads, time.thread_time() - this_thread)\n"
    )
    many = {**os.environ, "OPENBLAS_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=many)
    all_threads, this_thread = map(float, done.stdout.split())
    assert all_threads < 1.1 * this_thread


@pytest.mark.parametrize(("count", "inner", "columns"), [(0, 5, 3), (1, 1, 1), (130, 4096, 16), (7, 300_000, 2)])
def test_products_in_parts_are_the_product(count: int, inner: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    # Whole numbers: their sums are exact in any order.
    left = rng.integers(-8, 8, (count, inner)).astype(np.float32)
    right = rng.integers(-8, 8, (inner, columns)).astype(np.float32)
    wanted = left.astype(np.int64) @ right.astype(np.int64)
    for out in (np.empty((count, columns), np.float32), np.empty((columns, count), np.float32).T):
        matmul_alone(left, right, out)
        np.testing.assert_array_equal(out, wanted)
