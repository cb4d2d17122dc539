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

import numpy as np

from .. import errors
from ..errors import IntertitleError, MediaError
from .bundle import Preprocessing
from .clip import Clip
from .reading_worker import Answer, ReadRequest, Request, SpansRequest, receive, send
from .timing import Stages

#: Seconds that one file may take to be read, unless told otherwise.
TIME_LIMIT = 600.0
#: Bytes of address space of a worker: 16 frames of 8K video, what a decoder of them holds, and as much again.
MEMORY_LIMIT = 8 << 30

#: The child finds the package where its parent found it.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {package} import main; main()"


class Readers:
    """``count`` worker processes. ``read`` and ``spans`` may be called from as many threads at once.

    A worker that dies or takes longer than ``time_limit`` seconds fails its file, and another takes its place. Workers
    start in the background when the object is made.
    """

    def __init__(self, count: int = 1, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT) -> None:
        self._time_limit, self._memory_limit = time_limit, memory_limit
        self._closed = False
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(self._start())

    def read(
        self,
        source: str | os.PathLike[str],
        spec: Preprocessing,
        per_frame: bool,
        audio: bool,
        stages: Stages,
        *,
        start: float | None = None,
        end: float | None = None,
        duplicates: float | None = None,
    ) -> Clip:
        """See ``read_clip``. ``MediaError`` also for a file that crashes its decoder or takes too long."""
        name = os.fsencode(source)
        answer, arrays = self._ask(ReadRequest(name, spec, per_frame, audio, start, end, duplicates))
        for stage, seconds in answer.timings.items():
            stages.add(stage, seconds)
        return Clip(**arrays, notes=answer.notes, seconds=answer.seconds, start=answer.start)

    def spans(self, source: str | os.PathLike[str], segments: float | None) -> list[tuple[float, float]]:
        """See ``media_spans``."""
        return self._ask(SpansRequest(os.fsencode(source), segments))[0].spans

    def close(self) -> None:
        """End the workers that are idle; those at work end with what they are doing."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                _end(self._idle.get_nowait())

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Request) -> tuple[Answer, dict[str, np.ndarray]]:
        worker = self._idle.get()
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        timer = threading.Timer(self._time_limit, stop)
        timer.daemon = True
        timer.start()
        try:
            answer, arrays = _exchange(worker, request)
        except (EOFError, OSError, ValueError) as error:
            raise MediaError(_epitaph(os.fsdecode(request.source), worker, late, self._time_limit)) from error
        finally:
            timer.cancel()
            if worker.poll() is None and not late.is_set() and not self._closed:
                self._idle.put(worker)
            else:
                _end(worker)
                if not self._closed:
                    self._idle.put(self._start())
        if answer.error is not None:
            raise _error(answer)
        return answer, arrays

    def _start(self) -> subprocess.Popen[bytes]:
        module = f"{__package__}.reading_worker"
        command = [sys.executable, "-c", _START.format(package=module), json.dumps(sys.path), str(self._memory_limit)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
        )


def _exchange(worker: subprocess.Popen[bytes], request: Request) -> tuple[Answer, dict[str, np.ndarray]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    send(worker.stdin, request)  # type: ignore[arg-type]
    answer: Answer = receive(worker.stdout, Answer)  # type: ignore[arg-type]
    arrays: dict[str, np.ndarray] = {}
    for info in answer.arrays:
        array = np.empty(info.shape, info.dtype)
        view = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        while view.nbytes:
            count = worker.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]
        arrays[info.name] = array
    return answer, arrays


def _epitaph(name: str, worker: subprocess.Popen[bytes], late: threading.Event, limit: float) -> str:
    if late.is_set():
        return f"{name}: reading it took more than {limit:g} s"
    try:
        code = worker.wait(5)
    except subprocess.TimeoutExpired:
        return f"{name}: the process that read it does not answer"
    if code < 0:
        with suppress(ValueError):
            return f"{name}: a decoder crashed on it ({signal.Signals(-code).name})"
    return f"{name}: the process that read it ended with exit code {code}"


def _error(answer: Answer) -> IntertitleError:
    kind = getattr(errors, answer.error or "", errors.ItemError)
    error: IntertitleError = kind(answer.message)
    error.__cause__ = RemoteError(answer.trace)
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
