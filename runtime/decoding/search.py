"""Decoding strategies as state machines: logits in, the next token of each row out.

They do not run the decoder, so that the captions of a batch, each with a strategy and a state of its own, can share
its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..inference import Choice, FloatArray, Inference, Shortlist
from .options import Settings
from .scores import Combination, LogNormalizer, Token, chooser, log_beta, processed, shortlisted


@dataclass(frozen=True)
class Turn:
    """What a strategy makes of one set of logits.

    ``next_ids``: the token that each row takes in next; empty when the caption is complete. ``sources``: row i first
    becomes a copy of row ``sources[i]`` (``None``: they stay). ``tokens``: those that are certain from now on.
    """

    next_ids: Sequence[int]
    tokens: Sequence[Token] = ()
    sources: Sequence[int] | None = None


class Search(Protocol):
    """One caption being generated, on ``rows`` rows of a cache from ``streams`` prompts."""

    streams: int
    rows: int

    def start(self, logits: Sequence[FloatArray], forced: Sequence[int] = ()) -> Turn:
        """``logits [V]`` after each prompt; ``forced``: tokens of the caption that the prompts end with."""
        ...

    def advance(self, logits: Sequence[FloatArray]) -> Turn:
        """``logits [V]`` of each row after its token of the last turn. The arrays are only lent."""
        ...

    def choices(self, rows: Sequence[int], size: int) -> list[Choice]:
        """What shortlists of ``size`` tokens are to be made of for the next turn, whose rows are these; none for a
        strategy that has to see all logits."""
        ...

    def advance_shortlists(self, shortlists: Sequence[Shortlist]) -> Turn:
        """``advance`` on the shortlists of ``choices``: the same turn."""
        ...


@dataclass
class TokenSearch:
    """Greedy and sampled decoding, of one stream or of two in contrast: a token at a time."""

    settings: Settings
    _seen: list[int] = field(default_factory=list)
    _made: int = 0

    def __post_init__(self) -> None:
        self.streams = self.rows = self.settings.streams
        self._choose = chooser(self.settings)
        self._normalize = LogNormalizer()
        self._combine = None if self.settings.contrast is None else Combination(*self.settings.contrast)

    def start(self, logits: Sequence[FloatArray], forced: Sequence[int] = ()) -> Turn:
        self._seen = list(forced)
        return self.advance(logits)

    def advance(self, logits: Sequence[FloatArray]) -> Turn:
        full = logits[0]
        scores = full if self._combine is None else self._combine(full, logits[1])
        with processed(scores, self._seen, self.settings):
            chosen = self._choose(scores)
        combined = None if self._combine is None else float(scores[chosen]) - self._normalize(scores)
        return self._turn(chosen, float(full[chosen]) - self._normalize(full), combined)

    def choices(self, rows: Sequence[int], size: int) -> list[Choice]:
        how = self.settings
        # A penalty below 1 raises tokens from anywhere; sampling from more than the list holds would never do.
        if how.repetition_penalty < 1 or (how.strategy == "sample" and not 0 < how.top_k <= size // 2):
            return []
        if how.contrast is None:
            return [Choice(rows[0])]
        return [Choice(rows[0], rows[1], how.contrast[0], log_beta(how.contrast[1]))]

    def advance_shortlists(self, shortlists: Sequence[Shortlist]) -> Turn:
        (shortlist,) = shortlists
        wanted = self.settings.top_k if self.settings.strategy == "sample" else 1
        found = shortlisted(shortlist, self._seen, self.settings, wanted)
        if found is None:
            return self.advance(shortlist.fetch())
        order, scores = found
        place = order[self._choose(scores)]
        combined = None if self._combine is None else float(shortlist.scores[place]) - shortlist.score_normalizer
        return self._turn(int(shortlist.ids[place]), float(shortlist.logits[place]) - shortlist.normalizer, combined)

    def _turn(self, chosen: int, logprob: float, combined: float | None) -> Turn:
        is_eos = chosen in self.settings.eos_token_ids
        token = Token(chosen, logprob, is_eos, combined)
        self._seen.append(chosen)
        self._made += 1
        done = is_eos or self._made == self.settings.max_new_tokens
        return Turn((), (token,)) if done else Turn([chosen] * self.rows, (token,))


def step(
    inference: Inference, token_ids: npt.NDArray[np.int64], searches: Sequence[tuple[Search, Sequence[int]]]
) -> list[Turn]:
    """One step of the decoder and the turn that each strategy, with its rows, makes of it; by shortlists, if there are
    such and all can do with one."""
    size = inference.shortlist_size
    choices = [search.choices(rows, size) for search, rows in searches] if size else []
    if not choices or not all(choices):
        logits = inference.step(token_ids)
        return [search.advance([logits[row] for row in rows]) for search, rows in searches]
    shortlists = iter(inference.step_shortlist(token_ids, [choice for each in choices for choice in each]))
    return [
        search.advance_shortlists([next(shortlists) for _ in asked])
        for (search, _), asked in zip(searches, choices, strict=True)
    ]


def generate(inference: Inference, logits: FloatArray, search: Search) -> Iterator[Token]:
    """One caption on the rows of ``inference``, without a scheduler: the first ``streams`` rows hold the prompts.

    ``logits`` ``[V]`` after the prompt of row 0 (``[streams, V]`` for a contrast). Tokens come as they are certain; the
    last one is an end-of-sequence token or number ``max_new_tokens``. Stop the iterator to cancel.
    """
    turn = search.start(list(np.atleast_2d(logits)))
    if search.rows > search.streams:
        inference.rearrange(dict.fromkeys(range(1, search.rows), 0))
    while True:
        yield from turn.tokens
        if not len(turn.next_ids):
            return
        if turn.sources is not None:
            inference.rearrange(dict(enumerate(turn.sources)))
        turn = step(inference, np.asarray(turn.next_ids), [(search, range(search.rows))])[0]
