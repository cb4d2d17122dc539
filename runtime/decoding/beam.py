"""Beam search, with the bookkeeping of transformers 5 (``GenerationMixin._beam_search``, early stopping off)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..inference import Choice, FloatArray, Shortlist
from .options import Settings
from .scores import LogNormalizer, Token, processed
from .search import Turn


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

    def start(self, logits: Sequence[FloatArray], forced: Sequence[int] = ()) -> Turn:
        self._forced = list(forced)
        return self.advance(logits)

    def advance(self, logits: Sequence[FloatArray]) -> Turn:
        candidates = self._candidates(logits[: len(self._running)])
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

    def choice(self, rows: Sequence[int], size: int) -> Choice | None:
        return None

    def advance_shortlist(self, shortlist: Shortlist) -> Turn:
        return self.advance(shortlist.fetch())

    def _candidates(self, logits: Sequence[FloatArray]) -> list[tuple[int, Hypothesis]]:
        """The best continuations of all hypotheses, best first, each with the number of the one it continues."""
        found: list[tuple[float, int, int, float]] = []
        for beam, (hypothesis, row) in enumerate(zip(self._running, logits, strict=True)):
            scores = row - np.float32(self._normalize(row))
            seen = self._forced + [token.id for token in hypothesis.tokens]
            with processed(scores, seen, self._settings):
                count = min(self._num_candidates, len(scores))
                best = np.argpartition(-scores, count - 1)[:count]
                picked = scores[best]
            found += [
                (hypothesis.score + float(score), beam, int(token), float(scores[token]))
                for token, score in zip(best, picked, strict=True)
            ]
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
