"""The selection graph on ONNX Runtime against NumPy and the decoding that runs on the host."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.decoding.scores import Combination, LogNormalizer

ROWS = 4


@pytest.fixture(scope="module", params=["cuda", "tensorrt-rtx", "tensorrt-10.3"])
def selection(request, compiled):
    weights = "fp16" if request.param == "cuda" else "fp32"
    bundle = Bundle.open(compiled("av-qwen2", weights, request.param))
    component = bundle.manifest.components["selection"]
    onnx.checker.check_model(str(bundle.file(component.graph)), full_check=True)
    assert component.data is None
    assert bundle.manifest.shortlist == 64
    session = onnxruntime.InferenceSession(bundle.file(component.graph), providers=["CPUExecutionProvider"])
    return session, bundle.manifest.decoder.vocab_size


def run(selection, logits, other, alpha, log_beta):
    given = {
        "logits": logits[:, None],
        "other": np.array(other),
        "alpha": np.array(alpha, np.float32),
        "log_beta": np.array(log_beta, np.float32),
    }
    return [np.asarray(value) for value in selection[0].run(None, given)]


def test_rows_alone_and_in_contrast(selection):
    vocabulary = selection[1]
    logits = np.random.default_rng(0).standard_normal((ROWS, vocabulary)).astype(np.float32) * 3
    combinations = {1: Combination(0.5, None), 2: Combination(1.0, 0.1)}
    ids, scores, values, normalizers = run(
        selection, logits, [0, 0, 3, 3], [0, 0.5, 1, 0], [-np.inf, -np.inf, np.log(0.1), -np.inf]
    )
    for row in range(ROWS):
        want = logits[row]
        if row in combinations:
            want = combinations[row](logits[row], logits[{1: 0, 2: 3}[row]]).copy()
        order = np.argsort(-want, kind="stable")[:64]
        kept = np.isfinite(want[order])
        assert ids[row][kept].tolist() == order[kept].tolist()
        np.testing.assert_allclose(scores[row], want[order], rtol=1e-6)
        assert values[row].tolist() == logits[row][ids[row]].tolist()
        normalize = LogNormalizer()
        np.testing.assert_allclose(normalizers[row], [normalize(logits[row]), normalize(want)], rtol=1e-5)
    # A cutoff leaves few, and says so of the others.
    assert 0 < np.isfinite(scores[2]).sum() < 64


def test_nothing_is_weighed_where_there_is_no_contrast(selection):
    """A logit of -inf, of a row without and of one with a cutoff alone."""
    logits = np.zeros((2, selection[1]), np.float32)
    logits[:, 0], logits[:, 1] = -np.inf, 5
    ids, scores, _, normalizers = run(selection, logits, [0, 0], [0, 0], [-np.inf, np.log(0.5)])
    assert np.isfinite(scores[0]).all()
    assert (ids[0][0], scores[0][0]) == (1, 5)
    assert np.isfinite(scores[1]).tolist() == [True] + [False] * 63
    np.testing.assert_allclose(normalizers[1], [np.log(np.exp(5) + selection[1] - 2), 5], rtol=1e-6)
