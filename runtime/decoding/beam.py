"""Beam search, with the bookkeeping of transformers 5 (``GenerationMixin._beam_search``, early stopping off)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..inference import Choice, FloatArray, Shortlist
from .options import Settings
from .scores import LogNormalizer, Token, processed, shortlisted
from .search import Turn

_Candidate = tuple[float, int, int, float]
"""Score of the whole, beam that is continued, token, its log-likelihood."""


@dataclass(frozen=True)
class Hypothesis:
    """A beginning of a caption. ``score``: sum of the processed log-likelihoods of its tokens."""

    tokens: tuple[Token, ...] = ()
    score: float = 0.0


class BeamSearch:
    """The ``num_beams`` best continuations side by side; each takes a row.

    A hypothesis ends with an end-of-sequence token, at ``max_new_tokens``, or when ``ends`` says so of its token ids
    (stop texts). Ended ones compete by ``score / length ** length_penalty``, and the search ends when none that still
    runs can do better now. Repetition penalty and n-gram ban work on log-likelihoods, as in transformers.
    """

    streams = 1

    def __init__(
        self, settings: Settings, num_results: int = 1, ends: Callable[[Sequence[int]], bool] | None = None
    ) -> None:
        self.rows = settings.num_beams
        self._settings, self._num_results, self._ends = settings, num_results, ends
        # So many that at least num_beams of them go on, were all end-of-sequence tokens among them.
        self._num_candidates = max(2, 1 + len(settings.eos_token_ids)) * settings.num_beams
        self._running = [Hypothesis()]
        self._ended: list[tuple[float, Hypothesis]] = []
        self._forced: list[int] = []
        self._normalize = LogNormalizer()

    @property
    def results(self) -> list[tuple[Token, ...]]:
        """The ``num_results`` best captions that have ended, best first."""
        return [hypothesis.tokens for _, hypothesis in self._ended[: self._num_results]]

    @property
    def unfinished(self) -> list[tuple[Token, ...]]:
        """The ``num_results`` best captions if the search is broken off now: those that have ended, then those that
        still run."""
        return [*self.results, *(hypothesis.tokens for hypothesis in self._running)][: self._num_results]

    def start(self, logits: Sequence[FloatArray], forced: Sequence[int] = ()) -> Turn:
        self._forced = list(forced)
        return self.advance(logits)

    def advance(self, logits: Sequence[FloatArray]) -> Turn:
        found: list[_Candidate] = []
        for beam, row in enumerate(logits[: len(self._running)]):
            scores = row - np.float32(self._normalize(row))
            with processed(scores, self._seen(beam), self._settings):
                count = min(self._num_candidates, len(scores))
                best = np.argpartition(-scores, count - 1)[:count]
                picked = scores[best]
            found += self._continued(beam, best, picked, scores[best])
        return self._turn(found)

    def _turn(self, found: list[_Candidate]) -> Turn:
        candidates = self._best(found)
        length = len(self._running[0].tokens) + 1
        running: list[Hypothesis] = []
        sources: list[int] = []
        for rank, (beam, hypothesis) in enumerate(candidates):
            if self._has_ended(hypothesis, length):
                if rank < self.rows:
                    self._ended.append((hypothesis.score / length**self._settings.length_penalty, hypothesis))
            elif len(running) < self.rows:
                running.append(hypothesis)
                sources.append(beam)
        self._ended.sort(key=lambda ended: -ended[0])
        del self._ended[self.rows :]
        if not running or self._cannot_improve(running[0], length):
            return Turn((), self.results[0] if self._ended else ())
        self._running = running
        # Rows without a hypothesis of their own follow the first.
        spare = self.rows - len(running)
        next_ids = [hypothesis.tokens[-1].id for hypothesis in running] + [running[0].tokens[-1].id] * spare
        return Turn(next_ids, sources=sources + [sources[0]] * spare)

    def choices(self, rows: Sequence[int], size: int) -> list[Choice]:
        if self._settings.repetition_penalty < 1 or self._num_candidates > size // 2:
            return []
        return [Choice(row) for row in rows[: len(self._running)]]

    def advance_shortlists(self, shortlists: Sequence[Shortlist]) -> Turn:
        found: list[_Candidate] = []
        for beam, shortlist in enumerate(shortlists):
            seen = self._seen(beam)
            kept = shortlisted(shortlist, seen, self._settings, self._num_candidates, shortlist.normalizer)
            if kept is None:
                return self.advance([row for each in shortlists for row in each.fetch()])
            order, scores = kept
            best = np.argpartition(-scores, self._num_candidates - 1)[: self._num_candidates]
            logits = shortlist.logits[order] - np.float32(shortlist.normalizer)
            found += self._continued(beam, shortlist.ids[order][best], scores[best], logits[best])
        return self._turn(found)

    def _seen(self, beam: int) -> list[int]:
        return self._forced + [token.id for token in self._running[beam].tokens]

    def _continued(
        self, beam: int, ids: npt.NDArray[np.integer], scores: FloatArray, logprobs: FloatArray
    ) -> list[_Candidate]:
        """A hypothesis with each of these tokens, by its processed score and the model's own log-likelihood of it."""
        score = self._running[beam].score
        return [
            (score + float(each), beam, int(token), float(logprob))
            for token, each, logprob in zip(ids, scores, logprobs, strict=True)
        ]

    def _best(self, found: list[_Candidate]) -> list[tuple[int, Hypothesis]]:
        """The best continuations of all hypotheses, best first, each with the number of the one it continues."""
        found.sort(key=lambda candidate: (-candidate[0], candidate[1], candidate[2]))
        eos = self._settings.eos_token_ids
        return [
            (beam, Hypothesis((*self._running[beam].tokens, Token(token, logprob, token in eos)), score))
            for score, beam, token, logprob in found[: self._num_candidates]
        ]

    def _has_ended(self, hypothesis: Hypothesis, length: int) -> bool:
        if hypothesis.tokens[-1].is_eos or length == self._settings.max_new_tokens:
            return True
        return self._ends is not None and self._ends([token.id for token in hypothesis.tokens])

    def _cannot_improve(self, best: Hypothesis, length: int) -> bool:
        if len(self._ended) < self.rows:
            return False
        return best.score / length**self._settings.length_penalty <= self._ended[-1][0]
