"""Decoded frames to the vision tower's pixels, bit for bit as Pillow and the CLIP and SigLIP processors make them.

Pillow's antialiased resize of 8-bit images is two passes of fixed-point convolution, horizontal first, with
coefficients in units of 2**-22 and a rounded uint8 image between the passes (Pillow, libImaging/Resample.c). Pillow 13
begins with the vertical pass for many portrait shapes, which moves single pixels by 1; the reference ran on versions
before it, and their order is kept here.

Each pass is a banded matrix product: a block of neighbouring outputs reads one short range of inputs, so a block is one
small dense product. Coefficients are split into a high and a low half, which keeps every partial sum a whole number
below 2**24, exact in float32 in any order of summation.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...contract.pipeline import ImagePlan
from ...errors import MediaError, OptionError
from .products import matmul_alone

FloatArray = npt.NDArray[np.float32]

_PRECISION_BITS = 22
_LOW_BITS = 11
#: With more taps than this, the sums of 255 x a low half could leave the whole numbers of float32.
_FLOAT32_TAPS = 64
#: Outputs per block and rows per chunk: few wasted multiplications, and chunks that stay in the L2 cache (measured).
_BLOCK = 16
_CHUNK = 512


def preprocess_frames(frames: npt.NDArray[np.uint8], spec: ImagePlan) -> FloatArray:
    """Pixels float32 ``[T, 3, S, S]`` of RGB frames uint8 ``[T, H, W, 3]``.

    Resize (Pillow bicubic with antialias), centre crop, rescale and normalise as ``CLIPImageProcessor`` and
    ``SiglipImageProcessor`` do in float32. ``OptionError`` for a spec that crops more than it resizes to.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise MediaError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if spec.resize not in ("exact", "shortest_edge"):
        raise OptionError(f'unknown way to resize "{spec.resize}": expected "exact" or "shortest_edge"')
    if spec.resize == "shortest_edge" and spec.crop > spec.size:
        raise OptionError(f"cannot crop {spec.crop} pixels from frames whose shorter side is {spec.size}")
    side = spec.output_size
    height, width = frames.shape[1:3]
    resized = _resized_size(height, width, spec)
    top, left = (resized[0] - side) // 2, (resized[1] - side) // 2
    rows = _banded_weights(height, resized[0], top, side)
    columns = _banded_weights(width, resized[1], left, side)

    pixels = np.empty((len(frames), 3, side, side), np.float32)
    for frame, out in zip(frames, pixels, strict=True):
        _resample(frame, rows, columns, out)
    pixels /= np.float32(255)
    pixels -= np.array(spec.mean, np.float32)[:, np.newaxis, np.newaxis]
    pixels /= np.array(spec.std, np.float32)[:, np.newaxis, np.newaxis]
    return pixels


def _resized_size(height: int, width: int, spec: ImagePlan) -> tuple[int, int]:
    """Height and width after the resize, before the crop (transformers ``get_resize_output_image_size``)."""
    if spec.resize == "exact":
        return spec.size, spec.size
    if width <= height:
        return int(spec.size * height / width), spec.size
    return spec.size, int(spec.size * width / height)


class _Block(NamedTuple):
    """Outputs ``start:stop`` as products of inputs ``first:last`` with ``high`` and ``low [inputs, outputs]``."""

    start: int
    stop: int
    first: int
    last: int
    high: npt.NDArray[np.floating]
    low: npt.NDArray[np.floating]


class _BandedWeights(NamedTuple):
    first: int
    last: int
    blocks: list[_Block]


@lru_cache(maxsize=32)
def _banded_weights(in_size: int, out_size: int, start: int, count: int) -> _BandedWeights:
    """Blocks for the outputs ``start : start + count`` of a resize from ``in_size`` to ``out_size``.

    ``high`` counts units of 2**-11, ``low`` units of 2**-22 scaled to the same unit (both exact).
    """
    first, taps = _taps(in_size, out_size)
    first, taps = first[start : start + count], taps[start : start + count]
    width = taps.shape[1]
    dtype = np.float32 if width <= _FLOAT32_TAPS else np.float64
    high = (taps + (1 << _LOW_BITS - 1)) >> _LOW_BITS
    low = (taps - (high << _LOW_BITS)) / (1 << _LOW_BITS)
    blocks = []
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        low_edge, high_edge = int(first[begin]), min(int(first[end - 1]) + width, in_size)
        dense = np.zeros((2, high_edge - low_edge, end - begin), dtype)
        for column, row in enumerate(range(begin, end)):
            offset = int(first[row]) - low_edge
            used = min(width, dense.shape[1] - offset)
            dense[0, offset : offset + used, column] = high[row, :used]
            dense[1, offset : offset + used, column] = low[row, :used]
        blocks.append(_Block(begin, end, low_edge, high_edge, dense[0], dense[1]))
    return _BandedWeights(blocks[0].first, max(block.last for block in blocks), blocks)


def _taps(in_size: int, out_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First input of each output ``[out]`` and its coefficients ``[out, taps]`` in units of 2**-22 (0 past the end).

    Pillow's ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` for the bicubic filter, in the same order of float64
    operations, since a coefficient next to a rounding edge depends on it.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centers = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), in_size)
    inputs = np.arange(math.ceil(support) * 2 + 1) + first[:, np.newaxis]
    weights = _bicubic((inputs - centers[:, np.newaxis] + 0.5) * (1.0 / stretch))
    weights[inputs >= last[:, np.newaxis]] = 0.0
    total = np.zeros(out_size)
    for column in weights.T:
        total += column
    weights /= total[:, np.newaxis]
    fixed = np.trunc(weights * (1 << _PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return first, fixed.astype(np.int64)


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution with a = -0.5, in Pillow's Horner form."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _resample(frame: npt.NDArray[np.uint8], rows: _BandedWeights, columns: _BandedWeights, out: FloatArray) -> None:
    """Both passes over one frame ``[H, W, 3]`` into ``out [3, S, S]``, whole numbers from 0 to 255.

    Only the rows and columns that the output depends on are read.
    """
    side = out.shape[-1]
    first_row, last_row = rows.first, rows.last
    first_column, last_column = columns.first, columns.last
    dtype = columns.blocks[0].high.dtype
    chunk = min(_CHUNK, last_row - first_row)
    plane = np.empty((chunk, last_column - first_column), dtype)
    high, low = np.empty((2, chunk, side), dtype)
    middle = np.empty((last_row - first_row, side), rows.blocks[0].high.dtype)
    high_out, low_out = np.empty((2, side, side), middle.dtype)
    for channel in range(3):
        for row in range(first_row, last_row, chunk):
            count = min(chunk, last_row - row)
            plane[:count] = frame[row : row + count, first_column:last_column, channel]
            for block in columns.blocks:
                inputs = plane[:count, block.first - first_column : block.last - first_column]
                matmul_alone(inputs, block.high, high[:count, block.start : block.stop])
                matmul_alone(inputs, block.low, low[:count, block.start : block.stop])
            _round(high[:count], low[:count], middle[row - first_row : row - first_row + count])
        for block in rows.blocks:
            inputs = middle[block.first - first_row : block.last - first_row].T
            matmul_alone(inputs, block.high, high_out[block.start : block.stop].T)
            matmul_alone(inputs, block.low, low_out[block.start : block.stop].T)
        _round(high_out, low_out, out[channel])


def _round(high: npt.NDArray[np.floating], low: npt.NDArray[np.floating], out: npt.NDArray[np.floating]) -> None:
    """``clip((sum + 2**21) >> 22, 0, 255)`` of the sums ``high * 2**11 + low * 2**11`` in units of 2**-22.

    Nested floors stay exact: the fraction of ``low`` cannot carry past its own floor. ``low`` is used up.
    """
    np.floor(low, out=low)
    low += high
    low += 1 << _LOW_BITS - 1
    low *= 1.0 / (1 << _LOW_BITS)
    np.floor(low, out=low)
    np.clip(low, 0.0, 255.0, out=out, casting="same_kind")
