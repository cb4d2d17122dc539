"""Many clips through one captioner: reading ahead in threads, encoding, and decoding with continuous batching."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from ..errors import BundleError, IntertitleError, ItemError, TargetError, TransientMediaError
from .caption import Caption
from .clip import Clip
from .decoding import Scheduler
from .media.doors import reason
from .runner import Runner
from .task import CaptionTask
from .timing import Stages
from .viewing import Viewing

#: Clips that are read ahead of the encoder, beside the one it works on.
READ_AHEAD = 2


@dataclass(frozen=True)
class BatchItem:
    """A source to caption: a file or folder, the instruction (``None``: the default one), a span in seconds."""

    source: str | os.PathLike[str]
    prompt: str | None = None
    start: float | None = None
    end: float | None = None

    def viewing(self, common: Viewing) -> Viewing:
        """How it is viewed in a batch: its own span, where it has one, in place of the batch's.

        ``OptionError`` for a span that cannot be.
        """
        return common if self.start is self.end is None else replace(common, start=self.start, end=self.end)


@dataclass(frozen=True)
class BatchResult:
    """What became of the item at place ``index`` of the input: a caption, or the error that took its place."""

    index: int
    item: BatchItem
    caption: Caption | None = None
    error: IntertitleError | None = None


@dataclass(frozen=True)
class Pipeline:
    """The steps of one captioner that a batch goes through.

    ``read``: from an item to its clip, in a thread. ``task``: from a clip to a task, encoding it. ``open``: a scheduler
    whose rows hold so many tokens at least; ``OptionError``, which ends the batch, where the memory does not suffice
    for one caption. ``stop``: ends the reads that are under way. ``alone``: encoders and decoder are never loaded
    together, so that a clip is encoded only when no caption is being generated.
    """

    read: Callable[[BatchItem, Stages], Clip]
    task: Callable[[BatchItem, Clip, Stages], CaptionTask]
    open: Callable[[int], Scheduler]
    stop: Callable[[], None] = lambda: None
    alone: bool = False


def run_batch(pipeline: Pipeline, items: Iterable[BatchItem]) -> Iterator[BatchResult]:
    """Results in the order in which they are complete; ``items`` are taken as they are needed, in this thread.

    Whatever an item raises is its result: an ``IntertitleError`` as it is, anything else as an ``ItemError``. Only a
    ``BundleError`` and a ``TargetError`` end the batch, since no item is at fault. Where a decode step of several
    captions fails, each of them is tried again alone. At most ``READ_AHEAD`` clips wait beside those whose captions are
    being generated. Close the iterator to stop: what is under way is dropped.
    """
    return _Batch(pipeline, items).run()


def as_item_error(error: Exception, source: str | os.PathLike[str]) -> IntertitleError:
    """What was raised for a file as one of our errors, with the original as its cause."""
    if isinstance(error, IntertitleError):
        return error
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    if isinstance(error, MemoryError):
        made: IntertitleError = TransientMediaError(f"{name}: there is not enough memory for it")
    else:
        made = ItemError(f"{name}: {reason(error)}")
    made.__cause__ = error
    return made


class _Batch:
    def __init__(self, pipeline: Pipeline, items: Iterable[BatchItem]) -> None:
        self._pipeline, self._items = pipeline, iter(enumerate(items))
        self._reading: dict[Future[Clip], tuple[int, BatchItem, Stages]] = {}
        self._exhausted = False
        self._executor = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="intertitle-read")
        self._runner: Runner | None = None
        self._held: CaptionTask | None = None
        self._under_way: dict[int, tuple[int, BatchItem]] = {}

    def run(self) -> Iterator[BatchResult]:
        try:
            while True:
                self._read_ahead()
                yield from self._start_ready()
                if self._runner is not None and not self._runner.idle:
                    yield from self._step(self._runner)
                elif not self._reading and self._held is None and self._exhausted:
                    return
        finally:
            for future in self._reading:
                future.cancel()
            self._pipeline.stop()
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _step(self, runner: Runner) -> Iterator[BatchResult]:
        """One decode step of all rows."""
        try:
            finished = list(runner.step())
        except (BundleError, TargetError):
            raise
        except Exception:
            # Nobody knows whose fault it is.
            self._runner = None
            started, self._under_way = self._under_way, {}
            if self._held is not None:
                self._under_way[id(self._held)] = started.pop(id(self._held))
            for index, item in started.values():
                yield self._alone(index, item)
            return
        for task in finished:
            index, item = self._under_way.pop(id(task))
            yield BatchResult(index, item, task.captions[0])

    def _alone(self, index: int, item: BatchItem) -> BatchResult:
        """The result of an item that is read, encoded and decoded with no other beside it."""
        stages = Stages()
        try:
            task = self._pipeline.task(item, self._pipeline.read(item, stages), stages)
            runner = Runner(self._pipeline.open(task.max_length))
            runner.add(task)
            while not runner.idle:
                runner.step()
        except (BundleError, TargetError):
            raise
        except Exception as error:
            return BatchResult(index, item, error=as_item_error(error, item.source))
        return BatchResult(index, item, task.captions[0])

    def _read_ahead(self) -> None:
        while len(self._reading) < READ_AHEAD and not self._exhausted:
            entry = next(self._items, None)
            if entry is None:
                self._exhausted = True
                return
            stages = Stages()
            self._reading[self._executor.submit(self._pipeline.read, entry[1], stages)] = (*entry, stages)

    def _start_ready(self) -> Iterator[BatchResult]:
        """Start tasks while there is room and a clip is read; wait for one only when there is nothing else to do."""
        while True:
            if self._held is None:
                yield from self._encode_ready()
            if self._held is None or not self._start(self._held):
                return
            self._held = None

    def _start(self, task: CaptionTask) -> bool:
        if self._runner is None or task.max_length > self._runner.scheduler.inference.max_length:
            # Rows too short for this one: when the others are through, longer rows take their place.
            if self._runner is not None and not self._runner.idle:
                return False
            self._runner = None
            self._runner = Runner(self._pipeline.open(task.max_length))
        if not self._runner.has_room(task.rows):
            return False
        self._runner.add(task)
        return True

    def _encode_ready(self) -> Iterator[BatchResult]:
        """Make a task of a clip that is read, if there is a row for it."""
        busy = self._runner is not None and not self._runner.idle
        if self._pipeline.alone:
            if busy:
                return
            self._runner = None
        while self._held is None and self._reading and not (busy and not self._has_room()):
            done, _ = wait(self._reading, timeout=0 if busy else None, return_when=FIRST_COMPLETED)
            ready = next((future for future in self._reading if future in done), None)
            if ready is None:
                return
            index, item, stages = self._reading.pop(ready)
            try:
                task = self._pipeline.task(item, ready.result(), stages)
            except (BundleError, TargetError):
                raise
            except Exception as error:
                yield BatchResult(index, item, error=as_item_error(error, item.source))
            else:
                self._held = task
                self._under_way[id(task)] = (index, item)
            self._read_ahead()

    def _has_room(self) -> bool:
        return self._runner is None or self._runner.has_room(1)
