"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from intertitle.whole_files import discard, whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_takes_the_place_of_another(tmp_path: Path, alone: bool):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path, alone=alone) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
    assert path.read_text() == "new"

    def fail() -> None:
        with whole(path, alone=alone) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_whole(tmp_path: Path):
    def fail() -> None:
        with whole(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / "a").write_text("a")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert names(tmp_path) == []
    with whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_runs_leave_one_file_at_most(tmp_path: Path):
    program = (
        "import os, sys; from pathlib import Path; from intertitle.whole_files import whole\n"
        "with whole(Path(sys.argv[1]), alone=True) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "a"
    path.write_text("old")
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program, os.fspath(path)], check=False)
        assert done.returncode == -9
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    discard(path)
    assert names(tmp_path) == ["a"]
