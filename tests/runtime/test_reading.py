"""Files that are read in processes of their own, and all that may happen to such a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import intertitle
import numpy as np
import pytest
from intertitle.contract.pipeline import Pipeline
from intertitle.errors import IntertitleError, ItemError, MediaError, OptionError, TransientMediaError
from intertitle.runtime.clip import read_clip
from intertitle.runtime.media.segments import media_spans
from intertitle.runtime.reading import Readers, start_readers
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Viewing


@pytest.fixture(scope="module")
def pipeline(compiled: Callable[..., Path]) -> Pipeline:
    return intertitle.Captioner.load(compiled("av-qwen2", "fp32")).manifest.pipeline


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from intertitle.calibration.render import random_scene, write_clip

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(random_scene(3, size=(96, 64), fps=10, seconds=4.0), path)
    return path


@pytest.fixture
def named(clip: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the clip under another name."""

    def copy(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(clip.read_bytes())
        return path

    return copy


def workers() -> set[int]:
    """The processes that this one has started and that run."""
    return children(os.getpid())


def children(parent: int) -> set[int]:
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            # The first thread of a process that was killed may be gone before the others (field 20 counts them).
            if int(fields[1]) == parent and (fields[0] != "Z" or int(fields[17]) > 1):
                found.add(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [{}, {"start": 1.0, "end": 2.5}, {"duplicates": 200.0}], ids=str)
def test_a_worker_reads_what_this_process_would(how: dict[str, float], clip: Path, pipeline: Pipeline):
    mine = read_clip(clip, pipeline, Viewing(**how), Stages())  # type: ignore[arg-type]
    stages = Stages()
    with Readers() as readers:
        theirs = readers.read(clip, pipeline, Viewing(**how), stages)  # type: ignore[arg-type]
    for name in ("frames", "order", "sound"):
        expected, found = getattr(mine, name), getattr(theirs, name)
        assert expected is not None
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert found.flags.writeable
    assert (theirs.notes, theirs.seconds, theirs.start) == (mine.notes, mine.seconds, mine.start)
    assert {"open", "read_frames", "read_audio"} <= stages.seconds.keys()


def test_spans_and_errors_come_back_as_they_are(clip: Path, pipeline: Pipeline, tmp_path: Path):
    broken = tmp_path / os.fsdecode(b"\xff odd.mp4")
    broken.write_bytes(b"no video at all")
    image = tmp_path / "a.png"
    assert cv2.imwrite(os.fspath(image), np.zeros((30, 40, 3), np.uint8))

    def refusals(read: Callable[..., object], spans: Callable[..., object]) -> Iterator[tuple[type, str]]:
        for call in (
            lambda: read(broken, pipeline, Viewing(), Stages()),
            lambda: read(tmp_path / "gone.mp4", pipeline, Viewing(), Stages()),
            lambda: read(clip, pipeline, Viewing(start=50.0), Stages()),
            lambda: read(image, pipeline, Viewing(start=0.0), Stages()),
            lambda: spans(broken, 1.0),
        ):
            with pytest.raises(IntertitleError) as caught:
                call()
            yield type(caught.value), str(caught.value)

    with Readers() as readers:
        assert readers.spans(clip, 1.5) == media_spans(os.fspath(clip), 1.5) == [(0.0, 1.5), (1.5, 3.0), (3.0, 4.0)]
        theirs = list(refusals(readers.read, readers.spans))
        assert theirs == list(refusals(read_clip, media_spans))
        assert [kind for kind, _ in theirs] == [MediaError, MediaError, MediaError, OptionError, MediaError]
        # A worker that says no is as good as before.
        assert len(workers()) == 1


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("crash.mp4", MediaError, "a decoder crashed on it (SIGSEGV)"),
        ("abort.mp4", MediaError, "a decoder crashed on it (SIGABRT)"),
        ("leave.mp4", MediaError, "the process that read it ended with exit code 7"),
        ("memory.mp4", MediaError, "reading it takes too much memory"),
        ("disk.mp4", TransientMediaError, "Input/output error"),
        ("bug.mp4", ItemError, "RuntimeError: of our own"),
    ],
)
def test_what_a_file_does_to_its_worker(
    name: str, kind: type, reason: str, faults: None, named: Callable[[str], Path], pipeline: Pipeline
):
    path = named(name)
    with Readers() as readers:
        for _ in range(2):
            with pytest.raises(IntertitleError) as caught:
                readers.read(path, pipeline, Viewing(), Stages())
            assert type(caught.value) is kind
            assert str(caught.value).startswith(f"{path}: ")
            assert reason in str(caught.value)
        assert readers.read(named("good.mp4"), pipeline, Viewing(), Stages()).frames is not None


def test_what_libraries_print_is_no_answer(faults: None, named: Callable[[str], Path], pipeline: Pipeline):
    with Readers() as readers:
        assert readers.read(named("print.mp4"), pipeline, Viewing(), Stages()).seconds == pytest.approx(4.0)


def test_a_file_that_takes_too_long(faults: None, named: Callable[[str], Path], pipeline: Pipeline):
    good = named("good.mp4")
    with Readers(time_limit=60.0) as readers:
        readers.read(good, pipeline, Viewing(), Stages())  # the worker is there
        readers._time_limit = 1.0
        began = time.monotonic()
        with pytest.raises(MediaError, match=r"hang\.mp4: reading it took more than 1 s"):
            readers.read(named("hang.mp4"), pipeline, Viewing(), Stages())
        assert 1.0 <= time.monotonic() - began < 10.0
        readers._time_limit = 60.0
        readers.read(good, pipeline, Viewing(), Stages())


def test_a_worker_that_is_killed(faults: None, named: Callable[[str], Path], pipeline: Pipeline):
    """While it waits: nobody is the wiser. While it reads: the system was short of memory, and may not be again."""
    good, hang = named("good.mp4"), named("hang.mp4")
    with Readers() as readers:
        readers.read(good, pipeline, Viewing(), Stages())
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not workers())
        readers.read(good, pipeline, Viewing(), Stages())
        (worker,) = workers()
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        with pytest.raises(TransientMediaError, match=r"hang\.mp4: the process that read it was killed"):
            readers.read(hang, pipeline, Viewing(), Stages())
        readers.read(good, pipeline, Viewing(), Stages())
    wait_until(lambda: not workers())


def test_closing_ends_what_is_under_way(faults: None, named: Callable[[str], Path], pipeline: Pipeline):
    """And what waits for a worker."""
    readers, said = Readers(), []

    def read(path: Path) -> None:
        with pytest.raises(TransientMediaError) as caught:
            readers.read(path, pipeline, Viewing(), Stages())
        said.append(str(caught.value))

    threads = [threading.Thread(target=read, args=(named(f"hang{number}.mp4"),)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    readers.close()
    for thread in threads:
        thread.join(10.0)
    assert len(said) == 3
    assert not workers()


def test_no_process_can_be_started(named: Callable[[str], Path], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    """For a moment, as when there are too many open files."""
    start = subprocess.Popen

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(subprocess, "Popen", fail)
    with Readers() as readers:
        for _ in range(2):
            with pytest.raises(TransientMediaError, match=r"can be started to read it \(Too many open files\)"):
                readers.read(named("good.mp4"), pipeline, Viewing(), Stages())
        monkeypatch.setattr(subprocess, "Popen", start)
        assert readers.read(named("good.mp4"), pipeline, Viewing(), Stages()).frames is not None


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), 1e300, 10**400, "x", None, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_time_limit_that_no_timer_can_wait_for(limit: Any, frozen: bool, monkeypatch: pytest.MonkeyPatch):
    before = workers()
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    with pytest.raises(OptionError, match=r"item_timeout is seconds above 0 and at most [0-9]+, not "):
        start_readers(1, limit)
    assert workers() <= before


def test_the_longest_time_limit(clip: Path, pipeline: Pipeline):
    for limit in (threading.TIMEOUT_MAX, np.float32(60), 60):
        with Readers(time_limit=limit) as readers:
            assert readers.read(clip, pipeline, Viewing(), Stages()).frames is not None


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is bounded on Linux")
def test_memory_is_bounded(clips, pipeline: Pipeline):
    """A decoder of large frames takes more than the limit: its file fails, and a small one after it does not."""
    large = clips.encode("large.mp4", 3, (3840, 2160), options={"preset": "ultrafast"})
    small = clips.encode("small.mp4", 3)
    with Readers(memory_limit=160 << 20) as readers:
        with pytest.raises(MediaError) as caught:
            readers.read(large, pipeline, Viewing(), Stages())
        assert str(caught.value).startswith(str(large))
        assert readers.read(small, pipeline, Viewing(), Stages()).frames is not None
    with Readers() as readers:
        assert readers.read(large, pipeline, Viewing(), Stages()).frames is not None


_PARENT = """
import sys, threading
from intertitle.runtime.reading import Readers
readers = Readers(2)
threading.Thread(target=readers.spans, args=(sys.argv[1], 1.0), daemon=True).start()
print("started", flush=True)
threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(sent: signal.Signals, faults: None, named: Callable[[str], Path]):
    """One that is idle and one that will not be done for 1,000 seconds."""
    command = [sys.executable, "-c", _PARENT, str(named("hang.mp4"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        started = children(parent.pid)
        assert len(started) == 2
        time.sleep(1.0)
        if sent == signal.SIGINT:
            os.killpg(parent.pid, sent)  # as Ctrl-C in a terminal
        else:
            parent.send_signal(sent)
        _, said = parent.communicate(timeout=30)
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in started))
    assert said.count(b"Traceback") == (sent == signal.SIGINT)  # the parent's own


def test_a_script_without_a_main_guard(clip: Path, compiled: Callable[..., Path], tmp_path: Path):
    """Workers are no copies of the program that started them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, intertitle\n"
        "print('once')\n"
        "captioner = intertitle.Captioner.load(sys.argv[1])\n"
        "how = intertitle.Decoding(max_new_tokens=2)\n"
        "print(*(result.error for result in captioner.caption_batch([sys.argv[2]] * 2, decoding=how)))\n"
    )
    command = [sys.executable, str(script), str(compiled("av-qwen2", "fp32")), str(clip)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert (done.stdout, done.stderr) == ("once\nNone None\n", "")
