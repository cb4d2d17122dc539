"""A compiled captioner beside PyTorch in float32 with the same rounded weights, on whatever device: how far logits are
apart, and the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration.recipe import roundings
from ..calibration.reference import Reference
from ..contract.pipeline import PIXELS
from ..models import open_checkpoint
from ..runtime.captioner import Captioner
from ..runtime.decoding import Decoding
from ..runtime.encoder import Units
from ..runtime.timing import Stages
from .gpu_device import Place


def parity(place: Place, checkpoint: Path, adapter: Path | None, bundle: Path) -> dict[str, Any]:
    """Largest error of each visual stage, and of prefill and step logits, relative to the largest value; and how many
    greedy tokens agree.

    ``bundle``: of the checkpoint, for the place. The prompt is that of a clip of noise, encoded on the device: so
    encoders and decoder both count.
    """
    place.build(bundle, rows=2)
    captioner = place.open(bundle)
    source = open_checkpoint(checkpoint, adapter)
    reference = Reference(source, roundings(captioner.manifest, source))
    pipeline, rng = captioner.manifest.pipeline, np.random.default_rng(0)
    frames = rng.integers(0, 256, (pipeline.sampling.count, 120, 160, 3), dtype=np.uint8)
    stages = _stages(captioner, reference, reference.pixels(frames))
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
        "vision_error": stages[pipeline.visual()[0].name],
        "stage_errors": stages,
        "logits_error": max(errors),
        "greedy_agreement": agreed / 16,
        "caption_tokens": len(caption.token_ids),
    }


def _stages(captioner: Captioner, reference: Reference, pixels: npt.NDArray[np.float32]) -> dict[str, float]:
    """The largest error of each stage that the pictures pass, relative to the largest value; each side goes on from
    what it has itself."""
    pipeline = captioner.manifest.pipeline
    merging = pipeline.merging
    variant = None if merging is None else merging.variants[0]
    mine, theirs = {PIXELS: Units.all_distinct(pixels)}, {PIXELS: pixels}
    errors = {}
    for stage in pipeline.visual():
        inputs = [mine[value.source] for value in stage.inputs]
        mine[stage.name] = captioner.encoder.run_stage(stage, inputs, Stages(), variant)
        theirs[stage.name] = reference.run(stage.name, theirs, None if variant is None else variant.keep)
        errors[stage.name] = _error(mine[stage.name].expand(), theirs[stage.name])
    return errors


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())
