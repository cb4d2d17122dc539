"""A compiled captioner beside PyTorch in float32 with the same rounded weights, on whatever device: how far logits are
apart, and the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.recipe import roundings
from ..calibration.reference import Reference
from ..models import open_checkpoint
from ..runtime.decoding import Decoding
from ..runtime.timing import Stages
from .gpu_device import Place


def parity(place: Place, checkpoint: Path, adapter: Path | None, bundle: Path) -> dict[str, Any]:
    """Largest error of prefill and step logits relative to the largest logit, and how many greedy tokens agree.

    ``bundle``: of the checkpoint, for the place. The prompt is that of a clip of noise, encoded on the device: so
    encoders and decoder both count.
    """
    place.build(bundle, rows=2)
    captioner = place.open(bundle)
    source = open_checkpoint(checkpoint, adapter)
    reference = Reference(source, roundings(captioner.manifest, source))
    spec, rng = captioner.manifest.preprocessing, np.random.default_rng(0)
    frames = rng.integers(0, 256, (spec.num_frames, 120, 160, 3), dtype=np.uint8)
    pixels = reference.pixels(frames)
    theirs = reference.run("vision", pixels)
    features = captioner.encoder.features(pixels, Stages())
    embeds = rng.standard_normal((96, captioner.manifest.decoder.hidden_size)).astype(np.float32) * 0.1
    mine, want = captioner.open_inference(128), reference.open(1, 128)
    errors, agreed, token = [_error(mine.prefill(0, embeds), want.prefill(0, embeds))], 0, 1
    for _ in range(16):
        ids = np.array([token])
        got, expected = mine.step(ids), want.step(ids)
        errors.append(_error(got, expected))
        token = int(expected[0].argmax())
        agreed += token == int(got[0].argmax())
    caption = captioner.caption(frames=frames, decoding=Decoding(max_new_tokens=16))
    return {
        "vision_error": _error(features, theirs),
        "logits_error": max(errors),
        "greedy_agreement": agreed / 16,
        "caption_tokens": len(caption.token_ids),
    }


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())
