"""Contrasted views of a clip: what a captioner sees in the stream whose logits are taken off in contrastive decoding.

``temporal``: the same video with a third of its frames (SynPO ``inference_cd_retro.py``, docs/facts.md 2.3). ``noise``:
the same frames under diffusion noise (VCD ``vcd_utils/vcd_add_noise.py``, docs/facts.md 4). The sound stays as it is in
both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from .inference import FloatArray

#: Steps of VCD's noise schedule.
NOISE_STEPS = 1000


@dataclass(frozen=True)
class Contrast:
    """Which view to contrast with.

    ``noise_step``: how far the noise has gone, 0 (hardly any) to 999 (hardly anything else). ``seed``: of the noise; it
    draws the same for the same frames on every machine. ``temporal`` uses neither.
    """

    kind: Literal["temporal", "noise"]
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("temporal", "noise"):
            raise OptionError(f"contrast must be 'temporal' or 'noise', not {self.kind!r}")
        if not _is_integer(self.noise_step) or not 0 <= self.noise_step < NOISE_STEPS:
            raise OptionError(f"noise_step must be a whole number from 0 to {NOISE_STEPS - 1}, not {self.noise_step!r}")
        if not _is_integer(self.seed) or self.seed < 0:
            raise OptionError(f"the seed of a contrast must be a whole number from 0 on, not {self.seed!r}")


def sparse_places(count: int, least: int = 1) -> npt.NDArray[np.int64]:
    """The places of ``count`` that the temporal view looks at: (count + 2) // 3 of them, evenly from first to last.

    ``least``: places that the connector needs at the least, at most ``count``.
    """
    return np.linspace(0, count - 1, min(count, max((count + 2) // 3, least)), dtype=np.int64)


def noise_levels(step: int) -> tuple[float, float]:
    """How much of the pixels and how much of the noise there is at a step: sqrt(abar), sqrt(1 - abar).

    beta_t = sigmoid(linspace(-6, 6, 1000)) (0.005 - 1e-5) + 1e-5, abar the running product of 1 - beta.
    """
    beta = 1 / (1 + np.exp(-np.linspace(-6.0, 6.0, NOISE_STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    kept = float(np.prod(1 - beta[: step + 1]))
    return kept**0.5, (1 - kept) ** 0.5


def diffuse(pixels: FloatArray, step: int, seed: int) -> FloatArray:
    """Normalised pixels ``[N, 3, S, S]`` under the noise of a step, each frame under its own."""
    signal, noise = (np.float32(level) for level in noise_levels(step))
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(pixels.shape, dtype=np.float32)
    drawn *= noise
    drawn += signal * pixels
    return drawn


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
