"""Runs caption tasks on a scheduler: admits their requests as rows come free, and steps them together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from functools import partial

from .decoding import Request, Scheduler, Ticket
from .task import CaptionTask
from .transcript import FinishReason


class Runner:
    """Tasks on their way through one scheduler. A pass that finds no free rows waits, before any new task."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._waiting: deque[tuple[CaptionTask, Iterator[Request], Request]] = deque()
        self._active: dict[Ticket, tuple[CaptionTask, Iterator[Request]]] = {}

    @property
    def idle(self) -> bool:
        """Whether no task is on its way."""
        return not self._waiting and not self._active

    def has_room(self, rows: int) -> bool:
        """Whether a task of so many rows could start at once."""
        return not self._waiting and self.scheduler.free_rows >= rows

    def add(self, task: CaptionTask) -> None:
        """Start a task; ``step`` gives it back when its captions are there."""
        self._next_pass(task, task.passes())

    def step(self) -> list[CaptionTask]:
        """Admit what fits and generate one token for every active caption; the tasks that are complete.

        A task whose deadline has passed is complete with what it has: its ``captions`` may be empty.
        """
        complete = self._stop_overdue()
        self._admit()
        if any(not ticket.done for ticket in self._active):
            started = time.perf_counter()
            self.scheduler.step()
            share = (time.perf_counter() - started) / len(self._active)
            for task, _ in self._active.values():
                task.stages.add("decode", share)
        for ticket in [ticket for ticket in self._active if ticket.done]:
            task, passes = self._active.pop(ticket)
            if not self._next_pass(task, passes):
                complete.append(task)
        return complete

    def stop(self, task: CaptionTask, reason: FinishReason) -> None:
        """Stop a task and let it make a caption of the tokens that it has."""
        self.cancel(task)
        task.stop(reason)

    def cancel(self, task: CaptionTask) -> None:
        """Stop a task; its rows are free at once."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not task)
        for ticket in [ticket for ticket, entry in self._active.items() if entry[0] is task]:
            self.scheduler.cancel(ticket)
            del self._active[ticket]

    def _stop_overdue(self) -> list[CaptionTask]:
        under_way = [*(task for task, _ in self._active.values()), *(entry[0] for entry in self._waiting)]
        timed = [task for task in under_way if task.deadline is not None]
        now = time.perf_counter() if timed else 0.0
        overdue = [task for task in timed if task.deadline is not None and now >= task.deadline]
        for task in overdue:
            self.stop(task, "deadline")
        return overdue

    def _next_pass(self, task: CaptionTask, passes: Iterator[Request]) -> bool:
        request = next(passes, None)
        if request is not None:
            self._waiting.append((task, passes, request))
        return request is not None

    def _admit(self) -> None:
        while self._waiting and self.scheduler.free_rows >= self._waiting[0][2].search.rows:
            task, passes, request = self._waiting.popleft()
            with task.stages.measure("prefill"):
                report = partial(task.stages.report, "prefill", total=request.prompt_length)
                ticket = self.scheduler.admit(request, report)
            task.tokens_reused = ticket.reused
            self._active[ticket] = (task, passes)
