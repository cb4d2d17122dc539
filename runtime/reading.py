"""Media read in processes of their own, so that no file can end a run: not by a crash, not by taking for ever."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import IO, cast

import numpy as np

from ..contract.pipeline import Pipeline
from ..errors import IntertitleError, ItemError, MediaError, OptionError, TransientMediaError
from .clip import Clip
from .prompt import Timing
from .reading_worker import Answer, DurationRequest, ReadRequest, Request, SpansRequest, decode_text, receive, send
from .timing import Stages, checked_limit
from .viewing import Viewing

#: Seconds that one file may take to be read, unless told otherwise.
TIME_LIMIT = 600.0
#: Bytes of memory of a worker: 16 frames of 8K video, what a decoder of them holds, and as much again.
MEMORY_LIMIT = 8 << 30

#: The child finds the package where its parent found it.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {package} import main; main()"


#: The arrays of an answer, and their types.
_ARRAYS = {"frames": "|u1", "order": "<i8", "sound": "<f4", "times": "<f8"}


class Readers:
    """``count`` worker processes. ``read`` and ``spans`` may be called from any thread; ``count`` of them work at once.

    A worker that dies or takes longer than ``time_limit`` seconds fails its file, and another takes its place. Workers
    start in the background when the object is made, and again when a file needs one that is gone. ``OptionError`` for a
    limit that no timer can wait for.
    """

    def __init__(self, count: int = 1, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT) -> None:
        self._time_limit, self._memory_limit = checked_limit("item_timeout", time_limit), memory_limit
        self._closed = False
        self._lock = threading.Lock()
        self._at_work: set[subprocess.Popen[bytes]] = set()
        # None: a place whose worker is to be started.
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(count):
            try:
                self._idle.put(self._start())
            except OSError:
                self._idle.put(None)

    def read(
        self,
        source: str | os.PathLike[str],
        pipeline: Pipeline,
        viewing: Viewing,
        stages: Stages,
        *,
        threads: int | None = None,
    ) -> Clip:
        """See ``read_clip``. ``MediaError`` also for a file that crashes its decoder or takes too long."""
        name = os.fsencode(source)
        answer, arrays = self._ask(ReadRequest(name, pipeline, viewing, threads))
        for stage, seconds in answer.timings.items():
            stages.add(stage, seconds)
        times = arrays.pop("times", None)
        clip = Clip(notes=[*map(decode_text, answer.notes)], seconds=answer.seconds, start=answer.start)
        clip.frames, clip.order, clip.sound = (arrays.get(name) for name in ("frames", "order", "sound"))
        if times is not None and answer.frame_seconds is not None:
            clip.timing = Timing(answer.frame_seconds, times)
        return clip

    def spans(self, source: str | os.PathLike[str], segments: float | None) -> list[tuple[float, float]]:
        """See ``media_spans``."""
        return self._ask(SpansRequest(os.fsencode(source), segments))[0].spans

    def duration(self, source: str | os.PathLike[str]) -> float | None:
        """See ``media_duration``."""
        return self._ask(DurationRequest(os.fsencode(source)))[0].seconds

    def interrupt(self) -> None:
        """Let what is being read fail at once; other workers take the places of those that read it."""
        with self._lock:
            for worker in self._at_work:
                worker.kill()

    def close(self) -> None:
        """End all workers. What they are reading fails at once."""
        with self._lock:
            self._closed = True
        self.interrupt()
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker is not None:
                    _end(worker)
        # For a thread that waits for a worker.
        self._idle.put(None)

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Request) -> tuple[Answer, dict[str, np.ndarray]]:
        name = os.fsdecode(request.source)
        worker = self._take(name)
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        timer = threading.Timer(self._time_limit, stop)
        timer.daemon = True
        usable = False
        try:
            timer.start()
            answer, arrays = _exchange(worker, request)
            usable = not answer.spent
        except MemoryError as error:
            raise TransientMediaError(f"{name}: there is not enough memory for its frames") from error
        except Exception as error:
            raise _epitaph(name, worker, late, self._time_limit) from error
        finally:
            timer.cancel()
            # One that was interrupted would give this answer to the next question.
            self._give_back(worker, usable and not late.is_set())
        if answer.error is not None:
            raise _error(answer)
        return answer, arrays

    def _take(self, name: str) -> subprocess.Popen[bytes]:
        """A worker that is alive; the others wait for one."""
        worker = self._idle.get()
        if worker is not None and worker.poll() is not None:
            # It died while nobody asked it for anything: no file is at fault.
            _end(worker)
            worker = None
        with self._lock:
            if self._closed:
                self._idle.put(None)
                raise TransientMediaError(f"{name}: reading was stopped")
            try:
                worker = worker or self._start()
            except OSError as error:
                self._idle.put(None)
                reason = f"{name}: no process can be started to read it ({error.strerror})"
                raise TransientMediaError(reason) from error
            self._at_work.add(worker)
        return worker

    def _give_back(self, worker: subprocess.Popen[bytes], usable: bool) -> None:
        with self._lock:
            self._at_work.discard(worker)
            usable = usable and not self._closed
        if not usable:
            _end(worker)
        self._idle.put(worker if usable else None)

    def _start(self) -> subprocess.Popen[bytes]:
        module = f"{__package__}.reading_worker"
        start, path = _START.format(package=module), json.dumps([*map(str, sys.path)])
        command = [sys.executable, "-c", start, path, str(self._memory_limit)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
        )


def start_readers(count: int = 1, time_limit: float = TIME_LIMIT) -> Readers | None:
    """``Readers``, or ``None`` where this program cannot start Python: one frozen into a file would start itself."""
    if not sys.executable or getattr(sys, "frozen", False):
        checked_limit("item_timeout", time_limit)
        return None
    return Readers(count, time_limit)


def _exchange(worker: subprocess.Popen[bytes], request: Request) -> tuple[Answer, dict[str, np.ndarray]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    send(worker.stdin, request)  # type: ignore[arg-type]
    answer: Answer = receive(worker.stdout, Answer)  # type: ignore[arg-type]
    arrays: dict[str, np.ndarray] = {}
    for info in answer.arrays:
        # What decodes a stranger's file may say anything.
        if _ARRAYS.get(info.name) != info.dtype:
            raise ValueError(f"no array of clips: {info.name} of {info.dtype}")
        array = np.empty(info.shape, info.dtype)
        view = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        while view.nbytes:
            count = worker.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]
        arrays[info.name] = array
    return answer, arrays


def _epitaph(name: str, worker: subprocess.Popen[bytes], late: threading.Event, limit: float) -> MediaError:
    """Why there is no answer."""
    if late.is_set():
        return MediaError(f"{name}: reading it took more than {limit:g} s")
    with suppress(OSError):
        # It ends, if it has not: nothing that it says can be used.
        cast("IO[bytes]", worker.stdin).close()
    try:
        code = worker.wait(5)
    except subprocess.TimeoutExpired:
        return MediaError(f"{name}: the process that read it gave no usable answer")
    if code == -signal.SIGKILL:
        # No decoder does that: somebody did, or the system, which was short of memory.
        return TransientMediaError(f"{name}: the process that read it was killed")
    if code < 0:
        with suppress(ValueError):
            return MediaError(f"{name}: a decoder crashed on it ({signal.Signals(-code).name})")
    return MediaError(f"{name}: the process that read it ended with exit code {code}")


def _error(answer: Answer) -> IntertitleError:
    kinds = {kind.__name__: kind for kind in (MediaError, TransientMediaError, OptionError)}
    error = kinds.get(answer.error or "", ItemError)(decode_text(answer.message))
    error.__cause__ = RemoteError(decode_text(answer.trace))
    return error


class RemoteError(Exception):
    """The traceback of a worker, as text."""

    def __str__(self) -> str:
        return f"in the process that read the file:\n{self.args[0]}"


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    worker.wait()
