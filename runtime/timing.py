"""Seconds per stage, and word of how far a stage has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: ``(stage, done, total)`` in units of the stage: frames, tokens, files. ``total`` 0: not known.
Progress = Callable[[str, int, int], None]


class Stages:
    """Wall-clock seconds by stage name, in the order in which the stages first ran; repeated stages add up.

    ``progress`` is told when a stage begins and as it goes on.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

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
        if self._progress is not None:
            self._progress(name, done, total)
