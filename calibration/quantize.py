"""The arithmetic of weight quantization, one tensor at a time. ``formats.py`` has the formats."""

from __future__ import annotations

import torch
from torch import Tensor

#: ONNX Runtime's MatMulNBits without a zero point reads int4 codes from 0 to 15; the code 8 is zero.
INT4_ZERO = 8

#: Weights that are quantized at once. The float32 temporaries take a few MB and stay in the CPU's cache.
_CHUNK = 1 << 20


def quantize_int4(weight: Tensor, block_size: int = 32) -> tuple[Tensor, Tensor]:
    """Symmetric int4 along the input channels, blocks of ``block_size``, in MatMulNBits layout.

    weight ``[N, K]``, any float dtype, all finite; it is not changed. Returns codes uint8
    ``[N, ceil(K / block), block / 2]`` (two codes per byte, the lower nibble first) and scales float32
    ``[N, ceil(K / block)]``, so that ``w ~ (code - 8) * scale``. A last block that is not full is padded with zeros.

    The scale is m / 8, where m is the block's largest magnitude, with the sign that gives m the code 0 (= -8). So all
    16 codes are used: the error on Gaussian weights is 8.6 %, with a positive scale m / 7 it is 9.7 % (docs/facts.md
    6). Every weight is off by at most half a step; weights beyond 7.5 steps with the other sign than m by at most one
    step. Codes and scales equal those of ONNX Runtime's own quantizer (``quantize_matmul_4bits``), ties included.
    Scales may be negative; the ``ort`` dialect allows that, TensorRT does not. A block of zeros, or of numbers that are
    too small for a normal float32 scale, becomes zero.
    """
    rows, width = weight.shape
    blocks = -(-width // block_size)
    codes = torch.empty((rows, blocks, block_size // 2), dtype=torch.uint8)
    scales = torch.empty((rows, blocks), dtype=torch.float32)
    smallest = torch.finfo(torch.float32).tiny
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        if blocks * block_size != width:
            part = torch.nn.functional.pad(part, (0, blocks * block_size - width))
        part = part.unflatten(1, (blocks, block_size))
        low, high = part.amin(dim=2), part.amax(dim=2)
        scale = torch.where(-low >= high, low, high) / -INT4_ZERO
        # The reciprocal of a subnormal scale would be infinite.
        scale = torch.where(scale.abs() < smallest, torch.zeros_like(scale), scale)
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        # Not in place: ``part`` may be the caller's memory. The numbers are positive, so truncation rounds half up.
        code = (part * inverse.unsqueeze(2)).add_(INT4_ZERO + 0.5).clamp_(0, 15).to(torch.uint8)
        codes[start : start + step] = code[:, :, 0::2] | (code[:, :, 1::2] << 4)
        scales[start : start + step] = scale
    return codes, scales


def dequantize_int4(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    """The float32 weight ``[N, width]`` of codes and scales of ``quantize_int4``."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2).float()
    return ((nibbles - INT4_ZERO) * scales.unsqueeze(2)).flatten(1)[:, :width]


#: Divisors of a block's largest magnitude that ``quantize_int4_positive`` tries as its scale.
_DIVISORS = (7.0, 7.5, 8.0, 8.5)

#: The smallest normal float16 number. A scale is at least this, so that it is positive after rounding.
_SMALLEST_HALF = 2.0**-14


def quantize_int4_positive(weight: Tensor, block_size: int = 32) -> tuple[Tensor, Tensor]:
    """Symmetric int4 along the input channels with positive scales, as ONNX's blocked DequantizeLinear reads it.

    weight ``[N, K]``, any float dtype, all finite, K a multiple of ``block_size``; it is not changed. Returns codes
    int8 ``[K, N]`` from -8 to 7 and scales float16 ``[K / block, N]``, so that ``w[n, k] ~ codes[k, n] *
    scales[k // block, n]``.

    TensorRT refuses scales that are not positive (onnx/onnx-tensorrt#764). The candidates are m / 7, m / 7.5, m / 8 and
    m / 8.5, where m is the block's largest magnitude, rounded to float16. Each block takes the candidate with the least
    squared error. A scale is at least 2**-14, so a block of smaller numbers becomes zero or coarse.
    """
    rows, width = weight.shape
    if width % block_size:
        raise ValueError(f"{width} input channels are not blocks of {block_size}")
    codes = torch.empty((width, rows), dtype=torch.int8)
    scales = torch.empty((width // block_size, rows), dtype=torch.float16)
    largest_half = torch.finfo(torch.float16).max
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].float().unflatten(1, (-1, block_size))
        largest = part.abs().amax(dim=2, keepdim=True)
        least: Tensor | None = None
        best_scale, best_code = torch.empty_like(largest), torch.empty_like(part)
        for divisor in _DIVISORS:
            scale = (largest / divisor).clamp(_SMALLEST_HALF, largest_half).half().float()
            code = (part / scale).round_().clamp_(-8, 7)
            error = (code * scale).sub_(part).square_().sum(dim=2, keepdim=True)
            better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
            least = error if least is None else torch.minimum(error, least)
            best_scale, best_code = torch.where(better, scale, best_scale), torch.where(better, code, best_code)
        codes[:, start : start + step] = best_code.flatten(1).T.to(torch.int8)
        scales[:, start : start + step] = best_scale.squeeze(2).T.half()
    return codes, scales


def dequantize_int4_positive(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight ``[N, K]`` of codes and scales of ``quantize_int4_positive``."""
    return (codes.float() * scales.float().repeat_interleave(len(codes) // len(scales), dim=0)).T


#: MatMulNBits without a zero point reads int8 codes from 0 to 255; the code 128 is zero.
INT8_ZERO = 128


def quantize_int8(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 along the input channels, blocks of ``block_size``, in MatMulNBits layout.

    weight ``[N, K]``, any float dtype, all finite. Returns codes uint8 ``[N, ceil(K / block), block]`` and scales
    float32 ``[N, ceil(K / block)]``, so that ``w ~ (code - 128) * scale``; the scale is the block's largest magnitude
    over 127. A last block that K does not fill is padded with zeros, and a block of zeros, or of numbers too small for
    a normal float32 scale, becomes zero.
    """
    width = weight.shape[1]
    part = torch.nn.functional.pad(weight.float(), (0, -width % block_size)).unflatten(1, (-1, block_size))
    scales = part.abs().amax(dim=2) / 127
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, torch.zeros_like(scales), scales)
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    codes = (part * inverse.unsqueeze(2)).round_().clamp_(-127, 127).add_(INT8_ZERO).to(torch.uint8)
    return codes, scales


def dequantize_int8(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    """The float32 weight ``[N, width]`` of codes and scales of ``quantize_int8``."""
    return ((codes.float() - INT8_ZERO) * scales.unsqueeze(2)).flatten(1)[:, :width]


def quantize_int8_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output channel, as ONNX's DequantizeLinear reads it.

    weight ``[N, K]``, any float dtype, all finite. Returns codes int8 ``[K, N]`` from -127 to 127 and scales float16
    ``[N]``, at least 2**-14, so that ``w[n, k] ~ codes[k, n] * scales[n]``.
    """
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) / 127).clamp(_SMALLEST_HALF, torch.finfo(torch.float16).max).half()
    codes = (wide / scales.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return codes.T.contiguous(), scales


def dequantize_int8_channels(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight ``[N, K]`` of codes and scales of ``quantize_int8_channels``."""
    return (codes.float() * scales.float()).T
