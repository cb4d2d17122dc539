"""Contrasted views: places and noise against measured numbers, and their prompts against the fixture."""

from __future__ import annotations

import numpy as np
import pytest
from intertitle.errors import OptionError
from intertitle.runtime.contrast import Contrast, diffuse, noise_levels, sparse_places


@pytest.mark.parametrize(
    ("step", "signal", "noise"),
    [(100, 0.998, 0.058), (250, 0.989, 0.147), (500, 0.863, 0.505), (700, 0.593, 0.805), (999, 0.285, 0.959)],
)
def test_noise_levels_are_those_measured_on_the_reference(step, signal, noise):
    """docs/facts.md 4."""
    assert noise_levels(step) == (pytest.approx(signal, abs=5e-4), pytest.approx(noise, abs=5e-4))


def test_noise_is_gaussian_on_top_of_the_pixels():
    pixels = np.full((2, 3, 100, 100), 0.7, np.float32)
    signal, level = noise_levels(500)
    noised = diffuse(pixels, 500, seed=3)
    assert noised.dtype == np.float32
    drawn = (noised - np.float32(signal) * pixels) / np.float32(level)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.03
    assert np.array_equal(noised, diffuse(pixels, 500, seed=3))
    assert not np.array_equal(noised, diffuse(pixels, 500, seed=4))
    assert (pixels == np.float32(0.7)).all()


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (2, [0]), (3, [0]), (4, [0, 3]), (8, [0, 3, 7])])
def test_a_third_of_the_places(count, places):
    assert sparse_places(count).tolist() == places


def test_places_are_those_of_the_fixture_and_no_fewer_than_needed(expected):
    assert sparse_places(8).tolist() == expected("auroracap")["sparse_frame_index"].tolist()
    assert len(sparse_places(16)) == 6
    assert sparse_places(3, least=2).tolist() == [0, 2]
    assert sparse_places(1, least=2).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "spatial"}, "'temporal' or 'noise'"),
        ({"kind": "noise", "noise_step": 1000}, "from 0 to 999"),
        ({"kind": "noise", "noise_step": -1}, "from 0 to 999"),
        ({"kind": "noise", "noise_step": 2.5}, "whole number"),
        ({"kind": "noise", "seed": -1}, "seed"),
        ({"kind": "noise", "seed": True}, "seed"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(OptionError, match=message):
        Contrast(**options)
