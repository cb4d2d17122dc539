"""Seconds per stage, and word of how far a stage has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

from ..errors import DeadlineError, OptionError

#: ``(stage, done, total)`` in units of the stage: frames, tokens, files. ``total`` 0: not known.
Progress = Callable[[str, int, int], None]

#: A caption whose time is over in one of these keeps the tokens that it has.
_DECODER_STAGES = ("prefill", "decode")


def deadline_at(seconds: float | None) -> float | None:
    """A deadline so many seconds from now, as ``time.perf_counter`` counts. ``OptionError`` for no time to come."""
    return None if seconds is None else time.perf_counter() + checked_limit("deadline", seconds)


def checked_limit(name: str, seconds: float, most: float = threading.TIMEOUT_MAX) -> float:
    """Seconds that something may take; ``most``: as long as a timer can wait. ``OptionError`` for any other value."""
    number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    if not (number and 0 < seconds <= most):
        raise OptionError(f"{name} is seconds above 0 and at most {most:.0f}, not {seconds!r}")
    return float(seconds)


class Stages:
    """Wall-clock seconds by stage name, in the order in which the stages first ran; repeated stages add up.

    ``progress`` is told when a stage begins and as it goes on. ``deadline``, in the seconds of ``time.perf_counter``:
    stages before the decoder's raise ``DeadlineError`` when they begin, or go on, after it.
    """

    def __init__(self, progress: Progress | None = None, deadline: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._deadline = progress, deadline

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.report(name, 0, 0)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere: the share of a step that many captions took together."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def report(self, name: str, done: int, total: int) -> None:
        late = self._deadline is not None and name not in _DECODER_STAGES
        if late and time.perf_counter() >= (self._deadline or 0.0):
            raise DeadlineError(f"the deadline passed before the first token, at the stage '{name}'")
        if self._progress is not None:
            self._progress(name, done, total)
