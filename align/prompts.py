"""Prompt embeddings of scenes: all that preference training and measuring need of the towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .data import heard, seen, whole_fbank
from .files import write_whole
from .policy import Policy, pixels
from .scenes import Scene

_BATCH = 16


def _save_array(path: Path, array: npt.NDArray[np.float16]) -> None:
    # By its name alone np.save would add a suffix to it.
    with path.open("wb") as file:
        np.save(file, array)


@torch.no_grad()
def embed_scenes(
    policy: Policy,
    scenes: Sequence[Scene],
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float16]:
    """``Policy.prompt`` of every scene, float16 ``[N, S, H]``; in ``path`` (npy) if given, from there if it exists."""
    if path is not None and path.exists():
        return np.load(path, mmap_mode="r")
    config, audio = policy.config, policy.audio
    assert audio is not None
    parts = []
    for start in range(0, len(scenes), _BATCH):
        some = scenes[start : start + _BATCH]
        frames = np.stack([seen(scene, config.num_frames, config.image.size) for scene in some])
        features = policy.vision(pixels(frames, config).flatten(0, 1)).unflatten(0, (-1, config.num_frames))
        fbank = whole_fbank(torch.from_numpy(np.stack([heard(scene) for scene in some])), audio.config.num_frames)
        parts.append(policy.prompt(policy.visual_tokens(features), audio(fbank)).to(torch.float16).numpy())
        if progress is not None:
            progress(min(start + _BATCH, len(scenes)), len(scenes))
    prompts = np.concatenate(parts)
    if path is not None:
        write_whole(path, lambda partial: _save_array(partial, prompts))
    return prompts


def caption_prompts(
    policy: Policy,
    prompts: npt.NDArray[np.floating],
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    max_new_tokens: int = 96,
) -> list[str]:
    """A greedy caption of every prompt ``[N, S, H]``."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        given: Tensor = torch.from_numpy(np.asarray(prompts[start : start + batch], np.float32))
        texts += [policy.decode(ids) for ids in policy.generate(given, max_new_tokens)]
        if progress is not None:
            progress(len(texts), len(prompts))
    return texts
