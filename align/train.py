"""Supervised training of the small captioner: towers, then captions over their features.

    scenes ─▶ clips on disk ─▶ vision tower, audio tower (their own heads) ─▶ features on disk
           ─▶ connector, audio projector, decoder (captions) ─▶ checkpoint in the released layout

Every stage leaves its state in the work folder and an interrupted one goes on from its last save, so that a run that is
stopped at any moment and started again ends with the same checkpoint, give or take the batches since the last save.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError
from ..models.random_checkpoint import write_checkpoint
from . import towers
from .data import Clips, render_clips, whole_fbank
from .features import Features, audio_branch, compute_features
from .files import read_json, read_state, write_whole
from .policy import IGNORED, Policy, pixels
from .recipe import Recipe
from .scenes import captions, draw_scene

Progress = Callable[[str, int, int], None]
_SAVE_EVERY = 250
_TOLD = 0.3
"""Weight of the heads beside the captions."""


@dataclass
class Run:
    """One training in its work folder."""

    recipe: Recipe
    work: Path
    progress: Progress
    workers: int = 2

    def __call__(self) -> Path:
        """All stages; returns the trained checkpoint's folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._check_recipe()
        recipe, size = self.recipe, self.recipe.size
        start = self.work / "start"
        if not start.exists():
            text = [line for index in range(400) for line in captions(draw_scene("train", index))]
            # The words around the clip are in every prompt: they are to be few tokens.
            text += [
                "system\nYou are a helpful assistant.",
                "\nDescribe the video in detail.",
                "user\n",
                "assistant\n",
            ] * 300
            write_checkpoint(start, size, recipe.seed, text=text)
            _set_generation(start)
        train = self._clips("train", recipe.clips)
        validation = self._clips("validation", recipe.validation)
        torch.manual_seed(recipe.seed)
        policy = Policy.open(start)
        _better_start(policy)
        self._train_vision(policy, train, validation)
        self._train_audio(policy, train, validation)
        features = self.features(policy, train)
        self._train_captions(policy, train, features, self.features(policy, validation), validation)
        trained = self.work / "supervised"
        if not trained.exists():
            policy.save(trained)
        return trained

    def _check_recipe(self) -> None:
        note, text = self.work / "recipe.json", repr(self.recipe)
        if note.exists() and read_json(note) != text:
            raise OptionError(f"{self.work} holds another recipe's training: give a new folder, or remove it first")
        note.write_text(json.dumps(text))

    def _clips(self, split: str, count: int) -> Clips:
        return render_clips(
            self.work / split,
            split,
            count,
            num_frames=self.recipe.size.num_frames,
            size=self.recipe.size.vision.image_size,
            workers=self.workers,
            progress=lambda done, total: self.progress(f"render {split}", done, total),
        )

    # --- towers

    def _train_vision(self, policy: Policy, train: Clips, validation: Clips) -> None:
        tower, config = policy.stages["vision"], policy.config.part("vision").config
        grid = config.grid
        heads = towers.VisionHeads(config.hidden_size)

        def loss(clips: Clips, rows: np.ndarray) -> tuple[Tensor, Tensor]:
            frames = pixels(clips.frames[rows], policy.config).flatten(0, 1)
            targets, offsets = towers.patch_targets(torch.from_numpy(np.array(clips.states[rows])).flatten(0, 1), grid)
            backgrounds = torch.tensor([towers.background_target(clips.scene(int(row))) for row in rows])
            backgrounds = backgrounds.repeat_interleave(clips.frames.shape[1], 0)
            return heads.loss(tower(frames), targets, offsets, backgrounds)

        modules = nn.ModuleDict({"tower": tower, "heads": heads})
        self._fit("vision", modules, train, validation, self.recipe.vision_steps, self.recipe.vision_batch, loss)

    def _train_audio(self, policy: Policy, train: Clips, validation: Clips) -> None:
        branch = audio_branch(policy)
        config = branch.config
        heads = towers.AudioHeads(config.hidden_size, config.num_tokens)

        def loss(clips: Clips, rows: np.ndarray) -> tuple[Tensor, Tensor]:
            fbank = whole_fbank(torch.from_numpy(np.array(clips.fbank[rows])).float(), config.num_frames)
            targets = torch.tensor([towers.sound_target(clips.scene(int(row))) for row in rows])
            return heads.loss(branch.features(fbank), targets)

        modules = nn.ModuleDict({"tower": branch.tower, "heads": heads})
        self._fit("audio", modules, train, validation, self.recipe.audio_steps, self.recipe.audio_batch, loss)

    # --- captions

    def features(self, policy: Policy, clips: Clips) -> Features:
        """What the towers make of every clip, beside the clips."""
        return compute_features(
            policy,
            len(clips),
            lambda rows: (clips.frames[rows], clips.fbank[rows]),
            self.work / clips.split,
            lambda done, total: self.progress(f"features {clips.split}", done, total),
        )

    def _train_captions(
        self, policy: Policy, train: Clips, features: Features, held_out: Features, validation: Clips
    ) -> None:
        texts = {
            clips.split: [captions(clips.scene(row)) for row in range(len(clips))] for clips in (train, validation)
        }
        rng = np.random.default_rng(self.recipe.seed)
        branch, width = audio_branch(policy), policy.config.decoder.hidden_size
        # The connector and the projector are told directly what to pass on: see ``towers``.
        seen, heard = towers.SlotHeads(width), towers.AudioHeads(width, branch.config.num_tokens)

        def loss(clips: Clips, rows: np.ndarray) -> tuple[Tensor, Tensor]:
            given = features if clips is train else held_out
            which = rng.integers(0, 5, len(rows)) if clips is train else np.zeros(len(rows), int)
            said = [texts[clips.split][row] for row in rows]
            tokens = policy.encode([lines[i % len(lines)] for lines, i in zip(said, which, strict=True)])
            blocks = given.tokens(policy, rows)
            with autocast():
                logits = policy.logits(policy.prompt(blocks), tokens).float()
            right = (logits.argmax(-1) == tokens)[tokens != IGNORED].float().mean()
            value = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED)
            if clips is not train:
                return value, right
            told = self._told(seen, heard, clips, rows, blocks["connector"], blocks["audio"][:, 0])
            return value + _TOLD * told, right

        between = {stage.name: policy.stages[stage.name] for stage in policy.config.pipeline.visual()}
        between.pop("vision")
        modules = nn.ModuleDict(
            {
                **between,
                "projector": branch.projector,
                "decoder": policy.decoder,
                "embedding": policy.embedding,
                "seen": seen,
                "heard": heard,
            }
        )
        self._fit("captions", modules, train, validation, self.recipe.caption_steps, self.recipe.caption_batch, loss)

    @staticmethod
    def _told(
        seen: towers.SlotHeads, heard: towers.AudioHeads, clips: Clips, rows: np.ndarray, visual: Tensor, audio: Tensor
    ) -> Tensor:
        """The heads' losses over visual tokens ``[B, slots, cells, H]`` and audio tokens."""
        scenes = [clips.scene(int(row)) for row in rows]
        sounds = torch.tensor([towers.sound_target(scene) for scene in scenes])
        states = torch.from_numpy(np.array(clips.states[rows]))
        return seen.loss(visual, states, scenes) + heard.loss(audio, sounds)[0]

    # --- one stage

    def _fit(
        self,
        stage: str,
        modules: nn.ModuleDict,
        train: Clips,
        validation: Clips,
        steps: int,
        batch: int,
        loss: Callable[[Clips, np.ndarray], tuple[Tensor, Tensor]],
    ) -> None:
        """AdamW with warm-up and a cosine; the state is saved every so often, and the log with it."""
        state_file, log_file = self.work / f"{stage}.pt", self.work / f"{stage}.jsonl"
        modules.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(_groups(modules), lr=self.recipe.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
        at = 0
        if state_file.exists():
            saved = read_state(state_file, "modules", "optimizer", "schedule", "step")
            modules.load_state_dict(saved["modules"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            at = saved["step"]
        batches = epochs(len(train), batch, self.recipe.seed, at)
        started, since = time.perf_counter(), at
        while at < steps:
            value, right = loss(train, next(batches))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            at += 1
            self.progress(f"train {stage}", at, steps)
            if at % _SAVE_EVERY == 0 or at == steps:
                with torch.no_grad():
                    rows = np.arange(min(len(validation), 4 * batch))
                    held, held_right = loss(validation, rows)
                line = {
                    "step": at,
                    "loss": round(float(value.detach()), 4),
                    "right": round(float(right), 4),
                    "validation_loss": round(float(held), 4),
                    "validation_right": round(float(held_right), 4),
                    "seconds_per_step": round((time.perf_counter() - started) / (at - since), 4),
                }
                with log_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                saved = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
                saved |= {"schedule": schedule.state_dict(), "step": at}
                write_whole(state_file, lambda path, saved=saved: torch.save(saved, path))
        modules.eval().requires_grad_(False)


def autocast():
    """bfloat16 matmuls where the machine has units for them, float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())


def cosine(step: int, steps: int, warmup: float = 0.05, floor: float = 0.02) -> float:
    """The share of the learning rate at a step: up in a line, down in a cosine."""
    rising = max(int(steps * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def epochs(count: int, batch: int, seed: int, skip: int = 0) -> Iterator[np.ndarray]:
    """Batches of rows, sorted, each epoch in an order of its own; the first ``skip`` batches are left out."""
    each = max(count // batch, 1)
    epoch, left = divmod(skip, each)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for start in range(left * batch, each * batch, batch):
            yield np.sort(order[start : start + batch])
        epoch, left = epoch + 1, 0


def _groups(modules: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices, none for biases, norms and single values."""
    parameters = list(modules.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _better_start(policy: Policy) -> None:
    """Norms to one and biases to zero, which random checkpoints leave near it on purpose; the last layer of every
    residual branch small."""
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:
            norm = "norm" in name or ".bn." in name
            parameter.data.fill_(1.0 if norm and name.endswith("weight") else 0.0)


def _set_generation(folder: Path) -> None:
    """No repetition penalty: captions of scenes say "is heard" as often as something is."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) | {"repetition_penalty": 1.0, "do_sample": False}
    file.write_text(json.dumps(settings, indent=2) + "\n")


def read_log(work: Path, stage: str) -> Sequence[dict[str, float]]:
    """The lines that a stage wrote."""
    return [json.loads(line) for line in (work / f"{stage}.jsonl").read_text().splitlines()]
