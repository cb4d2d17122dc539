"""The PyTorch reference of a whole captioner, with the same interfaces as the runtime.

It has its own preprocessing and greedy decoding, with Pillow and torch, so that those of the runtime are compared with
independent code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from ..contract.pipeline import EachUnit, ImagePlan
from ..errors import OptionError
from ..models import CaptionerCheckpoint
from ..models.decoder import Decoder
from ..models.stages import build_on_meta, run_stage
from ..runtime.inference import FloatArray, FullLogits
from .recipe import Rounding

#: Units of a stage that are computed at once, where each is computed alone: a long clip must not need more memory.
_UNITS = 8

#: Povey's window is a Hann window to the power of this (Kaldi, feature-window.cc).
_POVEY_POWER = 0.85


@dataclass(frozen=True)
class GreedyCaption:
    """Greedy tokens and the logits ``[N, V]`` (before the repetition penalty) from which each was chosen."""

    tokens: list[int]
    logits: FloatArray


class Reference:
    """A checkpoint's components in float32 PyTorch, loaded at first use and kept.

    ``rounded``: for each component, the rounding of its linear layers to the values that a bundle stores. With it, a
    wrong graph can be told from the effect of quantization.
    """

    def __init__(self, checkpoint: CaptionerCheckpoint, rounded: Mapping[str, Rounding] | None = None) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._rounded = rounded or {}
        self._modules: dict[str, nn.Module] = {}
        self._embedding: Tensor | None = None

    def pixels(self, frames: npt.NDArray[np.uint8]) -> FloatArray:
        """``[T, 3, S, S]`` of RGB frames ``[T, H, W, 3]``."""
        return np.stack([reference_pixels(frame, self.config.image) for frame in frames])

    def fbank(self, sound: FloatArray) -> FloatArray:
        """``[frames, mel]`` of sound at the rate of the sound plan."""
        plan = self.config.sound
        assert plan is not None
        return _FEATURES[plan.feature](sound, plan.num_mel_bins, plan.sample_rate)

    def run(self, stage: str, values: Mapping[str, FloatArray], keep: float | None = None) -> FloatArray:
        """What a stage gives its units, ``[units, tokens, width]``. Equal units are computed again.

        ``values``: of its sources by name: all places of the clip as ``pixels [T, 3, S, S]``, ``sound [1, frames,
        mel]``, what earlier stages gave. ``keep``: another share of tokens than the checkpoint was opened with.
        """
        part = self.config.part(stage)
        module = self.module(stage)
        if keep is not None:
            form = build_on_meta(self.config.keeping(keep).part(stage))
            form.load_state_dict(module.state_dict(), assign=True)
            module = form
        taken = {value.source: torch.from_numpy(values[value.source]) for value in part.stage.inputs}
        with torch.no_grad():
            if not isinstance(part.stage.unit, EachUnit):
                return run_stage(part.stage, module, taken).numpy()
            count = len(taken[part.stage.inputs[0].source])
            runs = [
                run_stage(part.stage, module, {name: value[start : start + _UNITS] for name, value in taken.items()})
                for start in range(0, count, _UNITS)
            ]
            return torch.cat(runs).numpy()

    def embed(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        """Rows of the embedding table ``[n, H]``."""
        if self._embedding is None:
            self._embedding = self.checkpoint.embedding()
        return self._embedding[torch.from_numpy(token_ids)].float().numpy()

    def greedy(self, embeds: FloatArray, max_new_tokens: int) -> GreedyCaption:
        """The likeliest continuation of a prompt ``[S, H]``, token by token, under the checkpoint's repetition penalty.

        Ends with an end-of-sequence token or after ``max_new_tokens``.
        """
        generation = self.config.generation
        inference = self.open(1, len(embeds) + max_new_tokens)
        tokens: list[int] = []
        logits = [inference.prefill(0, embeds)[0]]
        while True:
            scores = repetition_penalty(logits[-1], tokens, generation.repetition_penalty)
            tokens.append(int(scores.argmax()))
            if tokens[-1] in generation.eos_token_ids or len(tokens) == max_new_tokens:
                return GreedyCaption(tokens, np.stack(logits))
            logits.append(inference.step(np.array(tokens[-1:]))[0])

    def open(self, rows: int, max_length: int) -> TorchInference:
        """The decoder with an empty cache."""
        decoder = self.module("decoder")
        assert isinstance(decoder, Decoder)
        return TorchInference(decoder, self.embed, rows, max_length)

    def module(self, component: str) -> nn.Module:
        """A component in eval mode with the weights of this reference."""
        if component not in self._modules:
            module = self.checkpoint.load(component)
            if component in self._rounded:
                self._rounded[component].apply(module)
            self._modules[component] = module
        return self._modules[component]


class TorchInference(FullLogits):
    """``runtime.inference.Inference`` over the reference decoder.

    It keeps the positions of each row as a list, so that the bookkeeping of the runtime is compared with another one.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[npt.NDArray[np.int64]], FloatArray],
        rows: int,
        max_length: int,
    ) -> None:
        self._decoder, self._embed = decoder, embed
        self._rows, self._max_length = rows, max_length
        self._positions: list[list[int]] = [[] for _ in range(rows)]
        self._cache = decoder.empty_cache(rows, max_length)

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def max_length(self) -> int:
        return self._max_length

    def prefill(
        self,
        row: int,
        embeds: FloatArray,
        num_logits: int = 1,
        progress: Callable[[int], None] | None = None,
        positions: npt.NDArray[np.int64] | None = None,
    ) -> FloatArray:
        length = len(embeds)
        if not 1 <= num_logits <= length:
            raise ValueError(f"num_logits is {num_logits} for {length} new tokens")
        self._check_room(row, length)
        self._append(row, length, positions)
        rows = slice(row, row + 1)
        asked = torch.arange(length - num_logits, length).unsqueeze(0)
        embedded = torch.from_numpy(embeds).unsqueeze(0)
        logits = self._run(embedded, rows, asked)
        if progress is not None:
            progress(length)
        return logits[0].numpy()

    def step(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        count = len(token_ids)
        for row in range(count):
            self._check_room(row, 1)
        for row in range(count):
            self._append(row, 1)
        embeds = torch.from_numpy(self._embed(token_ids)).unsqueeze(1)
        asked = torch.zeros((count, 1), dtype=torch.int64)
        return self._run(embeds, slice(0, count), asked)[:, 0].numpy()

    def rearrange(self, sources: Mapping[int, int], start: int = 0, stop: int | None = None) -> None:
        targets, origins = list(sources), list(sources.values())
        for pair in self._cache:
            for buffer in pair:
                buffer[targets, :, start:] = buffer[origins, :, start:]
        copied = [self._positions[origin][:stop] for origin in origins]
        for target, positions in zip(targets, copied, strict=True):
            self._positions[target] = positions

    def truncate(self, row: int, length: int) -> None:
        if not 0 <= length <= len(self._positions[row]):
            raise ValueError(f"row {row} holds {len(self._positions[row])} tokens, cannot keep {length}")
        self._positions[row] = self._positions[row][:length]

    def _append(self, row: int, count: int, given: npt.NDArray[np.int64] | None = None) -> None:
        held = self._positions[row]
        first = max(held, default=-1) + 1
        self._positions[row] = held + (list(range(first, first + count)) if given is None else given.tolist())

    def _check_room(self, row: int, count: int) -> None:
        if len(self._positions[row]) + count > self._max_length:
            raise OptionError(f"the cache holds {self._max_length} tokens a row; row {row} cannot take {count} more")

    def _run(self, embeds: Tensor, rows: slice, asked: Tensor) -> Tensor:
        """Run the newest tokens of some rows; logits ``[rows, asked, V]``."""
        held, length = self._positions[rows], embeds.shape[1]
        lengths = torch.tensor([len(each) - 1 for each in held], dtype=torch.int32)
        total = torch.tensor(max(map(len, held)), dtype=torch.int32)
        # A sequential decoder counts for itself.
        explicit = self._decoder.config.positions == "explicit"
        position_ids = torch.tensor([each[-length:] for each in held]) if explicit else None
        past = [(key[rows], value[rows]) for key, value in self._cache]
        with torch.no_grad():
            logits, present = self._decoder(embeds, lengths, total, asked, past, position_ids)
        for (key, value), (new_key, new_value) in zip(self._cache, present, strict=True):
            key[rows], value[rows] = new_key, new_value
        return logits


def repetition_penalty(logits: FloatArray, seen: Sequence[int], penalty: float) -> FloatArray:
    """Logits ``[V]`` with those of ``seen`` tokens divided (positive) or multiplied (negative) by ``penalty``.

    Keskar et al. 2019, CTRL, in the signed form of transformers' ``RepetitionPenaltyLogitsProcessor``.
    """
    scores, index = torch.from_numpy(logits), torch.tensor(list(seen), dtype=torch.int64)
    picked = scores[index]
    return scores.index_put((index,), torch.where(picked < 0, picked * penalty, picked / penalty)).numpy()


def reference_pixels(frame: npt.NDArray[np.uint8], spec: ImagePlan) -> FloatArray:
    """One frame ``[H, W, 3]`` through Pillow, as the CLIP and SigLIP image processors do it: ``[3, S, S]``."""
    height, width = frame.shape[:2]
    image = Image.fromarray(frame)
    if spec.resize == "exact":
        image = _resized(image, spec.size, spec.size)
    else:
        # The longer side is truncated, not rounded (transformers get_resize_output_image_size).
        if width < height:
            size = (spec.size, int(spec.size * height / width))
        else:
            size = (int(spec.size * width / height), spec.size)
        image = _resized(image, *size)
        left, top = (size[0] - spec.crop) // 2, (size[1] - spec.crop) // 2
        image = image.crop((left, top, left + spec.crop, top + spec.crop))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((pixels - mean) / std).numpy()


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, the horizontal pass first, as in Pillow before version 13. Another order rounds differently."""
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def reference_fbank(sound: FloatArray, num_mel_bins: int = 128, rate: int = 16000) -> FloatArray:
    """Kaldi's log mel filter bank of float32 sound in [-1, 1], rounded through bfloat16: ``[frames, mel]``.

    The constants are the defaults of torchaudio's ``compliance.kaldi.fbank`` (docs/facts.md 1.4). Everything is
    computed in float64 but the filters: torchaudio computes them in float32, and its rounding (0.2 % of a filter whose
    edge touches one bin of the spectrum) is visible after the bfloat16 step. Beside a loud pure tone, the quietest bins
    of torchaudio's float32 spectrum are rounding noise, which cannot be reproduced.
    """
    window, shift, fft = rate * 25 // 1000, rate * 10 // 1000, 512
    frames = torch.from_numpy(sound).double().mul(2**15).unfold(0, window, shift)
    frames = frames - frames.mean(1, keepdim=True)
    previous = torch.cat((frames[:, :1], frames[:, :-1]), 1)
    povey = torch.hann_window(window, periodic=False, dtype=torch.float64) ** _POVEY_POWER
    frames = (frames - 0.97 * previous) * povey
    power = torch.fft.rfft(frames, fft).abs() ** 2
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (20.0, rate / 2))
    spacing = (high - low) / (num_mel_bins + 1)
    left, centre, right = (low + (torch.arange(num_mel_bins) + float(i)).unsqueeze(1) * spacing for i in range(3))
    bins = 1127.0 * (1.0 + torch.arange(fft // 2) * (rate / fft) / 700.0).log()
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    energy = power[:, : fft // 2] @ filters.double().T
    return energy.clamp(min=torch.finfo(torch.float32).eps).log().to(torch.bfloat16).float().numpy()


_FEATURES = {"kaldi_fbank": reference_fbank}
