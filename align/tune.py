"""Preference training of a captioner: LoRA through PEFT, one of ``objectives``, an adapter folder as result.

The decoder gets low-rank layers; connector and audio projector are trained whole beside them where a rate for them is
given, and go into the adapter as PEFT's ``modules_to_save``. Towers and embeddings stay as they are, so that a clip is
what the towers make of it, computed once for all epochs and all objectives. The result is merged by
``intertitle compile --adapter``: the graphs stay the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import OptionError
from .features import Features
from .files import write_whole
from .objectives import NEED_REFERENCE, OBJECTIVES, Measures, sequence_sum, supervised
from .policy import Policy
from .preference import read_pairs
from .scenes import Scene, draw_scene
from .train import autocast, epochs
from .trained import Trained

Progress = Callable[[str, int, int], None]

WEIGHTS, STATE, LOG, SETTINGS = "adapter_model.safetensors", "state.pt", "log.jsonl", "tuning.json"
"""In the adapter's folder; ``STATE`` only until the training is done."""


@dataclass(frozen=True)
class Pair:
    """Two texts of a clip, by the row of its prompt, and the scores (chosen, rejected) that told them apart."""

    clip: int
    chosen: str
    rejected: str
    scores: tuple[float, float] | None = None

    @property
    def gap(self) -> float:
        """How much better the chosen text was scored; infinite where nothing was scored."""
        return float("inf") if self.scores is None else self.scores[0] - self.scores[1]


@dataclass(frozen=True)
class Tuning:
    """One preference training. ``options`` are the objective's own (``{"alpha": 10.0}``).

    ``connector_rate`` is the learning rate of connector and audio projector, 0 where they stay as they are. ``steps``
    are optimizer steps of ``accumulation`` batches of ``batch`` pairs; pairs with a smaller gap than
    ``min_gap`` are left out; bfloat16 matmuls are used only where the machine has units for them. SynPO's own, for
    7 B parameters (train_synpo.py): rank 128, alpha 64, learning rate 5e-6, batch 1, accumulation 32, a gap of 4.
    """

    objective: str = "synpo"
    options: Mapping[str, float | str] = field(default_factory=dict)
    steps: int = 200
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    connector_rate: float = 0.0
    warmup: float = 0.1
    decay: Literal["constant", "linear"] = "linear"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    rank: int = 32
    alpha: float = 16
    dropout: float = 0.05
    min_gap: float = 0.0
    bfloat16: bool = True
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise OptionError(f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        parameters = inspect.signature(OBJECTIVES[self.objective]).parameters.values()
        known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        for name in self.options:
            if name not in known:
                raise OptionError(f"{self.objective} has no option {name!r}; it has {', '.join(known) or 'none'}")
        for name in ("steps", "batch", "accumulation", "rank", "save_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: up in a line over ``warmup``, then level or down in a line."""
        rising = round(self.steps * self.warmup)
        if step < rising:
            return (step + 1) / rising
        return 1.0 if self.decay == "constant" else (self.steps - step) / max(self.steps - rising, 1)


def tune(
    policy: Policy,
    clips: Features,
    pairs: Sequence[Pair],
    how: Tuning,
    out: Path,
    progress: Progress | None = None,
) -> Path:
    """Train an adapter on pairs, or go on where an earlier run stopped, and return its folder ``out``.

    ``clips``: what the policy's towers make of every clip that a pair is of. The folder has PEFT's layout, with
    ``log.jsonl``: a line per step with loss, measures (``objectives.Measures``), the gradient's norm before clipping,
    and seconds. A run that was stopped and started again ends with the same bytes. The policy is left with the adapter
    on it, in eval mode: open a new one for another training. Raises ``OptionError`` for no pairs, a row that is not
    there, a folder of another training, a policy that has an adapter, PEFT not installed, or a loss that is no number.
    """
    if policy.opened.adapter is not None:
        raise OptionError("the policy has an adapter merged in: save it as a checkpoint, and tune that")
    kept = [pair for pair in pairs if pair.gap >= how.min_gap]
    if not kept:
        raise OptionError(f"none of {len(pairs)} pairs has a gap of {how.min_gap} or more: nothing to train on")
    for pair in kept:
        if not 0 <= pair.clip < len(clips):
            raise OptionError(f"a pair is of clip {pair.clip}, but there are features of {len(clips)} clips")
    _settle(out, policy, clips, kept, how)
    # LoRA's first values and its dropout draw from PyTorch's global generator: the caller's is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        trained = Trained(
            policy,
            rank=how.rank,
            alpha=how.alpha,
            dropout=how.dropout,
            learning_rate=how.learning_rate,
            connector_rate=how.connector_rate,
        )
        if (out / WEIGHTS).exists():
            trained.load(load_file(out / WEIGHTS))
        else:
            _train(policy, trained, clips, kept, how, out, progress)
            trained.write(out / WEIGHTS)
            (out / STATE).unlink(missing_ok=True)
    policy.eval()
    return out


def scene_pairs(path: Path, gap: float | None = None) -> tuple[list[Scene], list[Pair]]:
    """The scenes that a file of pairs is of, and the pairs by their rows.

    ``gap``: another threshold than the one that the file was made with. Raises ``OptionError`` for a file that is
    malformed or of other clips than scenes.
    """
    found = list(read_pairs(path, gap))
    for pair in found:
        if re.fullmatch(r"(train|validation|test):\d+", pair.key) is None:
            raise OptionError(f"{path}: the pair {pair.key} is not of a scene: prompts of files are not built here")
    keys = sorted({pair.key for pair in found}, key=lambda key: (key.split(":")[0], int(key.split(":")[1])))
    rows = {key: row for row, key in enumerate(keys)}
    scenes = [draw_scene(key.split(":")[0], int(key.split(":")[1])) for key in keys]
    return scenes, [
        Pair(rows[pair.key], pair.chosen, pair.rejected, (pair.chosen_scores.total, pair.rejected_scores.total))
        for pair in found
    ]


def _settle(out: Path, policy: Policy, clips: Features, pairs: Sequence[Pair], how: Tuning) -> None:
    """Note what the folder is of, or check that it is of the same."""
    digest = hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()
    about = {**asdict(how), "pairs": len(pairs), "pairs_sha256": digest, "clips": len(clips)}
    about["base"] = policy.opened.fingerprint()
    note = out / SETTINGS
    if note.exists():
        if json.loads(note.read_text()) != json.loads(json.dumps(about)):
            raise OptionError(f"{out} holds another training: give a new folder, or remove it first")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))


def _train(
    policy: Policy,
    trained: Trained,
    clips: Features,
    pairs: Sequence[Pair],
    how: Tuning,
    out: Path,
    progress: Progress | None,
) -> None:
    optimizer = torch.optim.AdamW(trained.groups(), weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, how.rate)
    at, log = 0, out / LOG
    if (out / STATE).exists():
        saved = torch.load(out / STATE, weights_only=True)
        trained.load(saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])
        at = saved["step"]
    _cut(log, at)
    batches = epochs(len(pairs), how.batch, how.seed, at * how.accumulation)
    # What stays as it is need not be computed twice.
    fixed = None if how.connector_rate else _fixed_prompts(policy, clips)
    policy.train()
    while at < how.steps:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total: dict[str, float] = {}
        for _ in range(how.accumulation):
            chosen = [pairs[row] for row in next(batches)]
            loss, measures = _loss(policy, trained, clips, fixed, chosen, how)
            (loss / how.accumulation).backward()
            for name, value in {"loss": loss.detach(), **measures}.items():
                total[name] = total.get(name, 0.0) + float(value) / how.accumulation
        if not np.isfinite(total["loss"]):
            raise OptionError(f"the loss is {total['loss']} at step {at + 1}: try a smaller learning rate")
        total["grad_norm"] = float(nn.utils.clip_grad_norm_(trained.parameters, how.clip_norm))
        optimizer.step()
        schedule.step()
        at += 1
        line = {"step": at, **total, "seconds": round(time.perf_counter() - started, 4)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if at % how.save_every == 0 or at == how.steps:
            state = {"trained": trained.state(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            state |= {"rng": torch.get_rng_state(), "step": at}
            write_whole(out / STATE, lambda path, state=state: torch.save(state, path))
        if progress is not None:
            progress(f"tune {how.objective}", at, how.steps)


@torch.no_grad()
def _fixed_prompts(policy: Policy, clips: Features, batch: int = 32) -> npt.NDArray[np.float16]:
    """The prompts of all clips ``[N, S, H]``."""
    policy.eval()
    batches = [slice(start, start + batch) for start in range(0, len(clips), batch)]
    return np.concatenate([clips.prompts(policy, rows).to(torch.float16).numpy() for rows in batches])


def _loss(
    policy: Policy,
    trained: Trained,
    clips: Features,
    fixed: npt.NDArray[np.float16] | None,
    pairs: Sequence[Pair],
    how: Tuning,
) -> tuple[Tensor, Measures]:
    precision = autocast if how.bfloat16 else nullcontext
    rows = np.array([pair.clip for pair in pairs])

    def prompts() -> Tensor:
        return clips.prompts(policy, rows) if fixed is None else torch.from_numpy(fixed[rows].astype(np.float32))

    chosen = [pair.chosen for pair in pairs]
    if how.objective == "supervised":
        with precision():
            return supervised(*policy.log_probs(prompts(), policy.encode(chosen)))
    texts = policy.encode(chosen), policy.encode([pair.rejected for pair in pairs])
    references: tuple[Tensor, ...] = ()
    if how.objective in NEED_REFERENCE:
        with torch.no_grad(), trained.disabled(), precision():
            references = tuple(sequence_sum(*each) for each in policy.pair_log_probs(prompts(), *texts))
    with precision():
        winner, loser = policy.pair_log_probs(prompts(), *texts)
    return OBJECTIVES[how.objective](*winner, *loser, *references, **how.options)


def _cut(log: Path, step: int) -> None:
    """Drop the lines of steps after the last save, which are to be done again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
        write_whole(log, lambda path: path.write_text(kept))
