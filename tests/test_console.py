"""What is shown while the command works, and how results reach stdout and files."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.console import BatchDisplay, ProgressDisplay, check_savable, describe, one_line, save, show, table
from intertitle.contract.pipeline import EachOf, EachUnit, PromptLayout, Stage, StageInput, Variant
from intertitle.errors import OptionError
from intertitle.runtime.batch import Tally
from intertitle.runtime.bundle import Bundle
from msgspec.structs import replace
from rich.table import Table

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes the captured stderr for a terminal of 80 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def test_plain_lines_one_for_each_stage(capsys: Capture):
    with ProgressDisplay() as progress:
        for stage, done in [("tracing vision", 0), ("writing vision", 0), ("writing vision", 5), ("writing\nall", 9)]:
            progress(stage, done, 9)
    progress("too late", 0, 0)
    assert capsys.readouterr() == ("", "tracing vision\nwriting vision\nwriting\\nall\n")


def test_a_file_is_one_plain_line(capsys: Capture):
    with ProgressDisplay(captioning="a folder/clip.mp4") as progress:
        for stage in ("open", "load", "vision", "load", "decode"):
            progress(stage, 0, 0)
    assert capsys.readouterr() == ("", "captioning a folder/clip.mp4\n")


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_quiet(kind: str, capsys: Capture, request: pytest.FixtureRequest):
    if kind == "terminal":
        request.getfixturevalue("terminal")
    with ProgressDisplay(quiet=True, captioning="clip.mp4") as progress:
        progress("vision", 1, 8)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(terminal: None, capsys: Capture):
    with ProgressDisplay(captioning="clips/holiday.mp4") as progress:
        assert progress._bar is not None
        progress("vision", 3, 8)
        (task,) = progress._bar.tasks
        assert (task.description, task.fields["count"]) == ("holiday.mp4: vision", "3/8 frames")
        assert (task.completed, task.total) == (3, 8)
        progress("decode", 7, 100)
        progress("decode", 0, 0)  # how each token begins
        assert (task.fields["count"], task.completed, task.total) == ("7/100 tokens", 7, 100)
        progress("writing decoder", 2_000_000, 5_000_000)
        assert task.fields["count"] == "2/5 MB"
        progress("read_frames", 0, 0)
        assert (task.description, task.fields["count"], task.total) == ("holiday.mp4: read frames", "", None)
        progress._bar.refresh()
    out, err = capsys.readouterr()
    assert out == ""
    assert "holiday.mp4: read frames" in err
    # Gone in the end: the last thing is to erase the line of the bar.
    assert err.endswith("\x1b[1A\x1b[2K")


def test_long_names_leave_room_for_the_bar(terminal: None):
    with ProgressDisplay(captioning="x" * 300 + "/" + "y" * 300 + ".mp4") as progress:
        progress("prefill", 5, 1541)
        assert progress._bar is not None
        (task,) = progress._bar.tasks
        assert task.description.endswith("yyy.mp4: prefill")
        assert len(task.description) <= 32


def test_stdout_is_left_alone_while_a_bar_is_shown(terminal: None, capsys: Capture):
    before = sys.stdout, sys.stderr
    with ProgressDisplay() as progress:
        progress("vision", 1, 2)
        assert (sys.stdout, sys.stderr) == before
        print("a caption")
    assert capsys.readouterr().out == "a caption\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``clock(seconds)`` goes on by so much."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_batch_in_plain_lines(clock: Callable[[float], None], capsys: Capture):
    """By hand: a clip every 3 s; what an earlier run had done does not count as speed."""
    tally = Tally(inputs=40)
    with BatchDisplay(40) as display:
        for _ in range(10):
            tally.already += 1
            tally.finished += 1
            display(tally)
        for done in range(1, 9):
            clock(3)
            tally.captioned, tally.failed, tally.finished = done - done // 8, done // 8, 10 + done
            display(tally)
    # Of 40 inputs 26 and 23 are left, at 3 s each.
    assert capsys.readouterr() == (
        "",
        "14/40, 20.0 clips/min, 1:18 left\n18/40, 20.0 clips/min, 1 failed, 1:06 left\n",
    )
    display.summary(tally)
    assert capsys.readouterr().err == (
        "7 captioned, 10 already done, 0 copied, 1 failed; 17.5 clips/min, 0:24 in all\n"
    )


def test_the_speed_of_a_batch_is_that_of_the_last_minute(clock: Callable[[float], None]):
    tally = Tally(inputs=1000)
    with BatchDisplay(1000) as display:
        for seconds in [1] * 100 + [10] * 10:
            clock(seconds)
            tally.captioned += 1
            tally.finished += 1
            display(tally)
        assert "6.0 clips/min" in display.state(tally)
        assert "2:28:20 left" in display.state(tally)  # 890 of 10 s


def test_a_batch_on_a_terminal_and_a_quiet_one(terminal: None, clock: Callable[[float], None], capsys: Capture):
    tally = Tally(inputs=3, finished=2, captioned=2)
    with BatchDisplay(3) as display:
        clock(4)
        display(tally)
        assert display._bar is not None
        (task,) = display._bar.tasks
        assert (task.completed, task.total, task.fields["count"]) == (2, 3, "2/3, 30.0 clips/min, 0:02 left")
    assert capsys.readouterr().out == ""
    with BatchDisplay(3, quiet=True) as display:
        clock(60)
        display(tally)
    assert capsys.readouterr() == ("", "")


@given(st.text())
def test_one_line_is_one_line(text: str):
    shown = one_line(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_one_line_by_hand():
    assert one_line("two\nlines\t\x1b[31m \udcff é 犬") == "two\\nlines\\t\\x1b[31m \\udcff é 犬"


def test_tables_are_plain_and_aligned(capsys: Capture):
    made = table("stage", ">MB")
    made.add_row("vision", "0.4")
    made.add_row("decoder", "1,234.5")
    show("a line " + "that is long " * 20, made)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a line " + "that is long " * 20
    header, _, first, second = (line.split() for line in lines[1:])
    assert (header, first, second) == (["stage", "MB"], ["vision", "0.4"], ["decoder", "1,234.5"])
    assert lines[3].index("0.4") + 3 == lines[4].index("1,234.5") + 7
    assert all(line == line.rstrip() for line in lines[1:])


def test_a_bundle_described(write_bundle: Callable[..., Path], tmp_path: Path):
    """By hand from the manifest of ``conftest.py``."""
    first, parts, facts = describe(Bundle.open(write_bundle(tmp_path / "bundle")).manifest)
    assert first == "tiny: videollama2, for cpu (ort), decoder int4"
    assert cells(facts) == {
        "pictures": "8 frames of a clip (centered), 40 visual tokens",
        "sound": "1496 audio tokens",
        "modes": "video, audio, audiovideo",
        "prompt": '"Describe the video in detail." unless another is given',
        "decoding": "greedy unless asked otherwise, up to 16 new tokens, context 64 tokens, repetition penalty 1",
        "sampling": "temperature 0.2, top-p 0.9, top-k off",
        # Keys and values of one layer, one head of two floats; the context ends a caption after 64 tokens.
        "memory": "0.0 MB of weights are loaded; the embedding stays on disk. The cache takes 16 bytes a token "
        "(float32): 0.0 MB for a whole clip with the longest caption. Activations come on top.",
        "time": "depends on the machine: intertitle caption BUNDLE CLIP --json prints the seconds of each stage",
        "made from": "tiny by intertitle 0",
    }
    assert isinstance(parts, Table)
    columns = {str(column.header): list(column.cells) for column in parts.columns}
    assert columns["component"] == ["vision", "connector", "audio", "decoder", "embedding", "8 files"]
    assert columns["weights"] == ["fp32", "fp32", "fp32", "int4", "bfloat16", ""]
    assert columns["parameters"] == ["10", "10", "10", "10", "28", ""]


def cells(facts: Table | str) -> dict[Any, Any]:
    assert isinstance(facts, Table)
    names, values = (list(column.cells) for column in facts.columns)
    return dict(zip(names, values, strict=True))


def test_the_shipped_bundle_described_fits_80_columns(
    write_bundle: Callable[..., Path], tmp_path: Path, capsys: Capture
):
    manifest = Bundle.open(write_bundle(tmp_path / "bundle")).manifest
    long = replace(manifest, default_instruction="Describe [bold] the video " * 12 + "\x1b[2J")
    show(*describe(long), columns=80)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert " ".join(out.split()).count("Describe [bold] the video") == 12
    assert "\x1b" not in out


def test_ratios_of_merging_described(write_bundle: Callable[..., Path], tmp_path: Path):
    manifest = Bundle.open(write_bundle(tmp_path / "bundle")).manifest
    whole, tenth = (Variant(keep=keep, graph="a", tokens=tokens) for keep, tokens in ((1.0, 9), (0.1, 2)))
    for variants, said in (
        ((whole, tenth), "72 visual tokens (merging: 100% gives 72, 10% gives 16)"),
        ((whole,), "72 visual tokens"),
        ((tenth,), "16 visual tokens (merging: 10% gives 16)"),
    ):
        inputs = (StageInput("pixels", "pixels"),)
        stage = Stage(name="vision", unit=EachUnit(), inputs=inputs, output="x", tokens=9, variants=variants)
        prompts = {"video": PromptLayout((EachOf("vision"),))}
        pipeline = replace(manifest.pipeline, stages=(stage,), prompts=prompts, sound=None)
        *_, facts = describe(replace(manifest, pipeline=pipeline))
        assert cells(facts)["pictures"] == f"8 frames of a clip (centered), {said}"


def test_save_is_whole_or_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    save(path, "first é\n")
    link.symlink_to(path)
    save(link, "second é\n")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "second é\n"

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OptionError, match=r"a\.json: cannot be written: No space left"):
            save(path, "third")
    assert path.read_text(encoding="utf-8") == "second é\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "link.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_save_writes_into_devices(tmp_path: Path):
    with pytest.raises(OptionError, match="/dev/full: cannot be written: No space left"):
        save(Path("/dev/full"), "text")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    save(Path("/dev/null"), "text")


def test_places_that_cannot_be_saved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_savable(tmp_path / "new.srt")
    check_savable(Path("new.srt"))
    assert not (tmp_path / "new.srt").exists()
    with pytest.raises(OptionError, match="there is no directory"):
        check_savable(tmp_path / "missing" / "new.srt")
    with pytest.raises(OptionError, match="it is a directory"):
        check_savable(tmp_path)
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OptionError, match=r"new\.srt: cannot be written: no permission"):
        check_savable(tmp_path / "new.srt")
