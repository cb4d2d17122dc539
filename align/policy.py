"""A captioner in training form: batched, differentiable, its stages the reference modules of ``models/``.

Shapes use B clips, U units of a stage, n tokens of a unit, S prompt tokens, N caption tokens, H decoder width. Captions
are padded on the right, so that positions and the causal mask are those of a caption alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..contract.pipeline import EachUnit, OneSound, Stage, Unit, Window, stages_of
from ..errors import OptionError
from ..export.tokenizer import collect_tokenizer
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models import attention as attention_module
from ..models.attention import CacheState, ReferenceAttention, grouped_attention, rotate, split_heads
from ..models.config import CaptionerConfig
from ..models.decoder import Decoder
from ..models.save import save_checkpoint
from ..models.stages import run_stage
from ..runtime.prompt import Slot, Timing, build_prompt, choose_pieces

IGNORED = -100
"""Fills a batch of captions up to the longest (PyTorch's ``ignore_index``)."""


class TrainingAttention(ReferenceAttention):
    """``cached`` as plain attention over the new tokens: nothing is cached, gradients pass.

    Causal over tokens 0 to S - 1, unless ``positions`` int64 ``[S]`` and ``visible`` bool ``[S, S]`` (query, key) say
    otherwise.
    """

    def __init__(self, positions: Tensor | None = None, visible: Tensor | None = None) -> None:
        self._positions, self._visible = positions, visible

    def cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        state: CacheState,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        at: Tensor | slice = slice(query.shape[1]) if self._positions is None else self._positions
        cos, sin = (table[at].to(query.dtype) for table in (state.cos, state.sin))
        q, k = rotate(split_heads(query, num_heads), cos, sin), rotate(split_heads(key, num_kv_heads), cos, sin)
        v = split_heads(value, num_kv_heads)
        return grouped_attention(q, k, v, self._visible), past_key, past_value


_CAUSAL = TrainingAttention()


class Policy(nn.Module):
    """A whole captioner: the stages of its pipeline by name, the decoder, the embedding table."""

    decoder: Decoder

    def __init__(self, opened: CaptionerCheckpoint) -> None:
        super().__init__()
        self.opened, self.config = opened, opened.config
        self.stages = nn.ModuleDict({part.stage.name: opened.load(part.stage.name) for part in self.config.parts})
        self.decoder = cast(Decoder, opened.load("decoder"))
        table = opened.embedding().to(torch.float32).clone()
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.tokenizer = collect_tokenizer(opened.path)
        self.eos = self.config.generation.eos_token_ids[0]

    @classmethod
    def open(cls, path: str | Path, adapter: str | Path | None = None) -> Policy:
        """From a checkpoint folder, an adapter merged in if given. Raises ``CheckpointError``."""
        return cls(open_checkpoint(path, adapter))

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Write the weights as a checkpoint folder beside the one they came from; see ``save_checkpoint``."""
        parts = {**self.stages, "decoder": self.decoder}
        state = {name: module.state_dict() for name, module in parts.items()}
        if self.config.decoder.tie_embeddings:
            state["decoder"].pop("lm_head.weight")
        return save_checkpoint(self.opened, state | {"embedding": self.embedding.state_dict()}, path, dtype)

    # --- from a clip to its prompt

    def run(self, names: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``given`` with what the stages that lead from it to ``names`` give.

        Everything is of B clips: pixels ``[B, T, 3, S, S]``, sound ``[B, 1, frames, mels]``, of a stage
        ``[B, U, n, W]``.
        """
        found = dict(given)
        for stage in self.config.pipeline.needed(*names, given=set(given)):
            found[stage.name] = self._run_stage(stage, {value.source: found[value.source] for value in stage.inputs})
        return found

    def _run_stage(self, stage: Stage, values: Mapping[str, Tensor]) -> Tensor:
        """A stage over the clips of a batch: joined along the units where they do not meet, else one after another."""
        module, (clips, units) = self.stages[stage.name], next(iter(values.values())).shape[:2]
        if _joins(stage.unit, units):
            together = run_stage(stage, module, {name: value.flatten(0, 1) for name, value in values.items()})
            return together.unflatten(0, (clips, -1))
        each = [
            run_stage(stage, module, {name: value[clip] for name, value in values.items()}) for clip in range(clips)
        ]
        return torch.stack(each)

    def prompt(
        self, tokens: Mapping[str, Tensor], instruction: str | None = None, timing: Timing | None = None
    ) -> Tensor:
        """Embedded prompts ``[B, S, H]`` around the tokens ``[B, U, n, H]`` of stages, by the layout of the mode that
        has these stages. ``OptionError`` where none has."""
        layouts = self.config.prompts.values()
        layout = next((layout for layout in layouts if set(stages_of(layout.pieces)) == set(tokens)), None)
        if layout is None:
            raise OptionError(f"no prompt of a {self.config.family} captioner is of {' and '.join(tokens)}")
        built = build_prompt(
            self.tokenizer,
            choose_pieces(layout, timing),
            instruction if instruction is not None else self.config.default_instruction,
            {name: value.shape[1] for name, value in tokens.items()},
            timing,
            0 if timing is None else len(timing.times),
        )
        clips = len(next(iter(tokens.values())))
        return torch.cat([self._piece(part, tokens).expand(clips, -1, -1) for part in built], dim=1)

    def _piece(self, part: list[int] | Slot, tokens: Mapping[str, Tensor]) -> Tensor:
        """Text ``[1, S, H]`` or a block ``[B, S, H]``."""
        if isinstance(part, Slot):
            value = tokens[part.stage]
            return value.flatten(1, 2) if part.unit is None else value[:, part.unit]
        return self.embedding(torch.tensor(part, dtype=torch.int64)).unsqueeze(0)

    # --- captions

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids ``[B, N]`` with the end of sequence, filled up with ``IGNORED``."""
        ids = [[*self.tokenizer.encode(text, add_special_tokens=False).ids, self.eos] for text in captions]
        return pad(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a caption's tokens."""
        return self.tokenizer.decode([token for token in token_ids if token != self.eos and token >= 0]).strip()

    def logits(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """``[B, N, vocabulary]``: what each token of ``tokens [B, N]`` is predicted from."""
        embeds = torch.cat((prompt, self._given(tokens, prompt)), dim=1)
        asked = torch.arange(prompt.shape[1] - 1, embeds.shape[1])
        return self._decode(embeds, asked, _CAUSAL)

    def log_probs(self, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every token ``[B, N]``, zero where there is none, and the mask ``[B, N]``."""
        return _chosen(self.logits(prompt, tokens), tokens)

    def pair_log_probs(
        self, prompt: Tensor, first: Tensor, second: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``log_probs`` of two captions of each prompt, for the price of one prompt.

        The sequence is prompt, first, second; the second caption's positions begin where the first one's do, and it
        does not see the first.
        """
        pieces = [prompt, self._given(first, prompt), self._given(second, prompt)]
        head, one, two = (piece.shape[1] for piece in pieces)
        positions = torch.cat((torch.arange(head + one), torch.arange(head, head + two)))
        visible = torch.ones(head + one + two, head + one + two, dtype=torch.bool).tril()
        visible[head + one :, head : head + one] = False
        last = torch.tensor([head - 1])
        asked = torch.cat((last, torch.arange(head, head + one), last, torch.arange(head + one, head + one + two)))
        logits = self._decode(torch.cat(pieces, dim=1), asked, TrainingAttention(positions, visible))
        return _chosen(logits[:, : one + 1], first), _chosen(logits[:, one + 1 :], second)

    def _given(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """The embedded tokens that another one follows, ``[B, N - 1, H]``."""
        return self.embedding(tokens.clamp(min=0))[:, :-1].to(prompt.dtype)

    def _decode(self, embeds: Tensor, asked: Tensor, form: TrainingAttention) -> Tensor:
        unused = embeds.new_zeros(())
        past = [(unused, unused)] * self.config.decoder.num_layers
        # Lengths are those of a cache; training has no cache.
        none = torch.zeros((), dtype=torch.int32)
        with attention_module.use(form):
            return self.decoder(embeds, none, none, asked.expand(len(embeds), -1), past)[0]

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int = 96,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """A caption for each prompt, greedy or sampled, with the checkpoint's repetition penalty; ends included."""
        rows, length, _ = prompt.shape
        penalty = self.config.generation.repetition_penalty
        cache = self.decoder.empty_cache(rows, length + max_new_tokens)
        made = torch.full((rows, 0), 0, dtype=torch.int64)
        done = torch.zeros(rows, dtype=torch.bool)
        embeds, filled = prompt, length
        seen = torch.zeros(rows, self.config.decoder.vocab_size, dtype=torch.bool)
        while True:
            lengths = torch.full((rows,), filled - 1, dtype=torch.int32)
            asked = torch.full((rows, 1), embeds.shape[1] - 1)
            logits, cache = self.decoder(embeds, lengths, torch.tensor(filled, dtype=torch.int32), asked, cache)
            scores = logits[:, 0].float()
            if penalty != 1.0:
                scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
            chosen = _choose(scores, temperature, top_p, generator)
            chosen[done] = self.eos
            made = torch.cat((made, chosen.unsqueeze(1)), 1)
            seen[torch.arange(rows), chosen] = True
            done |= chosen == self.eos
            if bool(done.all()) or made.shape[1] == max_new_tokens:
                return [_up_to(ids, self.eos) for ids in made.tolist()]
            embeds, filled = self.embedding(chosen).unsqueeze(1), filled + 1


def _joins(unit: Unit, units: int) -> bool:
    """Whether clips of so many units can follow each other in one run, without that any of them meet."""
    match unit:
        case EachUnit():
            return True
        case OneSound():
            return units == 1
        case Window():
            return unit.padding == 0 and unit.stride == unit.kernel and units % unit.kernel == 0
    return False


def _chosen(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    mask = tokens != IGNORED
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask, mask


def pad(ids: Sequence[Sequence[int]]) -> Tensor:
    """Lists of token ids as ``[B, longest]``, filled up with ``IGNORED``."""
    out = torch.full((len(ids), max(map(len, ids), default=0)), IGNORED, dtype=torch.int64)
    for row, values in enumerate(ids):
        out[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return out


def pixels(frames: npt.NDArray[np.uint8], config: CaptionerConfig) -> Tensor:
    """Frames at the tower's size ``[..., S, S, 3]`` as its input ``[..., 3, S, S]``, float32."""
    mean, std = (torch.tensor(values) for values in (config.image.mean, config.image.std))
    values = (torch.from_numpy(np.array(frames)).float() / 255 - mean) / std
    return values.movedim(-1, -3)


def _choose(scores: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature <= 0:
        return scores.argmax(-1)
    probabilities = (scores / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _up_to(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids
