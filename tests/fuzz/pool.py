"""Running many seeds in a process that may die, and sorting what comes of them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds of processor time that a mutant may take; and by the clock, on a machine that others use too.
MOST_SECONDS = 10.0
MOST_CLOCK_SECONDS = 60.0
#: Bytes of memory that a mutant may take.
MOST_MEMORY = 1 << 30
#: What must never come of a mutant. ``wrapped`` is told in one line, but by an exception that may be a fault of ours.
FAULTS = ("foreign", "crash", "hang", "memory")


@dataclass
class Fault:
    """One kind of fault: where it happens, and the seeds that show it (the first ones)."""

    outcome: str
    kind: str
    place: str
    message: str
    count: int = 0
    seeds: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Report:
    """Numbers of each outcome, faults by kind and place, the slowest seeds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    faults: dict[tuple[str, str, str], Fault] = field(default_factory=dict)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, answer: dict[str, Any]) -> Fault | None:
        """The fault, if ``answer`` shows one, expected (``wrapped``) or not."""
        outcome = answer["outcome"]
        self.outcomes[outcome] += 1
        self.formats[answer["name"]] += 1
        self.slowest = sorted([*self.slowest, (answer["seconds"], answer["seed"], answer["name"])], reverse=True)[:5]
        if outcome in ("ok", "ours"):
            return None
        key = (outcome, answer["kind"], answer["place"])
        fault = self.faults.setdefault(key, Fault(*key, answer.get("message", "")))
        fault.count += 1
        if len(fault.seeds) < 5:
            fault.seeds.append((answer["seed"], answer["name"]))
        return fault

    @property
    def clean(self) -> bool:
        return not any(self.outcomes[outcome] for outcome in FAULTS)

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        rate = total / self.seconds if self.seconds else 0
        lines = [f"{total} mutants of {len(self.formats)} originals in {self.seconds:.0f} s ({rate:.0f} a second)"]
        lines += [f"  {outcome:8} {count}" for outcome, count in self.outcomes.most_common()]
        for fault in sorted(self.faults.values(), key=lambda fault: (fault.outcome, -fault.count)):
            seeds = ", ".join(f"{seed} {name}" for seed, name in fault.seeds)
            lines.append(
                f"{fault.outcome} x {fault.count}: {fault.kind} at {fault.place}: {fault.message}\n    {seeds}"
            )
        lines += [f"slowest: {seconds:.2f} s, seed {seed} {name}" for seconds, seed, name in self.slowest]
        return "\n".join(lines)


class Worker:
    """A process of ``worker.py`` and what it says on stderr."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "intertitle.tests.fuzz.worker", kind, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
        )
        self._buffer = b""
        ready = self.receive(clock=300.0, processor=300.0)
        if ready is None:
            raise RuntimeError(f"the worker does not start:\n{self.said()}")

    def send(self, lines: list[str]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self.process.stdin.flush()

    def receive(self, clock: float = MOST_CLOCK_SECONDS, processor: float | None = None) -> dict[str, Any] | None:
        """The next answer; ``None`` when the process ended. ``TimeoutError`` for one that takes too long."""
        assert self.process.stdout is not None
        processor = MOST_SECONDS if processor is None else processor
        start, used = time.monotonic(), self._processor_time()
        while b"\n" not in self._buffer:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    return None
                self._buffer += piece
            elif time.monotonic() - start > clock or self._processor_time() - used > processor:
                raise TimeoutError
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _processor_time(self) -> float:
        """Of the process, all threads; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def where(self) -> str:
        """The innermost line of intertitle that a crashed or hanging process was at, by faulthandler."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1)
        lines = [line.strip() for line in self.said().splitlines() if line.strip().startswith("File ")]
        ours = [line for line in lines if "/tests/" not in line and ("/runtime/" in line or "/models/" in line)]
        return (ours or lines or ["?"])[0]

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def end(self) -> int:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        code = self.process.wait()
        self.log.close()
        return code


def run_seeds(kind: str, seeds: Iterable[int], folder: Path) -> Iterator[dict[str, Any]]:
    """The answer for each seed in order."""
    yield from run_jobs(kind, ((seed, "") for seed in seeds), folder)


def run_jobs(kind: str, jobs: Iterable[tuple[int, str]], folder: Path) -> Iterator[dict[str, Any]]:
    """The answer for each seed, or for a file that is read in the way of that seed."""
    worker: Worker | None = None
    waiting: list[tuple[int, str]] = []
    source = iter(jobs)
    try:
        while True:
            if worker is None:
                worker = Worker(kind, folder)
                worker.send([_line(job) for job in waiting])
            if len(waiting) < 32:
                more = [job for _, job in zip(range(32), source, strict=False)]
                waiting += more
                worker.send([_line(job) for job in more])
            if not waiting:
                return
            seed, file = waiting[0]
            answer: dict[str, Any] | None
            try:
                answer = worker.receive()
                late = False
            except TimeoutError:
                answer, late = None, True
            if answer is None:
                place = worker.where()
                code = worker.end() if late else worker.process.wait()
                worker.end()
                worker = None
                outcome = "hang" if late else "crash"
                kind_ = "" if late else signal.Signals(-code).name if code < 0 else f"exit code {code}"
                name = Path(file).name if file else ""
                answer = {"seed": seed, "name": name, "outcome": outcome, "kind": kind_, "place": place, "seconds": 0}
            elif answer["memory"] > MOST_MEMORY:
                worker.end()
                worker = None
            waiting.pop(0)
            yield answer
    finally:
        if worker is not None:
            worker.end()


def _line(job: tuple[int, str]) -> str:
    return f"{job[0]} {job[1]}".rstrip()
