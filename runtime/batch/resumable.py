"""What a run over many clips is, whatever it makes of each: what is done is not done again, a failure is a record.

``batch`` (``job.py``) and ``pairs`` (``align/preference/pairs.py``) are such runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ...errors import IntertitleError
from .content import ContentHashes, Identity
from .inputs import BadLine
from .records import Record, RecordFile, RecordStream, error_record


class Subject(Protocol):
    """What a run is asked to work on: an ``Entry``, or something else that has a name.

    ``id`` names its record, ``manifest`` is the file that lists it, if one does. ``identify``: size and time of its
    file, ``None`` for what is no file; ``MediaError`` for a file that cannot be looked at. ``about``: what its record
    says of it beside its name and its file.
    """

    @property
    def id(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def start(self) -> float | None: ...
    @property
    def end(self) -> float | None: ...
    @property
    def manifest(self) -> str: ...
    @property
    def about(self) -> Record: ...
    def identify(self) -> Identity | None: ...


S = TypeVar("S", bound=Subject)


@dataclass
class Tally:
    """How far a job has come. ``inputs`` and ``finished`` count inputs, the rest captions and failures.

    ``already`` were captioned and ``already_failed`` had failed in an earlier run; ``copied`` are captions of a file
    with the same content. ``reasons``: of the failures of this run, a line each.
    """

    inputs: int
    finished: int = 0
    captioned: int = 0
    copied: int = 0
    failed: int = 0
    already: int = 0
    already_failed: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return self.failed + self.already_failed


@dataclass(frozen=True)
class Task(Generic[S]):
    """One record to be: an input or a segment of one. ``record`` is what the record says of it before any result."""

    entry: S
    id: str
    start: float | None
    end: float | None
    segments: int | None
    sha256: str | None
    record: Record

    @property
    def asked(self) -> tuple[object, ...]:
        return self.entry.prompt, self.start, self.end


class ResumableJob(Generic[S]):
    """A run over ``entries`` into ``records``.

    ``_due`` gives the tasks that need work. For each of them a subclass calls ``_add`` or ``_fail``, then
    ``_task_done``; at the end ``_put_in_order``. ``watch`` is told the tally after each record and each input.
    ``debug``: records of failures hold the traceback.
    """

    def __init__(
        self,
        entries: Sequence[S | BadLine],
        records: RecordFile | RecordStream,
        tally: Tally,
        watch: Callable[[Tally], None] | None = None,
        debug: bool = False,
    ) -> None:
        self._entries, self._records, self._tally = entries, records, tally
        self._watch, self._debug = watch or (lambda tally: None), debug
        self._hashes = ContentHashes()
        for known in records.known.values():
            if known.identity is not None and known.sha256 is not None:
                self._hashes.learn(known.file, known.identity, known.sha256)
        self._order: list[str] = []
        self._pending: Counter[str] = Counter()

    def _due(self) -> Iterator[Task[S]]:
        """The tasks that need work, in order; whatever needs none is recorded and counted on the way."""
        for entry in self._entries:
            if isinstance(entry, BadLine):
                self._record_bad_line(entry)
                continue
            # The input itself is one of those that are waited for, until all its tasks are known.
            self._pending[entry.id] += 1
            for task in self._tasks(entry):
                self._pending[entry.id] += 1
                yield task
            self._task_done(entry)

    def _spans(self, entry: S) -> list[tuple[float, float]]:
        """Segments of an input in seconds; none where it stays whole."""
        return []

    def _needs_work(self, task: Task[S]) -> bool:
        """Whether a task that no record is there of has to be worked on."""
        return True

    def _entry_done(self, entry: S) -> None:
        """All records of an input are there."""

    def _note(self, entry: S, name: str) -> None:
        """A record of an input has a place in the order of the output."""
        self._order.append(name)

    def _add(self, task: Task[S], found: Record) -> Record:
        """Put the result of a task on disk."""
        record = task.record | found
        self._records.append(record)
        self._tally.captioned += 1
        self._watch(self._tally)
        return record

    def _fail(self, record: Record, error: IntertitleError, reason: str | None = None) -> None:
        """Put a failure on disk, with what is known of the item; ``reason`` in place of the error's own text."""
        said = str(error) if reason is None else reason
        self._records.append(record | error_record(error, said, self._debug))
        self._tally.failed += 1
        self._tally.reasons.append(said)
        self._watch(self._tally)

    def _task_done(self, entry: S) -> None:
        self._pending[entry.id] -= 1
        if self._pending[entry.id]:
            return
        del self._pending[entry.id]
        self._tally.finished += 1
        self._entry_done(entry)
        self._watch(self._tally)

    def _put_in_order(self) -> None:
        """The records in the order of the inputs; those of parts that there no longer are go."""
        bases = {entry.id for entry in self._entries} | {entry.manifest for entry in self._entries if entry.manifest}
        self._records.finish(self._order, bases)

    def _tasks(self, entry: S) -> Iterator[Task[S]]:
        """The parts of an input that have to be worked on."""
        identity = None
        try:
            identity = entry.identify()
            if self._done_as_it_was(entry, identity):
                return
            sha256 = None if identity is None else self._hashes.of(entry.file, identity)
            spans = self._spans(entry)
        except IntertitleError as error:
            self._record_failed_entry(entry, identity, error)
            return
        held: Record = {} if identity is None else {"sha256": sha256, **_stated(identity)}
        for index, (start, end) in enumerate(spans or [(entry.start, entry.end)]):
            name = f"{entry.id}/{index:04}" if spans else entry.id
            count = len(spans) if spans else None
            part = {"part_of": entry.id, "segment": index, "segments": count} if spans else {}
            span = {"start": start, "end": end} if spans else {}
            record = self._described(entry, name) | span | part | held
            task = Task(entry, name, start, end, count, sha256, record)
            self._note(entry, name)
            known = self._records.known.get(name)
            if (
                known is not None
                and known.sha256 == sha256
                and known.segments == task.segments
                and known.asked == task.asked
            ):
                self._count_known(known.failed)
            elif self._needs_work(task):
                yield task

    def _done_as_it_was(self, entry: S, identity: Identity | None) -> bool:
        """Whether there are records of all of the input, made of a file of this size and time; counts them."""
        first = next((name for name in (entry.id, f"{entry.id}/0000") if name in self._records.known), None)
        if first is None:
            return False
        count = self._records.known[first].segments
        names = [entry.id] if count is None else [f"{entry.id}/{index:04}" for index in range(count)]
        found = [known for name in names if (known := self._records.known.get(name)) is not None]
        asked = (entry.prompt, entry.start, entry.end)
        if len(found) < len(names) or any(
            known.identity != identity
            or known.file != entry.file
            or (known.asked[0] != entry.prompt if count else known.asked != asked)
            for known in found
        ):
            return False
        for name, known in zip(names, found, strict=True):
            self._note(entry, name)
            self._count_known(known.failed)
        return True

    def _record_failed_entry(self, entry: S, identity: Identity | None, error: IntertitleError) -> None:
        """An input whose parts are unknown."""
        self._note(entry, entry.id)
        known = self._records.known.get(entry.id)
        if identity is None and known is not None and known.failed and known.identity is None:
            self._count_known(True)
            return
        self._fail(self._described(entry, entry.id) | ({} if identity is None else _stated(identity)), error)

    def _record_bad_line(self, bad: BadLine) -> None:
        self._order.append(bad.id)
        known = self._records.known.get(bad.id)
        if known is not None and known.failed:
            self._count_known(True)
        else:
            record = self._named(bad.id, bad.manifest) | {"part_of": bad.manifest, "line": bad.line}
            self._records.append(record | {"error": {"kind": "manifest", "reason": f"line {bad.line}: {bad.reason}"}})
            self._tally.failed += 1
            self._tally.reasons.append(f"{bad.manifest}: line {bad.line}: {bad.reason}")
        self._tally.finished += 1
        self._watch(self._tally)

    def _described(self, entry: S, name: str) -> Record:
        return self._named(name, entry.file) | entry.about

    def _named(self, name: str, file: str) -> Record:
        return {self._records.KEY: name, self._records.FILE: file}

    def _count_known(self, failed: bool) -> None:
        if failed:
            self._tally.already_failed += 1
        else:
            self._tally.already += 1


def _stated(identity: Identity) -> Record:
    return {"size": identity.size, "mtime_ns": identity.mtime_ns}
