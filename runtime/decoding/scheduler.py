"""Many captions on the rows of one cache: each step of the decoder serves all that are under way.

A caption that ends frees its rows for the next one at once. Rows keep what they held, so that a prompt that begins like
an earlier one (the text before the video; the same clip with another question; more captions from one prompt) is
copied as far as they agree and only the rest is computed. Prompts are cut into segments for that, and always computed
segment by segment, so that reuse does not change a bit of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...errors import OptionError
from ..inference import FloatArray, Inference
from .scores import Token, log_likelihoods
from .search import Search, Turn, step


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a prompt, ``embeds`` ``[S, H]``; known again by its content."""

    embeds: FloatArray

    @cached_property
    def key(self) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(self.embeds).data, digest_size=16).digest()

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass(frozen=True, eq=False)
class Request:
    """A caption to generate.

    ``prompts``: one for each stream of ``search``, in segments. ``accept`` hears each token as it becomes certain and
    ends the caption by returning True. ``forced``: tokens that the caption begins with, and their embeddings.
    """

    prompts: Sequence[Sequence[Segment]]
    search: Search
    accept: Callable[[Token], bool]
    forced: Sequence[int] = ()
    forced_embeds: FloatArray | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt, the forced ones included."""
        return max(sum(map(len, prompt)) for prompt in self.prompts) + len(self.forced)


@dataclass(eq=False)
class Ticket:
    """A request that is under way on ``rows``; ``done`` once its caption is complete or cancelled.

    ``reused``: tokens of its first prompt that the cache held already, so that they were not computed again.
    """

    request: Request
    rows: list[int]
    reused: int = 0
    turn: Turn = field(default_factory=lambda: Turn(()))
    done: bool = False


@dataclass(eq=False)
class _Row:
    """What a row of the cache begins with: segments by key and length, and the logits after the last of them."""

    segments: list[tuple[bytes, int]] = field(default_factory=list)
    logits: FloatArray | None = None
    ticket: Ticket | None = None


class Scheduler:
    """Gives captions rows of one ``Inference`` and steps them together."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self._rows = [_Row() for _ in range(inference.rows)]
        self._tickets: list[Ticket] = []

    @property
    def free_rows(self) -> int:
        """Rows that no caption holds."""
        return sum(row.ticket is None for row in self._rows)

    @property
    def idle(self) -> bool:
        """Whether no caption is under way."""
        return not self._tickets

    def admit(self, request: Request, progress: Callable[[int], None] | None = None) -> Ticket:
        """Compute a request's prompts on free rows and its first token. ``progress`` hears of prompt tokens done.

        ``OptionError`` when the rows do not suffice or are too short; nothing is then taken.
        """
        search = request.search
        if search.rows > self.free_rows:
            raise OptionError(f"a caption of this kind takes {search.rows} rows, {self.free_rows} are free")
        if request.prompt_length > self.inference.max_length:
            raise OptionError(f"the prompt takes {request.prompt_length} tokens, a row {self.inference.max_length}")
        ticket = Ticket(request, [])
        try:
            logits = [self._prefill(prompt, ticket, progress) for prompt in request.prompts]
            first = ticket.rows[0]
            while len(ticket.rows) < search.rows:
                ticket.rows.append(self._take(ticket, self._best_free(self._rows[first].segments)))
            forced = self._force(request, ticket, logits)
            if search.rows > search.streams:
                self.inference.rearrange(dict.fromkeys(ticket.rows[search.streams :], first))
                for row in ticket.rows[search.streams :]:
                    self._rows[row].segments = list(self._rows[first].segments)
                    self._rows[row].logits = self._rows[first].logits
        except BaseException:
            self._release(ticket)
            raise
        self._tickets.append(ticket)
        if any(request.accept(token) for token in forced):
            self.cancel(ticket)
        else:
            self._take_turn(ticket, search.start(logits, request.forced))
        return ticket

    def forget(self) -> None:
        """Forget what free rows hold: the next prompts are computed whole. The memory is kept."""
        for row in self._rows:
            if row.ticket is None:
                row.segments, row.logits = [], None

    def step(self) -> None:
        """One token for every caption under way."""
        self._close_gaps()
        held = [row.ticket for row in self._rows if row.ticket is not None]
        token_ids = np.zeros(len(held), np.int64)
        for ticket in self._tickets:
            token_ids[ticket.rows] = ticket.turn.next_ids
        tickets = list(self._tickets)
        turns = step(self.inference, token_ids, [(ticket.request.search, ticket.rows) for ticket in tickets])
        for ticket, turn in zip(tickets, turns, strict=True):
            self._take_turn(ticket, turn)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a caption; its rows are free at once."""
        if not ticket.done:
            self._release(ticket)

    def _take_turn(self, ticket: Ticket, turn: Turn) -> None:
        for token in turn.tokens:
            if ticket.request.accept(token):
                self._release(ticket)
                return
        if not len(turn.next_ids):
            self._release(ticket)
            return
        if turn.sources is not None:
            moves = {row: ticket.rows[source] for row, source in zip(ticket.rows, turn.sources, strict=True)}
            self.inference.rearrange(moves, start=ticket.request.prompt_length)
        ticket.turn = turn

    def _prefill(self, prompt: Sequence[Segment], ticket: Ticket, progress: Callable[[int], None] | None) -> FloatArray:
        """Put the prompt on a free row, which the ticket then owns; logits ``[V]`` after its last token."""
        keys = [(segment.key, len(segment)) for segment in prompt]
        number = self._take(ticket, self._best_free(keys))
        ticket.rows.append(number)
        row, own = self._rows[number], _shared(self._rows[number].segments, keys)
        # A row that agrees further than this one; of equals this one, then the first.
        source = max(range(len(self._rows)), key=lambda i: (_shared(self._rows[i].segments, keys), i == number, -i))
        shared = _shared(self._rows[source].segments, keys)
        logits = self._rows[source].logits if shared == len(keys) == len(self._rows[source].segments) else None
        if shared == len(keys) and logits is None:
            # The other prompt went on after this one's end: its last segment is computed again for the logits.
            shared -= 1
        own = min(own, shared)
        tokens = sum(length for _, length in keys[:shared])
        row.segments, row.logits = [], None
        if len(ticket.rows) == 1:
            ticket.reused = tokens
        if shared > own:
            self.inference.rearrange({number: source}, start=sum(length for _, length in keys[:own]), stop=tokens)
        self.inference.truncate(number, tokens)
        for segment in prompt[shared:]:
            heard = None if progress is None else (lambda n, before=tokens: progress(before + n))
            logits = self.inference.prefill(number, segment.embeds, progress=heard)[0].copy()
            tokens += len(segment)
        row.segments, row.logits = keys, logits
        assert logits is not None
        return logits

    def _force(self, request: Request, ticket: Ticket, logits: list[FloatArray]) -> list[Token]:
        """The forced tokens after each prompt, with their log-likelihoods; ``logits`` become those after them."""
        if not len(request.forced):
            return []
        assert request.forced_embeds is not None
        count = len(request.forced)
        logprobs: list[float] = []
        for stream, row in enumerate(ticket.rows[: len(logits)]):
            after = self.inference.prefill(row, request.forced_embeds, num_logits=count)
            if stream == 0:
                logprobs = log_likelihoods(np.stack([logits[0], *after[:-1]]), request.forced)
            logits[stream] = after[-1].copy()
        return [Token(token, logprob, False) for token, logprob in zip(request.forced, logprobs, strict=True)]

    def _best_free(self, keys: Sequence[tuple[bytes, int]]) -> int:
        """The free row that agrees furthest with a prompt; of equals the one that loses the least, then the first."""
        free = [number for number, row in enumerate(self._rows) if row.ticket is None]

        def fitness(number: int) -> tuple[int, int, int]:
            segments = self._rows[number].segments
            return _shared(segments, keys), -len(segments), -number

        return max(free, key=fitness)

    def _take(self, ticket: Ticket, number: int) -> int:
        self._rows[number].ticket = ticket
        return number

    def _release(self, ticket: Ticket) -> None:
        ticket.done = True
        for row in self._rows:
            if row.ticket is ticket:
                row.ticket = None
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def _close_gaps(self) -> None:
        """Move captions down into free rows, so that a step takes in the first rows and no others."""
        held = [number for number, row in enumerate(self._rows) if row.ticket is not None]
        gaps = [number for number in range(len(held)) if self._rows[number].ticket is None]
        moves = dict(zip(gaps, reversed(held), strict=False))
        if not moves:
            return
        self.inference.rearrange(moves)
        for gap, number in moves.items():
            ticket = self._rows[number].ticket
            assert ticket is not None
            ticket.rows[ticket.rows.index(number)] = gap
            self._rows[gap] = _Row(list(self._rows[number].segments), self._rows[number].logits, ticket)
            self._rows[number].ticket = None


def _shared(segments: Sequence[tuple[bytes, int]], keys: Sequence[tuple[bytes, int]]) -> int:
    """How many segments two prompts have in common from their beginning."""
    count = 0
    for mine, theirs in zip(segments, keys, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
