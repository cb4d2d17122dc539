"""int4 rounding: its own promises, and ONNX Runtime's quantizer and kernel as oracles."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from intertitle.calibration import quantize
from intertitle.calibration.quantize import (
    dequantize_int4,
    dequantize_int4_positive,
    quantize_int4,
    quantize_int4_positive,
)
from onnx import TensorProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import quantize_matmul_4bits

TINY = float(np.finfo(np.float32).tiny)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 100))
BLOCKS = st.sampled_from([16, 32, 64])
ANY = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
#: Halves: every other quotient is a tie, and both signs of the largest magnitude meet in one block.
HALVES = hnp.arrays(np.float32, SHAPES, elements=st.integers(-16, 16).map(lambda value: value / 2))


def by_onnxruntime(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Nibbles ``[N, K]`` and scales ``[N, blocks]`` of ONNX Runtime's own symmetric quantizer."""
    rows, width = weight.shape
    blocks = -(-width // block)
    codes = np.zeros((rows, blocks, block // 2), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zero_points = np.zeros(rows * ((blocks + 1) // 2), np.uint8)
    quantize_matmul_4bits(codes, np.ascontiguousarray(weight.T), scales, zero_points, block, rows, width, True)
    return nibbles(codes, width), scales.reshape(rows, blocks)


def nibbles(codes: np.ndarray, width: int) -> np.ndarray:
    return np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)[:, :width]


@given(st.one_of(ANY, HALVES), BLOCKS)
@settings(deadline=None)
def test_every_weight_is_within_half_a_step(weight, block):
    codes, scales = (part.numpy() for part in quantize_int4(torch.from_numpy(weight), block))
    width = weight.shape[1]
    rounded = dequantize_int4(torch.from_numpy(codes), torch.from_numpy(scales), width).numpy()
    assert np.isfinite(rounded).all()
    error = np.abs(rounded.astype(np.float64) - weight)
    step = np.abs(np.repeat(scales, block, axis=1)[:, :width]).astype(np.float64)
    # A code of 15 (= 7 steps) may stand for up to 8; float32 rounds what was half; below 8 * TINY all is zero.
    allowed = np.where(nibbles(codes, width) == 15, 1.0, 0.5) * step
    assert (error <= allowed * (1 + 1e-5) + 8 * TINY).all()
    # The largest magnitude of a block is kept exactly.
    padded = np.pad(weight, ((0, 0), (0, -width % block))).reshape(len(weight), -1, block)
    largest = np.abs(padded).max(axis=2)
    again = np.pad(rounded, ((0, 0), (0, -width % block))).reshape(padded.shape)
    normal = largest >= 8 * TINY
    assert (np.abs(again).max(axis=2)[normal] == largest[normal]).all()


@given(st.one_of(ANY, HALVES), BLOCKS)
@settings(deadline=None)
def test_codes_and_scales_are_those_of_onnxruntime(weight, block):
    codes, scales = (part.numpy() for part in quantize_int4(torch.from_numpy(weight), block))
    their_codes, their_scales = by_onnxruntime(weight, block)
    # Where the scale is subnormal its reciprocal overflows: ours are zero there, theirs are not meaningful.
    usable = (np.abs(their_scales) >= TINY) | (their_scales == 0)
    assert (scales[usable] == their_scales[usable]).all()
    columns = np.repeat(usable, block, axis=1)[:, : weight.shape[1]]
    assert (nibbles(codes, weight.shape[1]) == their_codes)[columns].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_given_is_left_as_it_is(dtype):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    codes, scales = quantize_int4(weight)
    assert torch.equal(weight, before)
    # The format of the checkpoint does not matter beyond its own rounding.
    widened = quantize_int4(weight.float())
    assert torch.equal(codes, widened[0])
    assert torch.equal(scales, widened[1])


def test_zeros_and_numbers_too_small_for_a_scale_become_zero():
    weight = torch.zeros(3, 64)
    weight[1, 5] = 1e-39
    weight[2, 40] = 2.0
    codes, scales = quantize_int4(weight)
    rounded = dequantize_int4(codes, scales, 64)
    assert scales.tolist() == [[0, 0], [0, 0], [0, -0.25]]
    assert torch.equal(rounded[:2], torch.zeros(2, 64))
    assert rounded[2].tolist() == weight[2].tolist()


def test_layout_by_hand():
    """One block of 4: m = -4 gives a step of 0.5; codes 0, 12, 8, 15 (clipped from 16), the lower nibble first."""
    codes, scales = quantize_int4(torch.tensor([[-4.0, 2.0, 0.0, 4.0]]), block_size=4)
    assert scales.tolist() == [[0.5]]
    assert codes.tolist() == [[[0 | 12 << 4, 8 | 15 << 4]]]
    assert dequantize_int4(codes, scales, 4).tolist() == [[-4.0, 2.0, 0.0, 3.5]]


def test_error_on_gaussian_weights():
    """8.6 %, the figure of docs/facts.md 6 for this rule (9.7 % is that of a positive absmax / 7)."""
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    rounded = dequantize_int4(*quantize_int4(weight), 4096)
    assert float((rounded - weight).norm() / weight.norm()) == pytest.approx(0.086, abs=5e-4)


def test_a_tensor_in_many_chunks_is_the_tensor_in_one(monkeypatch):
    weight = torch.randn(37, 100, generator=torch.Generator().manual_seed(0))
    whole = quantize_int4(weight)
    monkeypatch.setattr(quantize, "_CHUNK", 300)
    pieces = quantize_int4(weight)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize(("rows", "width"), [(48, 64), (33, 4304 // 8), (7, 100)])
def test_the_kernel_computes_with_the_dequantized_weights(rows, width):
    """A MatMulNBits node over our codes is the product with ``dequantize_int4``; level 4 comes near it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(5, width, generator=generator)
    codes, scales = quantize_int4(weight)
    expected = (x.double() @ dequantize_int4(codes, scales, width).double().T).numpy()

    def run(level: int) -> float:
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            **{"K": width, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": level},
        )
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, rows])],
            [
                helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.numpy().tobytes(), raw=True),
                helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.numpy().tobytes(), raw=True),
            ],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": x.numpy()})
        return float(np.abs(np.asarray(y) - expected).max() / np.abs(expected).max())

    assert run(level=0) < 1e-6
    assert run(level=4) < 2e-2  # int8 activations, where the processor has the instructions


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96])), elements=st.floats(-1e4, 1e4, width=32)
    )
)
@settings(deadline=None)
def test_positive_scales(weight):
    codes, scales = quantize_int4_positive(torch.from_numpy(weight), 32)
    assert codes.shape == weight.T.shape
    assert scales.shape == (weight.shape[1] // 32, len(weight))
    assert (scales > 0).all()
    assert codes.min() >= -8
    assert codes.max() <= 7
    error = np.abs(dequantize_int4_positive(codes, scales).numpy() - weight).reshape(len(weight), -1, 32)
    # No block is worse than with m / 7, where every weight is within half a step (and float16's rounding of it).
    step = np.abs(weight).reshape(error.shape).max(axis=2).clip(7 * 2.0**-14) / 7
    assert (np.sqrt((error**2).mean(axis=2)) <= 0.5 * step * 1.01 + 1e-30).all()


def test_positive_scales_on_gaussian_weights():
    """Better than m / 7 (9.7 %) and m / 7.5 (9.5 %), as docs/facts.md 6 measured them."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    rounded = dequantize_int4_positive(*quantize_int4_positive(weight, 32))
    assert 0.07 < float((rounded - weight).norm() / weight.norm()) < 0.093
    with pytest.raises(ValueError, match="blocks of 32"):
        quantize_int4_positive(weight[:, :40])
