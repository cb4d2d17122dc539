"""The towers' own training: what is where in a frame, and what each half of the sound is.

The released captioners start from towers that were trained on hundreds of millions of pictures and on AudioSet. Ours
learn from the scenes' own state, patch by patch, before any caption: a few minutes replace what captions alone would
take hours to teach. The heads are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes.scene import ACTIONS, BACKGROUND_KINDS, CAMERAS, COLORS, SHAPES, SIZES, SOUND_KINDS, Heard, Scene

BACKGROUND_PAIRS = ("white", "grey", "black", "grey and white", "black and white", "black and grey")
SOUNDS = tuple(Heard(kind, count).name for kind in SOUND_KINDS for count in ((1, 2, 3) if kind == "beeps" else (0,)))


class VisionHeads(nn.Module):
    """Of every patch: colour, shape and size of the thing over it, and its offset from the patch; of every frame: the
    background."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.size = nn.Linear(width, len(SIZES) + 1)
        self.offset = nn.Linear(width, 3)
        self.background = nn.Linear(width, len(BACKGROUND_KINDS))
        self.pair = nn.Linear(width, len(BACKGROUND_PAIRS))

    def loss(self, features: Tensor, targets: Tensor, offsets: Tensor, backgrounds: Tensor) -> tuple[Tensor, Tensor]:
        """features ``[N, P, D]``; targets int64 ``[N, P, 3]``; offsets ``[N, P, 3]``; backgrounds int64 ``[N, 2]``.

        Returns the loss and the share of patches with a thing whose colour, shape and size are all right.
        """
        x = self.norm(features)
        logits = self.color(x), self.shape(x), self.size(x)
        # Patches without a thing are most of them: they count a fifth.
        there = targets[..., 0] > 0
        weight = torch.where(there, 1.0, 0.2)
        losses = [
            (F.cross_entropy(each.flatten(0, 1), targets[..., i].flatten(), reduction="none") * weight.flatten()).sum()
            / weight.sum()
            for i, each in enumerate(logits)
        ]
        right = torch.stack([each.argmax(-1) == targets[..., i] for i, each in enumerate(logits)]).all(0)
        moved = F.smooth_l1_loss(self.offset(x)[there], offsets[there]) if bool(there.any()) else x.new_zeros(())
        frame = x.mean(1)
        seen = F.cross_entropy(self.background(frame), backgrounds[:, 0]) + F.cross_entropy(
            self.pair(frame), backgrounds[:, 1]
        )
        return sum(losses, x.new_zeros(())) + moved + seen, right[there].float().mean()


class SlotHeads(nn.Module):
    """For the connector's tokens, whose slots hold two frames: what is where in the first and in the second of them,
    what the thing there does in the clip, and the camera."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = VisionHeads(width), VisionHeads(width)
        self.norm = nn.LayerNorm(width)
        self.action = nn.Linear(width, len(ACTIONS) + 1)
        self.camera = nn.Linear(width, len(CAMERAS))

    def loss(self, tokens: Tensor, states: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """tokens ``[B, slots, cells, D]``, states ``[B, 2 * slots, 3, 6]`` as in ``data.STATE``."""
        slots, cells = tokens.shape[1:3]
        flat, grid = tokens.flatten(0, 1), math.isqrt(cells)
        backgrounds = torch.tensor([background_target(scene) for scene in scenes]).repeat_interleave(slots, 0)
        total = tokens.new_zeros(())
        for heads, frames in ((self.first, states[:, ::2]), (self.second, states[:, 1::2])):
            targets, offsets = patch_targets(frames.flatten(0, 1), grid)
            total = total + heads.loss(flat, targets, offsets, backgrounds)[0]
        deeds = torch.zeros(len(scenes), states.shape[2])
        for row, scene in enumerate(scenes):
            deeds[row, : len(scene.things)] = torch.tensor([float(ACTIONS.index(t.action)) for t in scene.things])
        extended = torch.cat((states, deeds[:, None, :, None].expand(*states.shape[:3], 1)), -1)
        # Where the thing is in either frame: it may come or go in between.
        does = [patch_targets(extended[:, i::2].flatten(0, 1), grid)[0][..., 3] for i in (0, 1)]
        action = torch.where(does[0] > 0, does[0], does[1])
        x = self.norm(flat)
        weight = torch.where(action > 0, 1.0, 0.1).flatten()
        losses = F.cross_entropy(self.action(x).flatten(0, 1), action.flatten(), reduction="none")
        cameras = torch.tensor([CAMERAS.index(scene.camera) for scene in scenes]).repeat_interleave(slots)
        return total + (losses * weight).sum() / weight.sum() + F.cross_entropy(self.camera(x.mean(1)), cameras)


class AudioHeads(nn.Module):
    """What each half is, from the mean over the audio tokens."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Parameter(torch.zeros(2, tokens))
        self.halves = nn.ModuleList(nn.Linear(width, len(SOUNDS)) for _ in range(2))

    def loss(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """features ``[N, A, D]``, targets int64 ``[N, 2]`` -> the loss and the share of halves that are right."""
        pooled = torch.einsum("ha,nad->nhd", self.pool.softmax(-1), self.norm(features))
        logits = [head(pooled[:, i]) for i, head in enumerate(self.halves)]
        losses = [F.cross_entropy(each, targets[:, i]) for i, each in enumerate(logits)]
        right = torch.stack([each.argmax(-1) == targets[:, i] for i, each in enumerate(logits)]).float().mean()
        return sum(losses, features.new_zeros(())), right


def patch_targets(states: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """``data.STATE`` ``[..., 3, 6]`` of frames -> classes int64 ``[..., P, 3]`` (0: no thing) and offsets
    ``[..., P, 3]`` (x, y and radius in patches). Further columns are further classes.

    A patch belongs to the thing that covers its middle or whose middle it holds, the last drawn where there are more.
    """
    middle = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    x, y = x.flatten(), y.flatten()
    lead = states.shape[:-2]
    classes = torch.zeros(*lead, grid * grid, states.shape[-1] - 3, dtype=torch.int64)
    offsets = torch.zeros(*lead, grid * grid, 3)
    for thing in states.unbind(-2):
        cx, cy, radius = (thing[..., i : i + 1] for i in range(3))
        dx, dy = cx - x, cy - y
        holds = (dx.abs() <= 0.5 / grid) & (dy.abs() <= 0.5 / grid)
        over = (radius > 0) & (holds | (dx.square() + dy.square() <= (radius * 0.9).square()))
        classes = torch.where(over.unsqueeze(-1), (thing[..., 3:].long() + 1).unsqueeze(-2), classes)
        offset = torch.stack((dx * grid, dy * grid, (radius * grid).expand_as(dx)), -1)
        offsets = torch.where(over.unsqueeze(-1), offset, offsets)
    return classes, offsets


def background_target(scene: Scene) -> tuple[int, int]:
    """Indices of the background's kind and of its colours."""
    background = scene.background
    return BACKGROUND_KINDS.index(background.kind), BACKGROUND_PAIRS.index(background.palette)


def sound_target(scene: Scene) -> tuple[int, int]:
    """Indices of the two halves' sounds in ``SOUNDS``."""
    first, second = (SOUNDS.index(sound.name) for sound in scene.sounds)
    return first, second
