"""From clips to a file of preference pairs: what is done is not done again, what cannot be done is recorded.

The file is JSONL, one record a clip: key, source, segments, candidates with scores and origins, chosen, rejected, gap,
kept, or an error; and, as in an output of ``intertitle batch``, the settings that it was made with.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from ...errors import IntertitleError, OptionError
from ...runtime.batch import BadLine, Entry, RecordFile, ResumableJob, Tally
from ...runtime.batch.records import Record
from ...runtime.batch.resumable import Task
from ...runtime.batching import as_item_error
from .candidates import Candidate, Material, Proposer
from .items import Item, file_item
from .scorers import MOST, Scorer, Scores

GAP = 4.0
"""The least difference of the totals of a pair, of 13.5 (docs/facts.md 2.1)."""
#: Clips whose segments are captioned together. A killed run loses the work on so many at most.
_TOGETHER = 4
#: Clips that wait for their scores while the captioner goes on.
_SCORED_TOGETHER = 4
_EXACT = 1e-6


class PairFile(RecordFile):
    """The records of pairs, with all that a ``RecordFile`` promises."""

    KEY: ClassVar[str] = "key"
    FILE: ClassVar[str] = "source"
    MAKER: ClassVar[str] = "pairs"


@dataclass(frozen=True)
class Pair:
    """A better and a worse caption of one clip, and by how much: the difference of their totals."""

    key: str
    source: str
    chosen: str
    rejected: str
    gap: float
    chosen_scores: Scores
    rejected_scores: Scores


@dataclass
class PairTally(Tally):
    """``captioned`` counts the clips that were scored in this run, ``kept`` those of them that gave a pair."""

    kept: int = 0


def choose(candidates: Sequence[Candidate], scores: Sequence[Scores]) -> tuple[int, int, float]:
    """The places of the winner and the loser by total, and their gap; the order of the candidates decides nothing.

    Among equal totals the likelier wins and the less likely loses, then the text decides. At least one is needed.
    """

    def rank(place: int) -> tuple[float, float, str]:
        likelihood = candidates[place].mean_logprob
        return scores[place].total, -math.inf if likelihood is None else likelihood, candidates[place].text

    winner, loser = max(range(len(scores)), key=rank), min(range(len(scores)), key=rank)
    return winner, loser, scores[winner].total - scores[loser].total


class PairJob(ResumableJob[Item]):
    """A run over ``entries`` (scenes as items, files as ``read_inputs`` gives them) into ``records``.

    ``gap``: pairs that differ by less are recorded but not kept; 0 keeps all that differ. ``watch`` and ``debug`` as in
    ``ResumableJob``.
    """

    def __init__(
        self,
        entries: Sequence[Item | Entry | BadLine],
        records: RecordFile,
        scorer: Scorer,
        *,
        gap: float = GAP,
        watch: Callable[[Tally], None] | None = None,
        debug: bool = False,
    ) -> None:
        if not 0 <= gap <= MOST:
            raise OptionError(f"the gap of a pair is from 0 to {MOST}, not {gap:g}")
        self.tally = PairTally(len(entries))
        items = [file_item(entry) if isinstance(entry, Entry) else entry for entry in entries]
        super().__init__(items, records, self.tally, watch, debug)
        self._scorer, self._gap = scorer, gap

    def run(self, proposer: Proposer) -> PairTally:
        """Make what is not there yet, then put the records in the order of the entries.

        The captioner works in this thread, scores are given in others. Errors of single clips become records;
        ``OptionError`` when the output cannot be written or the scorer can score nothing.
        """
        due = self._due()
        scoring: dict[Future[list[Scores]], tuple[Task[Item], Material]] = {}
        with ThreadPoolExecutor(_SCORED_TOGETHER, thread_name_prefix="intertitle-score") as pool:
            try:
                while together := {task.id: task for task in itertools.islice(due, _TOGETHER)}:
                    for proposal in proposer.propose([task.entry for task in together.values()]):
                        task, material = together[proposal.item.key], proposal.material
                        if material is None:
                            assert proposal.error is not None
                            self._refuse(task, task.record, proposal.error)
                            continue
                        if len(material.candidates) < 2:
                            self._close_call(task, material)
                            continue
                        self._collect(scoring, _SCORED_TOGETHER - 1)
                        future = pool.submit(self._scorer.score, material, material.candidates)
                        scoring[future] = (task, material)
                self._collect(scoring, 0)
            except BaseException:
                # What waits for an answer may wait for long; nobody will read it.
                pool.shutdown(wait=False, cancel_futures=True)
                close = getattr(self._scorer, "close", None)
                if close is not None:
                    close()
                raise
        self._put_in_order()
        return self.tally

    def _collect(self, scoring: dict[Future[list[Scores]], tuple[Task[Item], Material]], most: int) -> None:
        """Record what has been scored; wait until no more than ``most`` are under way."""
        while scoring:
            late = len(scoring) > most
            done, _ = wait(scoring, timeout=None if late else 0, return_when=FIRST_COMPLETED)
            if not done and not late:
                return
            for future in done:
                task, material = scoring.pop(future)
                try:
                    scores = future.result()
                except OptionError:
                    raise
                except Exception as error:
                    failed = as_item_error(error, task.entry.source)
                    self._refuse(task, task.record | _described(material), failed)
                else:
                    self._judge(task, material, scores)

    def _judge(self, task: Task[Item], material: Material, scores: Sequence[Scores]) -> None:
        winner, loser, gap = choose(material.candidates, scores)
        differs = gap > _EXACT
        pair: Record = {"chosen": None, "rejected": None, "gap": gap, "kept": differs and gap >= self._gap - _EXACT}
        if differs:
            texts = [candidate.text for candidate in material.candidates]
            pair |= {"chosen": texts[winner], "rejected": texts[loser]}
        self._keep(task, _described(material, scores) | pair)

    def _close_call(self, task: Task[Item], material: Material) -> None:
        """The captioner is so sure that it says one thing only, or says nothing: no pair, and no failure."""
        self._keep(task, _described(material) | {"chosen": None, "rejected": None, "gap": 0.0, "kept": False})

    def _keep(self, task: Task[Item], found: Record) -> None:
        self.tally.kept += found["kept"]
        self._add(task, found)
        self._task_done(task.entry)

    def _refuse(self, task: Task[Item], record: Record, error: IntertitleError) -> None:
        self._fail(record, error)
        self._task_done(task.entry)


def _described(material: Material, scores: Sequence[Scores] = ()) -> Record:
    listed: list[Record] = []
    for candidate, given in itertools.zip_longest(material.candidates, scores):
        likelihood = candidate.mean_logprob
        about: Record = {
            "text": candidate.text,
            "origins": list(candidate.origins),
            "mean_logprob": likelihood if likelihood is None or math.isfinite(likelihood) else None,
            "finish_reason": candidate.finish_reason,
        }
        if candidate.draft is not None:
            about["draft"] = candidate.draft
        if given is not None:
            about["scores"] = {
                "factuality": given.factuality,
                "fluency": given.fluency,
                "consistency": given.consistency,
                "total": given.total,
            }
        listed.append(about)
    return {"instruction": material.instruction, "segments": material.segments, "candidates": listed}


# --- the reader


class _ScoresRead(msgspec.Struct):
    factuality: float
    fluency: float
    consistency: float
    total: float


class _CandidateRead(msgspec.Struct):
    text: str
    origins: list[str]
    scores: _ScoresRead | None = None


class _ErrorRead(msgspec.Struct):
    kind: str
    reason: str


class _RecordRead(msgspec.Struct):
    key: str
    source: str
    candidates: list[_CandidateRead] = []
    chosen: str | None = None
    rejected: str | None = None
    gap: float | None = None
    kept: bool | None = None
    error: _ErrorRead | None = None


def read_pairs(path: Path, gap: float | None = None) -> Iterator[Pair]:
    """The pairs of a file that ``intertitle pairs`` wrote, each record checked.

    ``gap``: those that differ by so much at least; ``None``: those that the run kept. Records of failures and of clips
    without a pair are passed over. ``OptionError`` that names file and line for a file that cannot be read, a line that
    is no record, a key that was there before and a pair that its own scores deny.
    """
    lines: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = _read_record(line)
                    if record.key in lines:
                        raise ValueError(f"the key '{record.key}' is that of line {lines[record.key]}")
                    lines[record.key] = number
                    pair = _read_pair(record)
                except (ValueError, RecursionError) as error:  # msgspec's is a ValueError
                    raise OptionError(f"{path}: line {number}: {error}") from None
                if pair is not None and (record.kept if gap is None else pair.gap >= gap - _EXACT):
                    yield pair
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from error


def _read_record(line: bytes) -> _RecordRead:
    if not line.endswith(b"\n"):
        raise ValueError("is cut short; the command that wrote the file mends it")
    # Not msgspec's own reader: an odd file name comes as an escape of half a character, which it refuses.
    return msgspec.convert(json.loads(line), _RecordRead)


def _read_pair(record: _RecordRead) -> Pair | None:
    """``ValueError`` for a record that contradicts itself."""
    if record.error is not None:
        if record.chosen is not None or record.rejected is not None:
            raise ValueError("has an error and a pair")
        return None
    if record.kept is None or record.gap is None:
        raise ValueError("has neither a pair nor an error: 'kept' or 'gap' is missing")
    if record.chosen is None and record.rejected is None:
        if record.kept:
            raise ValueError("is kept, but has no pair")
        return None
    found: list[Scores] = []
    for name, text in (("chosen", record.chosen), ("rejected", record.rejected)):
        given = next((one.scores for one in record.candidates if one.text == text), None)
        if not text or given is None:
            raise ValueError(f"the {name} caption is none of the candidates with scores")
        scores = Scores(given.factuality, given.fluency, given.consistency)
        if not abs(scores.total - given.total) < _EXACT:
            raise ValueError(f"the total of the {name} caption is {scores.total:g}, not {given.total:g}")
        found.append(scores)
    chosen, rejected = found
    gap = chosen.total - rejected.total
    if record.chosen == record.rejected or not gap > 0:
        raise ValueError("the chosen caption is not better than the rejected one")
    if not abs(gap - record.gap) < _EXACT:
        raise ValueError(f"the gap is {gap:g} by the scores, not {record.gap:g}")
    assert record.chosen is not None
    assert record.rejected is not None
    return Pair(record.key, record.source, record.chosen, record.rejected, record.gap, chosen, rejected)
