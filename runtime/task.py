"""One caption on its way: the passes of the decoder that it takes, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from ..errors import OptionError
from .bundle import Bundle
from .caption import Caption
from .clip import Clip
from .contrast import Contrast
from .decoding import BeamSearch, Decoding, Request, Search, Segment, Settings, Token, TokenSearch, resolve
from .encoder import EncodedClip, Encoder
from .inference import FloatArray
from .timing import Stages
from .transcript import Transcript, contains_stop


@dataclass(frozen=True)
class Model:
    """What a task needs of a captioner."""

    bundle: Bundle
    tokenizer: Tokenizer
    encoder: Encoder


class CaptionTask:
    """A clip, an instruction and a ``Decoding``; ``passes`` is its course.

    ``transcript`` is that of the pass under way, ``is_last`` whether no other can follow it. ``num_results``: captions
    that a beam search is to give. Raises ``OptionError`` when the prompt and the new tokens do not fit the context.
    """

    def __init__(
        self,
        model: Model,
        encoded: EncodedClip,
        prompt: str | None,
        decoding: Decoding,
        stages: Stages,
        clip: Clip,
        num_results: int = 1,
    ) -> None:
        self.stages, self.decoding = stages, decoding
        self._model, self._encoded, self._clip, self._num_results = model, encoded, clip, num_results
        self._instruction = model.bundle.manifest.default_instruction if prompt is None else prompt
        self._notes = [*encoded.notes]
        self._passes: list[str] = []
        self._contrast = decoding.contrast is not None
        if self._contrast and clip.frames is None:
            self._contrast = False
            self._notes.append("there are no pictures to contrast with: decoded without contrast")
        self._forced = model.tokenizer.encode(decoding.prefix, add_special_tokens=False).ids if decoding.prefix else []
        self._settings = resolve(decoding, model.bundle.manifest.generation, contrast=False)
        self._other: EncodedClip | None = None
        self._prompt_tokens = sum(map(len, self._prompt_segments(encoded, self._instruction)))
        self.max_new_tokens = self._fit(self._prompt_tokens)
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
        draft: str | None = None
        if deferred and again:
            sure = self._mean_logprob()
            if sure >= (how.confidence or 0.0):
                self._finish(draft)
                return
            self._notes.append(f"mean log-likelihood {sure:.2f} is below {how.confidence:g}: decoded again")
            if self._contrast:
                draft, self.is_last = self.transcript.text, not how.retrospective
                yield from self._pass(self._instruction, True, "")
        if how.retrospective:
            instruction = self._retrospective(self.transcript.text)
            room = self._room(instruction)
            if room < 1:
                self._notes.append("no room in the context for a second pass with the first caption in the prompt")
            else:
                draft, self.is_last = self.transcript.text, True
                yield from self._pass(instruction, self._contrast, ", retrospective", min(room, self.max_new_tokens))
        self._finish(draft)

    def _pass(self, instruction: str, contrast: bool, suffix: str, limit: int | None = None) -> Iterator[Request]:
        settings = resolve(self.decoding, self._model.bundle.manifest.generation, contrast)
        settings = replace(settings, max_new_tokens=limit or self.max_new_tokens)
        kind = f", {self.decoding.contrast} contrast" if contrast else ""
        self._passes.append(f"{settings.strategy}{kind}{suffix}")
        prompts = [self._prompt_segments(self._encoded, instruction)]
        if contrast:
            prompts.append(self._prompt_segments(self._contrasted(), instruction))
        self._prompt_tokens = sum(map(len, prompts[0]))
        self.transcript = Transcript(self._model.tokenizer, self.decoding.stop)
        self._search = self._make_search(settings)
        forced = None if not self._forced else self._model.bundle.embed(np.array(self._forced, np.int64))
        yield Request(prompts, self._search, self._accept, self._forced, forced)
        self.transcript.finish()

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

    def _contrasted(self) -> EncodedClip:
        if self._other is None:
            how = self.decoding
            assert how.contrast is not None
            view = Contrast(how.contrast, how.noise_step, how.seed)
            self._other = self._model.encoder.contrast(self._clip, self._encoded, view, self.stages)
        return self._other

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

    def _fit(self, prompt_tokens: int) -> int:
        """The limit of new tokens. The checkpoint's own is a wish that the context may cut short; the caller's is an
        order."""
        context = self._model.bundle.manifest.decoder.context_length
        room = context - prompt_tokens - len(self._forced)
        if room < 1:
            raise OptionError(f"the prompt takes {prompt_tokens + len(self._forced)} tokens, the context is {context}")
        wanted = self._settings.max_new_tokens
        if self.decoding.max_new_tokens is not None and wanted > room:
            raise OptionError(
                f"prompt and caption may take {prompt_tokens + len(self._forced) + wanted} tokens, but the decoder's "
                f"context is {context}; ask for fewer new tokens or a shorter prompt"
            )
        return min(wanted, room)

    def _prompt_segments(self, encoded: EncodedClip, instruction: str) -> list[Segment]:
        """The text before the clip, the clip with what separates its blocks, and the text after it."""
        pieces = [self._embedded(piece) for piece in self._model.encoder.prompt_pieces(encoded, instruction)]
        parts = [pieces[:1], pieces[1:-1], pieces[-1:]]
        joined = [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]
        return [Segment(part) for part in joined if len(part)]

    def _embedded(self, piece: FloatArray | Sequence[int]) -> FloatArray:
        return piece if isinstance(piece, np.ndarray) else self._model.bundle.embed(np.array(piece, np.int64))

    def _finish(self, draft: str | None) -> None:
        transcripts = [self.transcript]
        if isinstance(self._search, BeamSearch) and self._num_results > 1:
            transcripts = [self._transcribed(tokens) for tokens in self._search.results]
        self.captions = [self._caption(transcript, draft) for transcript in transcripts]

    def _transcribed(self, tokens: Sequence[Token]) -> Transcript:
        transcript = Transcript(self._model.tokenizer, self.decoding.stop)
        for token in (*self.transcript.tokens[: len(self._forced)], *tokens):
            if transcript.push(token):
                break
        transcript.finish()
        return transcript

    def _caption(self, transcript: Transcript, draft: str | None) -> Caption:
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
            notes=[*self._clip.notes, *self._notes],
            seconds=self._clip.seconds,
            start=self._clip.start,
            passes=list(self._passes),
            draft=draft,
        )
