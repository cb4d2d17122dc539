"""The process that opens and decodes media for ``reading.py``. A file that crashes a decoder ends this one only.

Requests come over stdin, answers go over what was stdout: eight bytes of length, a message in MessagePack, then the
arrays that it announces. No pickles: what decodes a stranger's file must not be believed too much. The process ends
when its stdin does, so it never outlives its parent.
"""

from __future__ import annotations

import math
import os
import select
import signal
import struct
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from ..contract.pipeline import Pipeline
from ..errors import IntertitleError, TransientMediaError
from .clip import Clip, read_clip
from .media.doors import media_errors, reason
from .media.segments import media_duration, media_spans
from .timing import Stages
from .viewing import Viewing

_LENGTH = struct.Struct("<Q")


class ReadRequest(msgspec.Struct, tag="read"):
    """The arguments of ``read_clip``. File names are bytes: not every name is text."""

    source: bytes
    pipeline: Pipeline
    viewing: Viewing
    threads: int | None


class SpansRequest(msgspec.Struct, tag="spans"):
    """``segments``: seconds, or ``None`` for scenes."""

    source: bytes
    segments: float | None


class DurationRequest(msgspec.Struct, tag="duration"):
    """How long a file lasts."""

    source: bytes


Request = ReadRequest | SpansRequest | DurationRequest


class ArrayInfo(msgspec.Struct):
    """An array that follows the message."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Answer(msgspec.Struct):
    """``error``: the class of one of our errors; ``ItemError`` stands for one that is not ours.

    What may hold the name of a file is bytes (``encode_text``). ``frame_seconds``: the length of the clip's timing.
    ``spent``: memory ran out, and who knows what is left.
    """

    arrays: list[ArrayInfo] = []
    notes: list[bytes] = []
    seconds: float | None = None
    start: float = 0.0
    frame_seconds: float | None = None
    timings: dict[str, float] = {}
    spans: list[tuple[float, float]] = []
    error: str | None = None
    message: bytes = b""
    trace: bytes = b""
    spent: bool = False


def encode_text(text: str) -> bytes:
    """Text for a message, half characters too: they stand for the bytes of odd file names."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """The text of ``encode_text``."""
    return data.decode("utf-8", "surrogatepass")


def receive(stream: BinaryIO, kind: Any) -> Any:
    """The next message; ``EOFError`` at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return msgspec.msgpack.decode(stream.read(_LENGTH.unpack(head)[0]), type=kind)


def send(stream: BinaryIO, message: msgspec.Struct, arrays: list[npt.NDArray[Any]] | None = None) -> None:
    """A message and its arrays."""
    body = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(body)) + body)
    for array in arrays or []:
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def _limit_memory(limit: int) -> None:
    """No more than ``limit`` bytes of memory of its own, where the system can bound it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    # Not of addresses: a thread reserves more of them than it uses, and there is a thread for every core.
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    given = [value for value in (soft, hard, limit) if value != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (min(given), hard))


def _end_with_parent() -> None:
    """End this process when nobody can read its answers any more, in the midst of a file too."""
    if not hasattr(select, "poll"):  # Windows
        return
    asking = select.poll()
    asking.register(0, 0)

    def watch() -> None:
        while not asking.poll():
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _answer(request: Request) -> tuple[Answer, list[npt.NDArray[Any]]]:
    name = os.fsdecode(request.source)
    try:
        with media_errors(name):
            if isinstance(request, SpansRequest):
                return Answer(spans=media_spans(name, request.segments)), []
            if isinstance(request, DurationRequest):
                return Answer(seconds=media_duration(name)), []
            stages = Stages()
            clip = read_clip(
                name,
                request.pipeline,
                request.viewing,
                stages,
                threads=request.threads,
            )
    except TransientMediaError as error:
        if isinstance(error.__cause__, MemoryError):
            # The limit is ours, and the file would reach it again.
            answer = _refusal("MediaError", f"{name}: reading it takes too much memory")
            answer.spent = True
            return answer, []
        return _refusal("TransientMediaError", str(error)), []
    except IntertitleError as error:
        return _refusal(type(error).__name__, str(error)), []
    except Exception as error:
        return _refusal("ItemError", f"{name}: {reason(error)}"), []
    return _clip_answer(clip, stages)


def _refusal(kind: str, message: str) -> Answer:
    """The answer to a request that raises, made while it is handled."""
    return Answer(error=kind, message=encode_text(message), trace=encode_text(traceback.format_exc()))


def _clip_answer(clip: Clip, stages: Stages) -> tuple[Answer, list[npt.NDArray[Any]]]:
    times = None if clip.timing is None else clip.timing.times
    found = {"frames": clip.frames, "order": clip.order, "sound": clip.sound, "times": times}
    arrays = {name: array for name, array in found.items() if array is not None}
    infos = [ArrayInfo(name, array.dtype.str, list(array.shape)) for name, array in arrays.items()]
    answer = Answer(infos, [*map(encode_text, clip.notes)], clip.seconds, clip.start, timings=stages.seconds)
    answer.frame_seconds = None if clip.timing is None else clip.timing.seconds
    return answer, list(arrays.values())


def main() -> None:
    """Answer requests until stdin ends. The argument is the limit of memory in bytes."""
    # Ctrl-C reaches the whole group of processes. The parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    _limit_memory(int(sys.argv[1]))
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may come between the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        try:
            request = receive(requests, Request)
        except EOFError:
            return
        send(answers, *_answer(request))
