"""One caption on its way: the passes of the decoder that it takes, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import OptionError
from .bundle import Bundle
from .caption import Caption
from .clip import Clip
from .contrast import Contrast
from .decoding import BeamSearch, Decoding, Request, Search, Segment, Settings, Token, TokenSearch, resolve
from .encoder import EncodedClip, Encoder
from .prepared import PreparedClip
from .text import check_text
from .timing import Stages
from .transcript import FinishReason, Transcript, contains_stop
from .viewing import TokenBudget

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What a task needs of a captioner."""

    bundle: Bundle
    tokenizer: Tokenizer
    encoder: Encoder

    def instruction(self, prompt: str | None) -> str:
        """The instruction that ``prompt`` stands for. ``OptionError`` for one that is no text."""
        return self.bundle.manifest.default_instruction if prompt is None else check_text("prompt", prompt)

    def forced_ids(self, decoding: Decoding) -> list[int]:
        """The tokens of the beginning that a caption must have."""
        return self.tokenizer.encode(decoding.prefix, add_special_tokens=False).ids if decoding.prefix else []

    def check_length(self, clip: Clip, visual_tokens: TokenBudget | None, prompt: str | None, how: Decoding) -> None:
        """``OptionError`` when the prompt and the new tokens do not fit the context. Runs no encoder."""
        self.new_tokens(self.encoder.prompt_length(clip, self.instruction(prompt), visual_tokens), how)

    def new_tokens(self, prompt_tokens: int, how: Decoding) -> int:
        """The limit of new tokens. The checkpoint's own is a wish that the context may cut short; the caller's is an
        order."""
        manifest = self.bundle.manifest
        context, before = manifest.decoder.context_length, prompt_tokens + len(self.forced_ids(how))
        room = context - before
        if room < 1:
            raise OptionError(f"the prompt takes {before} tokens, the context is {context}")
        wanted = resolve(how, manifest.generation, contrast=False).max_new_tokens
        if how.max_new_tokens is not None and wanted > room:
            raise OptionError(
                f"prompt and caption may take {before + wanted} tokens, but the decoder's context is {context}; ask "
                "for fewer new tokens or a shorter prompt"
            )
        return min(wanted, room)


@dataclass(frozen=True)
class _Pass:
    """A pass that is whole."""

    settings: Settings
    transcript: Transcript
    prompt_tokens: int
    tokens_reused: int


def contrast_of(decoding: Decoding, mode: str) -> Contrast | None:
    """The view of a clip of this ``mode`` that a ``decoding`` contrasts with; ``None`` without contrast or pictures."""
    if decoding.contrast is None or mode == "audio":
        return None
    if decoding.contrast == "temporal":
        return Contrast("temporal")
    return Contrast(decoding.contrast, decoding.noise_step, decoding.seed)


class CaptionTask:
    """A clip, an instruction and a ``Decoding``; ``passes`` is its course. It needs no encoder.

    ``other``: the view that ``contrast_of`` names, encoded. ``transcript`` is that of the pass under way, ``is_last``
    whether no other can follow it. ``num_results``: captions that a beam search is to give. ``deadline``: when to stop,
    in the seconds of ``time.perf_counter``. Raises ``OptionError`` when the prompt and the new tokens do not fit the
    context.
    """

    def __init__(
        self,
        model: Model,
        prepared: PreparedClip,
        other: EncodedClip | None,
        prompt: str | None,
        decoding: Decoding,
        stages: Stages,
        num_results: int = 1,
    ) -> None:
        self.stages, self.decoding = stages, decoding
        self._model, self._clip, self._num_results = model, prepared.clip, num_results
        # What it keeps was for the other view.
        encoded = self._encoded = replace(prepared.encoded, kept={})
        self._other = other
        self._instruction = model.instruction(prompt)
        self.deadline: float | None = None
        #: Tokens of the prompt of the pass under way that the cache held already.
        self.tokens_reused = 0
        self._notes = [*encoded.notes]
        self._passes: list[str] = []
        self._draft: str | None = None
        self._whole: _Pass | None = None
        self._contrast = other is not None
        if decoding.contrast is not None and other is None:
            self._notes.append("there are no pictures to contrast with: decoded without contrast")
        self._forced = model.forced_ids(decoding)
        self._settings = resolve(decoding, model.bundle.manifest.generation, contrast=False)
        self._prompt_tokens = sum(map(len, self._prompt_segments(encoded, self._instruction)))
        self.max_new_tokens = model.new_tokens(self._prompt_tokens, decoding)
        #: Tokens that a row must hold for every pass (a retrospective one as far as the context goes).
        self.max_length = self._longest()
        self.transcript = Transcript(model.tokenizer, decoding.stop)
        self.is_last = False
        self.captions: list[Caption] = []

    @property
    def rows(self) -> int:
        """Rows of the cache that the task takes at most."""
        return max(self._settings.rows, 2 if self._contrast else 1)

    def passes(self) -> Iterator[Request]:
        """Requests for the scheduler, the next when the one before is done; ``captions`` then holds the results."""
        how, deferred = self.decoding, self.decoding.confidence is not None
        again = self._contrast or how.retrospective
        self.is_last = not (how.retrospective or (deferred and again))
        yield from self._pass(self._instruction, self._contrast and not deferred, "")
        if deferred and again:
            sure = self._mean_logprob()
            if sure >= (how.confidence or 0.0):
                self._finish()
                return
            self._notes.append(f"mean log-likelihood {sure:.2f} is below {how.confidence:g}: decoded again")
            if self._contrast:
                self._draft, self.is_last = self.transcript.text, not how.retrospective
                yield from self._pass(self._instruction, True, "")
        if how.retrospective:
            instruction = self._retrospective(self.transcript.text)
            room = self._room(instruction)
            if room < 1:
                self._notes.append("no room in the context for a second pass with the first caption in the prompt")
            else:
                self._draft, self.is_last = self.transcript.text, True
                yield from self._pass(instruction, self._contrast, ", retrospective", min(room, self.max_new_tokens))
        self._finish()

    def stop(self, reason: FinishReason) -> None:
        """End the caption with the tokens that there are; without one ``captions`` stays empty.

        A later pass without a token is dropped: the caption is that of the pass before. The caller frees the rows.
        """
        search = self._search
        if isinstance(search, BeamSearch) and any(search.unfinished):
            found = [self._transcribed(tokens, reason) for tokens in search.unfinished]
        elif self.transcript.tokens and not isinstance(search, BeamSearch):
            self.transcript.stop(reason)
            found = [self.transcript]
        elif self._whole is not None:
            whole = self._whole
            self._notes.append(f"stopped before the pass {self._passes.pop()!r} began")
            self._settings, self._prompt_tokens = whole.settings, whole.prompt_tokens
            self.tokens_reused = whole.tokens_reused
            whole.transcript.reason = reason
            self._draft, found = None, [whole.transcript]
        else:
            return
        self.captions = [self._caption(transcript) for transcript in found]

    def _pass(self, instruction: str, contrast: bool, suffix: str, limit: int | None = None) -> Iterator[Request]:
        settings = resolve(self.decoding, self._model.bundle.manifest.generation, contrast)
        self._settings = settings = replace(settings, max_new_tokens=limit or self.max_new_tokens)
        kind = f", {self.decoding.contrast} contrast" if contrast else ""
        self._passes.append(f"{settings.strategy}{kind}{suffix}")
        prompts = [self._prompt_segments(self._encoded, instruction)]
        if contrast:
            assert self._other is not None
            prompts.append(self._prompt_segments(self._other, instruction))
            self._notes.extend(note for note in self._other.notes if note not in self._notes)
        self._prompt_tokens = sum(map(len, prompts[0]))
        self.transcript = Transcript(self._model.tokenizer, self.decoding.stop)
        self._search = self._make_search(settings)
        forced = None if not self._forced else self._model.bundle.embed(np.array(self._forced, np.int64))
        yield Request(prompts, self._search, self._accept, self._forced, forced)
        self.transcript.finish()
        self._whole = _Pass(settings, self.transcript, self._prompt_tokens, self.tokens_reused)

    def _make_search(self, settings: Settings) -> Search:
        if settings.strategy != "beam":
            return TokenSearch(settings)
        stops = self.decoding.stop
        ends = (lambda ids: contains_stop(self._model.tokenizer, stops, [*self._forced, *ids])) if stops else None
        return BeamSearch(settings, self._num_results, ends)

    def _accept(self, token: Token) -> bool:
        self.stages.report("decode", len(self.transcript.tokens) + 1, len(self._forced) + self.max_new_tokens)
        return self.transcript.push(token)

    def _mean_logprob(self) -> float:
        return float(np.mean([token.logprob for token in self.transcript.tokens]))

    def _retrospective(self, caption: str) -> str:
        template = self.decoding.retrospective_template
        # One pass over the template: a caption that spells a place of it is not filled in again.
        head, tail = template.split("{caption}", 1)
        return (
            head.replace("{instruction}", self._instruction)
            + caption
            + tail.replace("{instruction}", self._instruction)
        )

    def _longest(self) -> int:
        length = self._prompt_tokens + len(self._forced) + self.max_new_tokens
        if self.decoding.retrospective:
            around = self._prompt_segments(self._encoded, self._retrospective(""))
            # The first caption in the prompt may take some more tokens than it took to generate.
            caption = len(self._forced) + 2 * self.max_new_tokens
            length += sum(map(len, around)) - self._prompt_tokens + caption
        return min(length, self._model.bundle.manifest.decoder.context_length)

    def _room(self, instruction: str) -> int:
        """New tokens that fit behind a prompt with ``instruction``, in the context and in the rows of the task."""
        length = sum(map(len, self._prompt_segments(self._encoded, instruction))) + len(self._forced)
        return self.max_length - length

    def _prompt_segments(self, encoded: EncodedClip, instruction: str) -> list[Segment]:
        """The prompt in the segments that a cache keeps apart."""
        return [Segment(part) for part in self._model.encoder.prompt_segments(encoded, instruction)]

    def _finish(self) -> None:
        transcripts = [self.transcript]
        if isinstance(self._search, BeamSearch) and self._num_results > 1:
            transcripts = [self._transcribed(tokens) for tokens in self._search.results]
        self.captions = [self._caption(transcript) for transcript in transcripts]

    def _transcribed(self, tokens: Sequence[Token], stopped: FinishReason | None = None) -> Transcript:
        transcript = Transcript(self._model.tokenizer, self.decoding.stop)
        for token in (*self.transcript.tokens[: len(self._forced)], *tokens):
            if transcript.push(token):
                break
        if stopped is None:
            transcript.finish()
        else:
            transcript.stop(stopped)
        return transcript

    def _caption(self, transcript: Transcript) -> Caption:
        notes = [*self._clip.notes, *self._notes]
        _log.info(
            "captioned: %d tokens (%s) of a prompt of %d, %.2f s",
            len(transcript.tokens),
            transcript.reason,
            self._prompt_tokens,
            sum(self.stages.seconds.values()),
        )
        for note in notes:
            _log.warning("substituted: %s", note)
        contrasts = [token.contrast_logprob for token in transcript.tokens]
        return Caption(
            text=transcript.text,
            token_ids=[token.id for token in transcript.tokens],
            token_logprobs=[token.logprob for token in transcript.tokens],
            contrast_logprobs=None if all(value is None for value in contrasts) else contrasts,
            finish_reason=transcript.reason,
            mode=self._encoded.mode,
            prompt_tokens=self._prompt_tokens,
            timings=self.stages.seconds,
            notes=notes,
            seconds=self._clip.seconds,
            start=self._clip.start,
            passes=list(self._passes),
            draft=self._draft,
            prompt_tokens_reused=self.tokens_reused,
            instruction=self._instruction,
            decoding=self._in_effect(),
        )

    def _in_effect(self) -> dict[str, Any]:
        """The settings of the last pass that had a part in it, as JSON has them."""
        how, asked = self._settings, self.decoding
        found: dict[str, Any] = {
            name: getattr(how, name) for name in ("strategy", "max_new_tokens", "repetition_penalty", "no_repeat_ngram")
        }
        if how.strategy == "sample":
            found |= {name: getattr(how, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
        if how.strategy == "beam":
            found |= {"num_beams": how.num_beams, "length_penalty": how.length_penalty}
        if how.contrast is not None:
            found |= {"contrast": asked.contrast, "contrast_alpha": how.contrast[0], "contrast_beta": how.contrast[1]}
            if asked.contrast == "noise":
                found |= {"noise_step": asked.noise_step, "seed": how.seed}
        if asked.stop:
            found["stop"] = list(asked.stop)
        if asked.prefix:
            found["prefix"] = asked.prefix
        return found
