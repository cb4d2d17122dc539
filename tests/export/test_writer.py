"""A bundle is whole or absent: kills, full disks, and what may not be overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from intertitle.contract.manifest import Manifest
from intertitle.errors import BundleError, IntertitleError, OptionError
from intertitle.export import writer as writer_module
from intertitle.export.writer import BundleFile, BundleWriter
from intertitle.runtime.bundle import Bundle

WriteBundle = Callable[..., Path]

#: A child process that writes the bundle whose manifest and files lie in argv[2], with hooks to die in between.
CHILD = """
import os, pathlib, signal, sys, time
import msgspec
from intertitle.errors import IntertitleError
from intertitle.export.writer import BundleFile, BundleWriter
from intertitle.contract.manifest import Manifest

# Tests that run under nohup are deaf to it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
target, source = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
manifest = msgspec.json.decode((source / "manifest").read_bytes(), type=Manifest)
files = {path.name: path.read_bytes() for path in (source / "files").iterdir()}

def write(hook=lambda name: None):
    with BundleWriter(target, overwrite=True) as writer:
        for name, data in files.items():
            with writer.create(name) as file:
                file.write(data[: len(data) // 2])
                hook(name)
                file.write(data[len(data) // 2 :])
        writer.commit(manifest)

"""


@pytest.fixture
def manifest(manifest_json: dict[str, Any]) -> Manifest:
    return msgspec.convert(manifest_json, Manifest)


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest, bundle_files: dict[str, bytes]) -> Path:
    directory = tmp_path_factory.mktemp("source")
    (directory / "manifest").write_bytes(msgspec.json.encode(manifest))
    (directory / "files").mkdir()
    for name, data in bundle_files.items():
        (directory / "files" / name).write_bytes(data)
    return directory


@pytest.fixture
def child(source: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``child(target, script)`` starts a process that runs ``script`` after ``CHILD``."""
    processes: list[subprocess.Popen[str]] = []

    def start(target: Path, script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD + script, str(target), str(source)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def write(path: Path, manifest: Manifest, files: dict[str, bytes], **options: Any) -> Path:
    with BundleWriter(path, **options) as writer:
        for name, data in files.items():
            writer.add_bytes(name, data)
        return writer.commit(manifest)


def use_writer(path: Path, steps: Callable[[BundleWriter], Any], **options: Any) -> None:
    """Run ``steps`` inside the context of a writer."""
    with BundleWriter(path, **options) as writer:
        steps(writer)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert str(error.value).isprintable()
    return str(error.value)


# A bundle that is whole


def test_what_is_written_can_be_opened(tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    path = write(tmp_path / "tiny", manifest, bundle_files, expected_bytes=2000)
    assert path == tmp_path / "tiny"
    assert names(tmp_path) == ["tiny"]
    bundle = Bundle.open(path, "full")
    for name, data in bundle_files.items():
        assert bundle.file(name).read_bytes() == data
        assert bundle.manifest.files[name].size == len(data)
        assert bundle.manifest.files[name].sha256 == hashlib.sha256(data).hexdigest()
    assert msgspec.structs.replace(bundle.manifest, files={}) == manifest


def test_the_same_contents_make_the_same_bundle(tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    first = write(tmp_path / "a", manifest, bundle_files)
    second = write(tmp_path / "b", manifest, dict(reversed(bundle_files.items())))
    assert (first / "bundle.json").read_bytes() == (second / "bundle.json").read_bytes()


def test_the_mode_is_the_users(tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    old = os.umask(0o027)
    try:
        path = write(tmp_path / "tiny", manifest, bundle_files)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert stat.S_IMODE((path / "bundle.json").stat().st_mode) == 0o640


BUFFERS: dict[str, Any] = {
    "bytes": b"abc",
    "nothing": b"",
    "bytearray": bytearray(b"abc"),
    "memoryview": memoryview(b"abcdef")[1:4],
    "every second byte": memoryview(b"abcdef")[::2],
    "float matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half floats": np.arange(6, dtype=np.float16),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "no rows": np.zeros((0, 3), np.int64),
    "a number": np.array(7, np.int32),
    "more than a chunk": np.random.default_rng(0).integers(0, 255, (3, 1_000_000), np.uint8),
}


def test_files_take_any_buffer_and_hash_it(tmp_path: Path):
    with BundleWriter(tmp_path / "tiny") as writer:
        file = writer.create("x")
        expected = b""
        for buffer in BUFFERS.values():
            data = np.asarray(buffer).tobytes() if isinstance(buffer, np.ndarray) else bytes(buffer)
            assert file.write(buffer) == len(data)
            expected += data
            assert file.tell() == len(expected)
        # numpy's tofile would go past the hash.
        with pytest.raises((OSError, io.UnsupportedOperation)):
            np.zeros(3).tofile(file)
        file.close()
        assert file.record.size == len(expected)
        assert file.record.sha256 == hashlib.sha256(expected).hexdigest()
        (partial,) = tmp_path.iterdir()
        assert (partial / "x").read_bytes() == expected
        with pytest.raises(ValueError, match="closed"):
            file.write(b"x")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "bundle.json", "twice"])
def test_names_for_files(tmp_path: Path, name: str):
    with BundleWriter(tmp_path / "tiny") as writer:
        writer.add_bytes("twice", b"")
        with pytest.raises(ValueError, match="no name for a file"):
            writer.create(name)


# A bundle that is absent


def test_an_error_leaves_nothing(tmp_path: Path):
    half: list[BundleFile] = []

    def fail(writer: BundleWriter) -> None:
        writer.add_bytes("whole", b"x")
        half.append(writer.create("half"))
        half[0].write(b"x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_writer(tmp_path / "tiny", fail)
    assert half[0].closed
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path):
    def interrupt(writer: BundleWriter) -> None:
        with writer.create("half") as file:
            file.write(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use_writer(tmp_path / "tiny", interrupt)
    assert names(tmp_path) == []


def test_without_commit_there_is_nothing(tmp_path: Path):
    with BundleWriter(tmp_path / "tiny") as writer:
        writer.add_bytes("x", b"x")
    assert names(tmp_path) == []


def test_an_unfinished_file_is_not_committed(tmp_path: Path, manifest: Manifest):
    with BundleWriter(tmp_path / "tiny") as writer:
        writer.create("x")
        with pytest.raises(ValueError, match="still open: x"):
            writer.commit(manifest)
    assert names(tmp_path) == []


def test_a_manifest_that_could_not_be_opened_is_not_committed(
    tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]
):
    del bundle_files["vision.onnx"]
    with pytest.raises(BundleError, match=r"'vision.onnx' is not listed"):
        write(tmp_path / "tiny", manifest, bundle_files)
    assert names(tmp_path) == []


def test_a_killed_writer(tmp_path: Path, child: Callable[..., subprocess.Popen[str]], source: Path):
    target = tmp_path / "tiny"
    process = child(target, "write(lambda name: name.startswith('decoder') and os.kill(os.getpid(), signal.SIGKILL))")
    assert process.wait(60) == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".tiny.partial-")
    # Another bundle's writer does not care; the next one of this bundle clears up.
    (tmp_path / "tiny2").mkdir()
    with BundleWriter(tmp_path / "tiny3"):
        assert left in names(tmp_path)
    with BundleWriter(target):
        assert left not in names(tmp_path)
    assert names(tmp_path) == ["tiny2"]


def test_a_writer_at_work_is_not_cleared_up(
    tmp_path: Path, child: Callable[..., subprocess.Popen[str]], manifest: Manifest, bundle_files: dict[str, bytes]
):
    target = tmp_path / "tiny"
    process = child(target, "write(lambda name: (print(name, flush=True), time.sleep(600)))")
    assert process.stdout is not None
    assert process.stdout.readline()
    (at_work,) = names(tmp_path)
    write(target, manifest, bundle_files)
    assert names(tmp_path) == [at_work, "tiny"]
    process.kill()
    process.wait(60)
    with pytest.raises(OptionError, match="exists"), BundleWriter(target):
        pass
    assert names(tmp_path) == ["tiny"]


def test_killed_while_replacing(
    tmp_path: Path, child: Callable[..., subprocess.Popen[str]], manifest: Manifest, bundle_files: dict[str, bytes]
):
    """Where names cannot be exchanged there is a moment when no bundle has the final name: the old one waits aside, and
    comes back."""
    target = write(tmp_path / "tiny", manifest, bundle_files)
    before = Bundle.open(target).sha256
    script = """
from intertitle.export import writer
writer._exchange = lambda one, other: False
rename = pathlib.Path.rename
def rename_and_die(self, to):
    rename(self, to)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = rename_and_die
write()
"""
    assert child(target, script).wait(60) == -signal.SIGKILL
    assert not target.exists()
    assert len(names(tmp_path)) == 2
    with pytest.raises(OptionError, match="exists"), BundleWriter(target):
        pass
    assert names(tmp_path) == ["tiny"]
    assert Bundle.open(target, "full").sha256 == before


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_an_exchange(
    tmp_path: Path,
    child: Callable[..., subprocess.Popen[str]],
    manifest: Manifest,
    bundle_files: dict[str, bytes],
    moment: str,
):
    """There is a whole bundle of the name at each moment, and what is left beside it goes with the next writer."""
    target = write(tmp_path / "tiny", msgspec.structs.replace(manifest, name="old"), bundle_files)
    script = f"""
from intertitle.export import writer
exchange = writer._exchange
def die(one, other):
    done = {moment == "before"} or exchange(one, other)
    assert done
    os.kill(os.getpid(), signal.SIGKILL)
writer._exchange = die
write()
"""
    assert child(target, script).wait(60) == -signal.SIGKILL
    assert Bundle.open(target, "full").manifest.name == ("old" if moment == "before" else "tiny")
    assert len(names(tmp_path)) == 2
    with pytest.raises(OptionError, match="exists"), BundleWriter(target):
        pass
    assert names(tmp_path) == ["tiny"]
    assert Bundle.open(target, "full").manifest.name == ("old" if moment == "before" else "tiny")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_writer_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, child: Callable[..., subprocess.Popen[str]], number: signal.Signals
):
    process = child(tmp_path / "tiny", "write(lambda name: (print(name, flush=True), time.sleep(600)))")
    assert process.stdout is not None
    assert process.stdout.readline()
    assert len(names(tmp_path)) == 1
    process.send_signal(number)
    assert process.wait(60) == -number
    assert names(tmp_path) == []


def test_killed_at_any_moment(tmp_path: Path, child: Callable[..., subprocess.Popen[str]]):
    target = tmp_path / "tiny"
    moments = random.Random(0)
    for _ in range(3):
        process = child(target, "while True: write(); print('.', flush=True)")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait(60)
        with contextlib.suppress(OptionError), BundleWriter(target):
            pass
        assert names(tmp_path) == ["tiny"]
        Bundle.open(target, "full")


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("piece", [10, 1000, 3_000_000], ids=["small writes", "buffered writes", "one write"])
def test_a_disk_that_fills_up(small_disk: Path, piece: int):
    def fill(writer: BundleWriter) -> None:
        writer.add_bytes("first", b"x" * 100_000)
        writer._expected = 3_100_000  # as if the disk had been free enough at first
        with writer.create("big.data") as file:
            for _ in range(3_000_000 // piece):
                file.write(b"x" * piece)

    with pytest.raises(IntertitleError) as caught:
        use_writer(small_disk / "tiny", fill)
    message = one_line(caught)
    assert "disk is full" in message
    assert "'big.data'" in message
    assert "of about 3.1 MB" in message
    assert names(small_disk) == []


def test_a_disk_without_room_for_the_manifest(small_disk: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    bundle_files["vision.onnx"] = b"x" * (shutil.disk_usage(small_disk).free - 4096 * (len(bundle_files) - 1))
    with pytest.raises(IntertitleError, match=r"disk is full .*'bundle.json'"):
        write(small_disk / "tiny", manifest, bundle_files)
    assert names(small_disk) == []


def test_a_disk_too_small_is_known_beforehand(tmp_path: Path):
    with pytest.raises(IntertitleError) as caught, BundleWriter(tmp_path / "tiny", expected_bytes=10**18):
        pass
    assert "takes about 1000000000.0 GB, but only" in one_line(caught)
    assert names(tmp_path) == []


def test_a_limit_on_file_sizes(tmp_path: Path, child: Callable[..., subprocess.Popen[str]]):
    """The same without the right to mount: the kernel refuses to let a file grow."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    write()
except IntertitleError as error:
    print(error)
"""
    process = child(tmp_path / "tiny", script)
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert "disk is full" in output
    assert "'decoder.ort.onnx.data'" in output
    assert output.count("\n") == 1
    assert names(tmp_path) == []


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer_module.os, "fsync", broken)
    with pytest.raises(IntertitleError, match="cannot write 'x': Input/output error"):
        use_writer(tmp_path / "tiny", lambda writer: writer.add_bytes("x", b"x"))
    assert names(tmp_path) == []


# What stands at the target


def test_an_existing_bundle(tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    path = write(tmp_path / "tiny", manifest, bundle_files)
    first = Bundle.open(path).sha256
    with pytest.raises(OptionError, match="exists") as caught:
        write(path, manifest, bundle_files)
    one_line(caught)
    assert Bundle.open(path, "full").sha256 == first
    write(path, msgspec.structs.replace(manifest, name="second"), bundle_files, overwrite=True)
    assert Bundle.open(path, "full").manifest.name == "second"
    assert names(tmp_path) == ["tiny"]


def test_an_overwriting_that_fails_keeps_the_old_bundle(
    tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "tiny", manifest, bundle_files)
    first = Bundle.open(path).sha256
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    # Where names cannot be exchanged.
    monkeypatch.setattr(writer_module, "_exchange", lambda one, other: False)
    with pytest.raises(OptionError, match="cannot put the bundle there: Permission denied"):
        write(path, msgspec.structs.replace(manifest, name="second"), bundle_files, overwrite=True)
    assert Bundle.open(path, "full").sha256 == first
    assert names(tmp_path) == ["tiny"]


def add_file(path: Path) -> None:
    (path / "notes.txt").write_text("mine")


def add_directory(path: Path) -> None:
    (path / "mine").mkdir()


def to_link(path: Path) -> None:
    path.rename(path.parent / "real")
    path.symlink_to("real")


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine")


def to_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


NOT_BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (to_file, "not a directory"),
    "a link to a bundle": (to_link, "not a directory"),
    "an empty directory": (to_empty, "no bundle.json"),
    "a bundle with a file added": (add_file, "'notes.txt' does not belong to one"),
    "a bundle with a directory added": (add_directory, "'mine' does not belong to one"),
    "a directory in place of a graph": (
        lambda path: ((path / "vision.onnx").unlink(), (path / "vision.onnx").mkdir()),
        "'vision.onnx' is a directory",
    ),
    "another bundle.json": (lambda path: (path / "bundle.json").write_text('{"version": 3}'), "cannot be read"),
}


@pytest.mark.parametrize("case", NOT_BUNDLES)
def test_what_is_not_a_bundle_is_never_overwritten(
    tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes], case: str
):
    path = write(tmp_path / "tiny", manifest, bundle_files)
    change, reason = NOT_BUNDLES[case]
    change(path)
    before = sorted(str(entry) for entry in tmp_path.rglob("*"))
    with pytest.raises(OptionError) as caught:
        write(path, manifest, bundle_files, overwrite=True)
    assert reason in one_line(caught)
    assert sorted(str(entry) for entry in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["missing file", "changed file", "other schema"])
def test_a_damaged_or_old_bundle_may_be_overwritten(
    tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes], damage: str
):
    path = write(tmp_path / "tiny", manifest, bundle_files)
    if damage == "missing file":
        (path / "vision.onnx").unlink()
    elif damage == "changed file":
        (path / "vision.onnx").write_bytes(b"x")
    else:
        (path / "bundle.json").write_bytes(
            b'{"schema_version": 7, "new": 1, "files": %s}' % msgspec.json.encode(dict.fromkeys(bundle_files, 0))
        )
    with pytest.raises(BundleError):
        Bundle.open(path)
    write(path, manifest, bundle_files, overwrite=True)
    Bundle.open(path, "full")


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, manifest: Manifest, bundle_files: dict[str, bytes]):
    path = tmp_path / "tiny"
    with BundleWriter(path, overwrite=True) as writer:
        for name, data in bundle_files.items():
            writer.add_bytes(name, data)
        path.mkdir()
        (path / "mine").write_text("mine")
        with pytest.raises(OptionError, match="is not a bundle"):
            writer.commit(manifest)
    assert names(tmp_path) == ["tiny"]
    assert (path / "mine").read_text() == "mine"


def test_no_directory_to_write_in(tmp_path: Path):
    with pytest.raises(OptionError, match="create it first") as caught, BundleWriter(tmp_path / "absent" / "tiny"):
        pass
    one_line(caught)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="create it first"), BundleWriter(tmp_path / "file" / "tiny"):
        pass


@pytest.mark.parametrize("name", [".", "..", "x/..", "/", "n" * 300])
def test_targets_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "work" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(OptionError), BundleWriter(name, overwrite=True):
        pass
    assert names(tmp_path) == ["work"]
    assert names(tmp_path / "work") == ["x"]
