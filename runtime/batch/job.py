"""A batch from its inputs to its records: captions of files and of their segments, and subtitles beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

from ..batching import BatchItem, BatchResult
from ..caption import Caption
from ..reading import TIME_LIMIT, Readers
from .inputs import BadLine, Entry
from .records import Record, RecordFile, RecordStream
from .resumable import ResumableJob, Tally, Task
from .subtitles import SubtitleWriter

Segments = float | Literal["scenes"]


class Batcher(Protocol):
    """What a job needs of a ``Captioner``."""

    @property
    def caption_batch(self) -> Callable[..., Iterator[BatchResult]]: ...


class Job(ResumableJob[Entry]):
    """A run over ``entries`` into ``records``, a caption each.

    ``segments``: seconds, or ``scenes``: videos (and, by seconds, sounds) without a span of their own become an item a
    segment. ``options`` go to ``caption_batch``. A file with the content of another one gets a copy of its caption.
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
        super().__init__(entries, records, self.tally, watch, debug)
        self._segments, self._subtitles, self._options = segments, subtitles, dict(options or {})
        self._readers: Readers | None = None
        self._submitted: dict[int, Task[Entry]] = {}
        self._under_way: dict[tuple[object, ...], list[Task[Entry]]] = {}
        self._by_path: dict[str, list[str]] = {}
        self._entries_left = Counter(entry.path for entry in entries if isinstance(entry, Entry))

    def run(self, captioner: Batcher) -> Tally:
        """Caption what is not done yet, then put the records in the order of the inputs.

        Errors of single items become records. ``OptionError`` when the output cannot be written.
        """
        results = captioner.caption_batch(self._items(), **self._options)
        try:
            for result in results:
                self._finish(self._submitted.pop(result.index), result)
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()
            if self._readers is not None:
                self._readers.close()
        self._put_in_order()
        return self.tally

    def _items(self) -> Iterator[BatchItem]:
        for place, task in enumerate(self._due()):
            self._submitted[place] = task
            yield BatchItem(task.entry.file, task.entry.prompt, task.start, task.end)

    def _spans(self, entry: Entry) -> list[tuple[float, float]]:
        if self._segments is None or entry.start is not None or entry.end is not None:
            return []
        if self._readers is None:
            self._readers = Readers(time_limit=self._options.get("item_timeout", TIME_LIMIT))
        return self._readers.spans(entry.file, None if self._segments == "scenes" else float(self._segments))

    def _needs_work(self, task: Task[Entry]) -> bool:
        """Not where the same content has a caption, or will soon have one."""
        key = (task.sha256, *task.asked)
        like = self._records.captioned_like(key)
        if like is not None:
            self._copy(task, like)
        elif key in self._under_way:
            self._pending[task.entry.id] += 1
            self._under_way[key].append(task)
        else:
            self._under_way[key] = []
            return True
        return False

    def _finish(self, task: Task[Entry], result: BatchResult) -> None:
        followers = self._under_way.pop((task.sha256, *task.asked))
        if result.caption is not None:
            record = self._add(task, _captioned(result.caption))
            for follower in followers:
                self._copy(follower, record)
        else:
            assert result.error is not None
            for failed in (task, *followers):
                # The same content fails for the same reason, under its own name.
                reason = str(result.error).replace(task.entry.file, failed.entry.file)
                self._fail(failed.record, result.error, reason)
        for finished in (task, *followers):
            self._task_done(finished.entry)

    def _copy(self, task: Task[Entry], like: Record) -> None:
        about = {*task.record, "run", "settings", "prompt", "part_of", "segment", "segments", "copied_from", "meta"}
        caption = {name: value for name, value in like.items() if name not in about}
        self._records.append(task.record | {"copied_from": like["id"]} | caption)
        self.tally.copied += 1
        self._watch(self.tally)

    def _note(self, entry: Entry, name: str) -> None:
        super()._note(entry, name)
        if self._subtitles is not None:
            self._by_path.setdefault(entry.path, []).append(name)

    def _entry_done(self, entry: Entry) -> None:
        self._entries_left[entry.path] -= 1
        names = self._by_path.pop(entry.path, []) if not self._entries_left[entry.path] else []
        if names and self._subtitles is not None:
            self._subtitles.write(entry.file, map(self._records.read, names))


def _captioned(caption: Caption) -> Record:
    """A caption as its part of a record. Log-likelihoods token by token stay out: their mean says most of it."""
    fields = asdict(caption)
    # The record has the item's own start.
    for name in ("token_logprobs", "contrast_logprobs", "start"):
        del fields[name]
    # A record's "settings" are what the run was asked for; "decoding" is what came of it.
    return {"text": fields.pop("text"), "mean_logprob": caption.mean_logprob} | fields
