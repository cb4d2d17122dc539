"""A batch from its inputs to its records: what is done is not done again, what cannot be done is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ...errors import IntertitleError, MediaError
from ..batching import BatchItem, BatchResult
from ..caption import Caption
from ..reading import TIME_LIMIT, Readers
from .content import ContentHashes, identify
from .inputs import BadLine, Entry
from .records import Record, RecordFile, RecordStream, error_record
from .subtitles import SubtitleWriter

Segments = float | Literal["scenes"]


class Batcher(Protocol):
    """What a job needs of a ``Captioner``."""

    @property
    def caption_batch(self) -> Callable[..., Iterator[BatchResult]]: ...


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
class _Task:
    """One record to be: an input or a segment of one."""

    entry: Entry
    id: str
    start: float | None
    end: float | None
    segment: int | None
    segments: int | None
    size: int
    mtime_ns: int
    sha256: str

    @property
    def record(self) -> Record:
        record: Record = {"id": self.id, "file": self.entry.file, "start": self.start, "end": self.end}
        if self.entry.prompt is not None:
            record["prompt"] = self.entry.prompt
        if self.entry.meta:
            record["meta"] = self.entry.meta
        if self.segments is not None:
            record |= {"part_of": self.entry.id, "segment": self.segment, "segments": self.segments}
        return record | {"sha256": self.sha256, "size": self.size, "mtime_ns": self.mtime_ns}


class Job:
    """A run over ``entries`` into ``records``.

    ``segments``: seconds, or ``scenes``: videos (and, by seconds, sounds) without a span of their own become an item a
    segment. ``options`` go to ``caption_batch``. ``watch`` is told the tally after each record and each input.
    ``debug``: records of failures hold the traceback.
    """

    def __init__(
        self,
        entries: Sequence[Entry | BadLine],
        records: RecordFile | RecordStream,
        *,
        segments: Segments | None = None,
        subtitles: SubtitleWriter | None = None,
        watch: Callable[[Tally], None] | None = None,
        options: Mapping[str, Any] | None = None,
        debug: bool = False,
    ) -> None:
        self.tally = Tally(len(entries))
        self._entries, self._records = entries, records
        self._segments, self._subtitles, self._options = segments, subtitles, dict(options or {})
        self._watch, self._debug = watch or (lambda tally: None), debug
        self._readers: Readers | None = None
        self._hashes = ContentHashes()
        self._order: list[str] = []
        self._submitted: dict[int, _Task] = {}
        self._under_way: dict[tuple[object, ...], list[_Task]] = {}
        self._pending: Counter[str] = Counter()
        self._by_path: dict[str, list[str]] = {}
        self._entries_left = Counter(entry.path for entry in entries if isinstance(entry, Entry))

    def run(self, captioner: Batcher) -> Tally:
        """Caption what is not done yet, then put the records in the order of the inputs.

        Errors of single items become records. ``OptionError`` when the output cannot be written.
        """
        for known in self._records.known.values():
            if known.identity is not None and known.sha256 is not None:
                self._hashes.learn(known.file, known.identity, known.sha256)
        results = captioner.caption_batch(self._items(), **self._options)
        try:
            for result in results:
                task = self._submitted.pop(result.index)
                self._finish(task, result)
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()
            if self._readers is not None:
                self._readers.close()
        bases = {entry.id for entry in self._entries} | {entry.manifest for entry in self._entries if entry.manifest}
        self._records.finish(self._order, bases)
        return self.tally

    def _items(self) -> Iterator[BatchItem]:
        """The items that need work, in order; whatever needs none is recorded on the way."""
        place = 0
        for entry in self._entries:
            if isinstance(entry, BadLine):
                self._record_bad_line(entry)
                continue
            # The input itself is one of those that are waited for, until all its items are known.
            self._pending[entry.id] += 1
            for task in self._tasks(entry):
                self._submitted[place] = task
                self._pending[entry.id] += 1
                yield BatchItem(entry.file, entry.prompt, task.start, task.end)
                place += 1
            self._item_done(entry)

    def _tasks(self, entry: Entry) -> Iterator[_Task]:
        """The parts of an input that have to be captioned."""
        try:
            identity = identify(entry.file)
            if self._done_as_it_was(entry, identity):
                return
            sha256 = self._hashes.of(entry.file, identity)
            spans = self._spans(entry)
        except IntertitleError as error:
            self._record_failed_entry(entry, error)
            return
        for index, (start, end) in enumerate(spans or [(entry.start, entry.end)]):
            name = f"{entry.id}/{index:04}" if spans else entry.id
            numbers = (index, len(spans)) if spans else (None, None)
            task = _Task(entry, name, start, end, *numbers, identity.size, identity.mtime_ns, sha256)
            self._note(entry, name)
            known = self._records.known.get(name)
            asked = (entry.prompt, start, end)
            if (
                known is not None
                and known.sha256 == sha256
                and known.segments == task.segments
                and known.asked == asked
            ):
                self._count_known(known.failed)
                continue
            key = (sha256, *asked)
            like = self._records.captioned_like(key)
            if like is not None:
                self._copy(task, like)
            elif key in self._under_way:
                self._pending[entry.id] += 1
                self._under_way[key].append(task)
            else:
                self._under_way[key] = []
                yield task

    def _done_as_it_was(self, entry: Entry, identity: object) -> bool:
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

    def _spans(self, entry: Entry) -> list[tuple[float, float]]:
        """Segments in seconds; none where the input stays whole."""
        if self._segments is None or entry.start is not None or entry.end is not None:
            return []
        if self._readers is None:
            self._readers = Readers(time_limit=self._options.get("item_timeout", TIME_LIMIT))
        return self._readers.spans(entry.file, None if self._segments == "scenes" else float(self._segments))

    def _finish(self, task: _Task, result: BatchResult) -> None:
        followers = self._under_way.pop((task.sha256, task.entry.prompt, task.start, task.end))
        if result.caption is not None:
            record = task.record | _described(result.caption)
            self._records.append(record)
            self.tally.captioned += 1
            self._watch(self.tally)
            for follower in followers:
                self._copy(follower, record)
        else:
            assert result.error is not None
            for failed in (task, *followers):
                # The same content fails for the same reason, under its own name.
                reason = str(result.error).replace(task.entry.file, failed.entry.file)
                self._fail(failed.record, result.error, reason)
        for finished in (task, *followers):
            self._item_done(finished.entry)

    def _copy(self, task: _Task, like: Record) -> None:
        about = {*task.record, "run", "settings", "prompt", "part_of", "segment", "segments", "copied_from", "meta"}
        caption = {name: value for name, value in like.items() if name not in about}
        self._records.append(task.record | {"copied_from": like["id"]} | caption)
        self.tally.copied += 1
        self._watch(self.tally)

    def _fail(self, record: Record, error: IntertitleError, reason: str) -> None:
        self._records.append(record | error_record(error, reason, self._debug))
        self.tally.failed += 1
        self.tally.reasons.append(reason)
        self._watch(self.tally)

    def _record_failed_entry(self, entry: Entry, error: IntertitleError) -> None:
        """An input whose segments are unknown."""
        self._note(entry, entry.id)
        record: Record = {"id": entry.id, "file": entry.file, "start": entry.start, "end": entry.end}
        if entry.prompt is not None:
            record["prompt"] = entry.prompt
        if entry.meta:
            record["meta"] = entry.meta
        try:
            identity = identify(entry.file)
        except MediaError:
            known = self._records.known.get(entry.id)
            if known is not None and known.failed and known.identity is None:
                self._count_known(True)
                return
        else:
            record |= {"size": identity.size, "mtime_ns": identity.mtime_ns}
        self._fail(record, error, str(error))

    def _record_bad_line(self, bad: BadLine) -> None:
        self._order.append(bad.id)
        known = self._records.known.get(bad.id)
        if known is not None and known.failed:
            self._count_known(True)
        else:
            record: Record = {"id": bad.id, "file": bad.manifest, "part_of": bad.manifest, "line": bad.line}
            self._records.append(record | {"error": {"kind": "manifest", "reason": f"line {bad.line}: {bad.reason}"}})
            self.tally.failed += 1
            self.tally.reasons.append(f"{bad.manifest}: line {bad.line}: {bad.reason}")
        self.tally.finished += 1
        self._watch(self.tally)

    def _note(self, entry: Entry, name: str) -> None:
        self._order.append(name)
        if self._subtitles is not None:
            self._by_path.setdefault(entry.path, []).append(name)

    def _count_known(self, failed: bool) -> None:
        if failed:
            self.tally.already_failed += 1
        else:
            self.tally.already += 1

    def _item_done(self, entry: Entry) -> None:
        self._pending[entry.id] -= 1
        if self._pending[entry.id]:
            return
        del self._pending[entry.id]
        self.tally.finished += 1
        self._entries_left[entry.path] -= 1
        names = self._by_path.pop(entry.path, []) if not self._entries_left[entry.path] else []
        if names and self._subtitles is not None:
            self._subtitles.write(entry.file, map(self._records.read, names))
        self._watch(self.tally)


def _described(caption: Caption) -> Record:
    """A caption as its part of a record. Log-likelihoods token by token stay out: their mean says most of it."""
    fields = asdict(caption)
    # The record has the item's own start.
    for name in ("token_logprobs", "contrast_logprobs", "start"):
        del fields[name]
    # A record's "settings" are what the run was asked for; "decoding" is what came of it.
    return {"text": fields.pop("text"), "mean_logprob": caption.mean_logprob} | fields
