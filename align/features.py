"""What the towers make of clips: all that training behind them, and measuring, needs of a clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..contract.pipeline import PIXELS
from ..models.beats import AudioBranch
from ..models.config import VisionConfig
from .data import heard, seen, whole_fbank
from .policy import Policy, pixels
from .scenes import Scene

Progress = Callable[[int, int], None]
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Tower features of N clips: vision float16 ``[N, T, P, D]``, audio float16 ``[N, A, D]``, mapped or in memory."""

    vision: npt.NDArray[np.float16]
    audio: npt.NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.vision)

    def tokens(self, policy: Policy, rows: slice | npt.NDArray[np.integer]) -> dict[str, Tensor]:
        """Tokens ``[B, U, n, H]`` of some clips by stage, ``connector`` and ``audio``, through all that follows the
        towers; gradients pass."""
        vision, audio = (torch.from_numpy(np.array(part[rows], np.float32)) for part in (self.vision, self.audio))
        heard = audio_branch(policy).projector(audio).unsqueeze(1)
        return {"connector": policy.run(["connector"], {"vision": vision})["connector"], "audio": heard}

    def prompts(self, policy: Policy, rows: slice | npt.NDArray[np.integer]) -> Tensor:
        """``Policy.prompt`` of some clips, ``[B, S, H]``."""
        return policy.prompt(self.tokens(policy, rows))


def audio_branch(policy: Policy) -> AudioBranch:
    """The stage ``audio``, whose tower and projector are trained apart."""
    return cast(AudioBranch, policy.stages["audio"])


@torch.no_grad()
def compute_features(
    policy: Policy,
    count: int,
    clips: Callable[[slice], tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]],
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of ``count`` clips, given in slices as frames ``[B, T, S, S, 3]`` and ``data.heard`` ``[B, F, 128]``.

    In ``folder`` if given, and from there if they are complete.
    """
    config, branch = policy.config, audio_branch(policy)
    tower: VisionConfig = config.part("vision").config
    audio = branch.config
    shapes = {
        "vision_features": (count, config.sampling.count, tower.num_patches, tower.hidden_size),
        "audio_features": (count, audio.num_tokens, audio.hidden_size),
    }
    done = None if folder is None else folder / "features.done"
    if done is None or not done.exists():
        if folder is None:
            vision, sound = (np.empty(shape, np.float16) for shape in shapes.values())
        else:
            folder.mkdir(parents=True, exist_ok=True)
            vision, sound = (
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
                for name, shape in shapes.items()
            )
        policy.eval()
        for start in range(0, count, _BATCH):
            rows = slice(start, min(start + _BATCH, count))
            frames, fbank = clips(rows)
            vision[rows] = policy.run(["vision"], {PIXELS: pixels(frames, config)})["vision"].numpy()
            whole = whole_fbank(torch.from_numpy(np.array(fbank, np.float32)), audio.num_frames)
            sound[rows] = branch.features(whole).numpy()
            if progress is not None:
                progress(rows.stop, count)
        if done is None:
            return Features(vision, sound)
        for array in (vision, sound):
            if isinstance(array, np.memmap):
                array.flush()
        done.touch()
    assert folder is not None
    return Features(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes))


def scene_features(
    policy: Policy, scenes: Sequence[Scene], folder: Path | None = None, progress: Progress | None = None
) -> Features:
    """``compute_features`` of scenes that are rendered on the way."""
    size, frames = policy.config.image.size, policy.config.sampling.count

    def clips(rows: slice) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
        some = scenes[rows]
        return np.stack([seen(scene, frames, size) for scene in some]), np.stack([heard(scene) for scene in some])

    return compute_features(policy, len(scenes), clips, folder, progress)


@torch.no_grad()
def caption_features(
    policy: Policy,
    features: Features,
    batch: int = 64,
    progress: Progress | None = None,
    max_new_tokens: int = 96,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """A caption of every clip, greedy or (``temperature`` above 0) sampled."""
    texts: list[str] = []
    random = torch.Generator().manual_seed(seed)
    for start in range(0, len(features), batch):
        prompts = features.prompts(policy, slice(start, start + batch))
        made = policy.generate(prompts, max_new_tokens, temperature=temperature, top_p=top_p, generator=random)
        texts += [policy.decode(ids) for ids in made]
        if progress is not None:
            progress(len(texts), len(features))
    return texts
