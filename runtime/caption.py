"""What a captioner gives: a caption, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np

from .transcript import FinishReason


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and how it came about.

    ``token_ids`` and ``token_logprobs`` (natural log, under the model's own distribution given the whole clip) include
    the end-of-sequence token if one was generated. ``contrast_logprobs``: the same under the combined distribution of a
    contrast (``None`` without one, and in it for the tokens of a forced beginning). ``finish_reason``: ``stop`` (end of
    sequence), ``length``, ``stop_string``, ``deadline`` (its time was over) or ``closed`` (its stream was closed); of
    the last two the text is what was generated until then. ``passes``: how it was decoded, pass by pass, for example
    ``["greedy", "greedy, retrospective"]``; ``draft`` is the text that the last pass replaced. ``timings``: seconds per
    stage; what captions of a batch did together is divided among them. ``notes``: what was substituted for something
    the clip lacks. ``start``: seconds into the source, ``seconds``: how long the clip lasts, ``None`` for images and
    arrays of frames.

    ``prompt_tokens``: text, visual and audio tokens before the first generated one, in the last pass.
    ``prompt_tokens_reused``: how many of them the cache still held from an earlier caption, candidate or pass. They
    were not computed again, so ``timings["prefill"]`` does not contain them (``Captioner.forget``).
    ``instruction``: the one that was asked, the default one where none was given. ``decoding``: the settings of
    ``Decoding`` that were in effect in the last pass, those of the checkpoint filled in.
    """

    text: str
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: FinishReason
    mode: str
    prompt_tokens: int
    timings: dict[str, float]
    notes: list[str]
    seconds: float | None
    start: float = 0.0
    contrast_logprobs: list[float | None] | None = None
    passes: list[str]
    draft: str | None = None
    prompt_tokens_reused: int = 0
    instruction: str = ""
    decoding: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_logprob(self) -> float:
        """Mean token log-likelihood: the confidence that LeanPO uses as its reward (docs/facts.md 3)."""
        return float(np.mean(self.token_logprobs))


class CaptionStream:
    """Pieces of text as they are generated; ``caption`` is there once the iteration has ended.

    Closing the stream (or leaving its ``with`` block) stops the generation and frees its place in the cache.
    ``caption`` is then what was generated so far, with the ``finish_reason`` ``closed``; ``None`` where nothing was.
    Use a stream from one thread at a time.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._first: list[str] = []
        self.caption: Caption | None = None

    def peek(self) -> str:
        """Wait for the next piece without taking it (empty at the end)."""
        if not self._first:
            self._first = [*islice(self._pieces, 1)]
        return "".join(self._first)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._first.pop() if self._first else next(self._pieces)

    def __enter__(self) -> CaptionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
