"""What a job does with its inputs, with a captioner that only remembers what it was asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from intertitle.console import save
from intertitle.errors import MediaError
from intertitle.runtime.batch import Entry, Job, RecordFile, Settings, SubtitleWriter, Tally, read_inputs
from intertitle.runtime.batching import BatchItem, BatchResult
from intertitle.runtime.caption import Caption


class Fake:
    """Says what is in a file; ``bad`` in it fails, ``bug`` in it is one. Holds two items before it gives the first."""

    def __init__(self) -> None:
        self.asked: list[BatchItem] = []

    def caption_batch(self, items: Iterable[BatchItem], **_: Any) -> Iterator[BatchResult]:
        held: list[tuple[int, BatchItem]] = []
        for numbered in enumerate(items):
            self.asked.append(numbered[1])
            held.append(numbered)
            if len(held) > 2:
                yield self.result(*held.pop(1))
        for numbered in reversed(held):
            yield self.result(*numbered)

    def result(self, index: int, item: BatchItem) -> BatchResult:
        text = Path(item.source).read_text()
        if "bug" in text:
            raise ZeroDivisionError
        if "bad" in text:
            return BatchResult(index, item, error=MediaError(f"{item.source}: cannot be read"))
        seconds = None if item.end is None else item.end - (item.start or 0)
        caption = Caption(
            text=f"{text}|{item.prompt}|{item.start}|{item.end}",
            token_ids=[1],
            token_logprobs=[-0.5],
            finish_reason="stop",
            mode="video",
            prompt_tokens=3,
            timings={},
            notes=[],
            seconds=seconds or 4.0,
            passes=["greedy"],
        )
        return BatchResult(index, item, caption)


Run = Callable[..., tuple[Tally, list[dict[str, Any]], list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in a directory of its own: the tally, the records and the files that the captioner was given."""
    monkeypatch.chdir(tmp_path)

    def call(*inputs: str, retry_failed: bool = False, **options: Any) -> Any:
        captioner = Fake()
        with RecordFile(Path("out.jsonl"), Settings({"bundle": "b"}), retry_failed=retry_failed) as records:
            entries = read_inputs(inputs, segmented="segments" in options)
            tally = Job(entries, records, **options).run(captioner)
        found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        return tally, found, [os.fspath(item.source) for item in captioner.asked]

    return call


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.mp4").write_text(text)


def test_once_each_in_the_order_of_the_inputs(run: Run):
    write(c="C", a="A", b="bad", d="D")
    tally, records, asked = run("c.mp4", "a.mp4", "b.mp4", "d.mp4")
    assert asked == ["c.mp4", "a.mp4", "b.mp4", "d.mp4"]
    assert [record["file"] for record in records] == asked
    assert [record.get("text") for record in records] == [
        "C|None|None|None",
        "A|None|None|None",
        None,
        "D|None|None|None",
    ]
    assert records[2]["error"] == {"kind": "media", "reason": "b.mp4: cannot be read"}
    assert records[0]["sha256"] == hashlib.sha256(b"C").hexdigest()
    assert records[0]["mean_logprob"] == -0.5
    assert (tally.inputs, tally.finished, tally.captioned, tally.failed) == (4, 4, 3, 1)

    tally, again, asked = run("c.mp4", "a.mp4", "b.mp4", "d.mp4")
    assert (asked, again) == ([], records)
    assert (tally.finished, tally.captioned, tally.already, tally.failures) == (4, 0, 3, 1)
    # Another order, fewer and more inputs: what was there before stays, behind.
    write(e="E")
    _, again, asked = run("e.mp4", "d.mp4", "c.mp4")
    assert asked == ["e.mp4"]
    assert [record["file"] for record in again] == ["e.mp4", "d.mp4", "c.mp4", "a.mp4", "b.mp4"]


def test_failures_are_tried_again_when_asked(run: Run):
    write(a="A", b="bad")
    run("a.mp4", "b.mp4")
    write(b="good")
    os.utime("b.mp4", ns=(1, 1))
    tally, records, asked = run("a.mp4", "b.mp4")
    assert asked == ["b.mp4"]  # its content is another
    assert (tally.captioned, tally.failures) == (1, 0)
    write(b="bad again")
    tally, records, _ = run("a.mp4", "b.mp4")
    assert tally.failures == 1
    tally, _, asked = run("a.mp4", "b.mp4", retry_failed=True)
    assert asked == ["b.mp4"]
    assert (tally.failed, tally.already_failed) == (1, 0)
    assert [record["file"] for record in records] == ["a.mp4", "b.mp4"]


def test_content_decides(run: Run):
    """Touched, moved, copied: no work. Changed: work."""
    write(a="A", b="B", same="A")
    tally, records, asked = run("a.mp4", "b.mp4", "same.mp4")
    assert asked == ["a.mp4", "b.mp4"]
    assert (tally.captioned, tally.copied) == (2, 1)
    assert records[2]["text"] == records[0]["text"]
    assert records[2]["copied_from"] == records[0]["id"]
    assert records[2]["file"] == "same.mp4"
    os.utime("a.mp4", ns=(5, 5))
    Path("b.mp4").rename("moved.mp4")
    tally, records, asked = run("a.mp4", "moved.mp4")
    assert asked == []
    assert (tally.already, tally.copied) == (1, 1)
    write(a="changed")
    tally, records, asked = run("a.mp4", "moved.mp4")
    assert asked == ["a.mp4"]
    assert records[0]["text"].startswith("changed|")
    assert len({record["id"] for record in records}) == len(records) == 4


def test_the_same_content_fails_under_its_own_name(run: Run):
    write(a="bad", b="bad")
    tally, records, asked = run("a.mp4", "b.mp4")
    assert asked == ["a.mp4"]
    assert [record["error"]["reason"] for record in records] == ["a.mp4: cannot be read", "b.mp4: cannot be read"]
    assert (tally.failed, tally.finished) == (2, 2)


def test_a_manifest_with_holes(run: Run):
    write(a="A")
    Path("list.jsonl").write_text(
        '{"file": "a.mp4", "id": "x", "prompt": "What?", "start": 1, "end": 2}\nnonsense\n{"file": "gone.mp4"}\n'
    )
    tally, records, _ = run("list.jsonl")
    assert (records[0]["id"], records[0]["text"]) == ("x", "A|What?|1.0|2.0")
    assert records[1]["line"] == 2
    assert records[1]["error"]["kind"] == "manifest"
    assert records[1]["error"]["reason"].startswith("line 2: ")
    assert records[2]["error"] == {"kind": "media", "reason": "gone.mp4: no such file"}
    tally, again, asked = run("list.jsonl")
    assert (again, asked, tally.already_failed) == (records, [], 2)
    # The same id with another instruction is another caption; a mended line takes the place of its failure.
    write(gone="found", b="B")
    Path("list.jsonl").write_text(
        '{"file": "a.mp4", "id": "x", "prompt": "Who?"}\n{"file": "b.mp4"}\n{"file": "gone.mp4"}\n'
    )
    tally, records, asked = run("list.jsonl")
    assert asked == ["a.mp4", "b.mp4", "gone.mp4"]
    assert [record["text"] for record in records] == ["A|Who?|None|None", "B|None|None|None", "found|None|None|None"]


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv"])
def test_times_that_no_clip_has(name: str, run: Run):
    """The longest time that is captioned is one that the next run reads."""
    write(a="A")
    rows = ["1e12,1e300", "0,1.1e12", "1.1e12,", "9e11,1e12"]
    if name == "list.csv":
        Path(name).write_text("file,start,end\n" + "".join(f"a.mp4,{row}\n" for row in rows))
    else:
        spans = [row.replace(",", ', "end": ') + "null" * row.endswith(",") for row in rows]
        Path(name).write_text("".join(f'{{"file": "a.mp4", "start": {span}}}\n' for span in spans))
    tally, records, asked = run(name)
    assert (asked, tally.captioned) == (["a.mp4"], 1)
    reasons = [record["error"]["reason"].partition(": ")[2] for record in records[:3]]
    assert reasons == [
        "end is seconds from 0 to 1e+12, not 1e+300",
        "end is seconds from 0 to 1e+12, not 1100000000000.0",
        "start is seconds from 0 to 1e+12, not 1100000000000.0",
    ]
    tally, again, asked = run(name)
    assert (again, asked, tally.already) == (records, [], 1)


def test_a_bug_is_no_record(run: Run):
    write(a="A", b="bug", c="C", d="D")
    with pytest.raises(ZeroDivisionError):
        run("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    write(b="fixed")
    tally, records, _ = run("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    assert [record["file"][0] for record in records] == list("abcd")
    assert tally.failures == 0


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were cut into thirds, as a plan says."""
    planned: list[str] = []

    def spans(self: Job, entry: Entry) -> list[tuple[float, float]]:
        planned.append(entry.file)
        if "unreadable" in Path(entry.file).read_text():
            raise MediaError(f"{entry.file}: no")
        return [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]

    monkeypatch.setattr(Job, "_spans", spans)
    return planned


def test_segments_and_their_subtitles(run: Run, cut: list[str], tmp_path: Path):
    write(a="A", b="B", no="unreadable")
    said: list[str] = []

    def subtitles() -> SubtitleWriter:
        files = ["a.mp4", "b.mp4", "no.mp4"]
        return SubtitleWriter(files, ["srt", "vtt"], save, said.append)

    tally, records, asked = run("a.mp4", "b.mp4", "no.mp4", segments=1.0, subtitles=subtitles())
    assert asked == ["a.mp4"] * 3 + ["b.mp4"] * 3
    assert [(record.get("segment"), record.get("segments")) for record in records] == [
        *[(0, 3), (1, 3), (2, 3)] * 2,
        (None, None),
    ]
    assert [(record["start"], record["end"]) for record in records[:3]] == [(0, 1), (1, 2), (2, 3)]
    assert len({record["id"] for record in records}) == 7
    assert (tally.captioned, tally.failed, tally.finished) == (6, 1, 3)
    srt = Path("a.srt").read_text()
    assert srt.split("\n\n")[1] == "2\n00:00:01,000 --> 00:00:02,000\nA|None|1.0|2.0"
    assert Path("b.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nB|None")
    assert not Path("no.srt").exists()

    # Killed after the records and before the subtitles, in the middle of a file: the rest is made, once.
    lines = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text("".join([*lines[:4], *lines[5:6]]))
    Path("a.srt").unlink()
    Path("b.srt").unlink()
    cut.clear()
    tally, again, asked = run("a.mp4", "b.mp4", "no.mp4", segments=1.0, subtitles=subtitles())
    assert asked == ["b.mp4"]
    assert cut == ["b.mp4", "no.mp4"]
    assert [record["id"] for record in again] == [record["id"] for record in records]
    assert Path("a.srt").read_text() == srt
    assert Path("b.srt").exists()
    assert said == []
    # A file of the user's under that name is not written over.
    Path("a.srt").write_text("mine")
    run("a.mp4", "b.mp4", "no.mp4", segments=1.0, subtitles=subtitles())
    assert Path("a.srt").read_text() == "mine"
    assert "a.srt says something else already" in said[0]


def test_ids_that_are_names_of_other_records(run: Run, cut: list[str]):
    write(a="A", b="B", c="C")
    Path("list.jsonl").write_text(
        '{"file": "a.mp4", "id": "x"}\n{"file": "b.mp4", "id": "x/0000"}\n'
        '{"file": "c.mp4", "id": "list.jsonl:4"}\nbad\n'
    )
    # The same lines come twice.
    tally, records, asked = run("list.jsonl", "./list.jsonl", segments=1.0)
    names = ["x/0000", "x/0001", "x/0002", "list.jsonl:2", "list.jsonl:3", "list.jsonl:4"]
    assert [record["id"] for record in records] == names
    assert [record["text"][0] for record in records[:3]] == ["A", "A", "A"]
    assert all("error" in record for record in records[3:])
    tally, again, asked = run("list.jsonl", segments=1.0)
    assert (again, asked, tally.already, tally.already_failed) == (records, [], 3, 3)


def test_subtitles_of_files_that_share_a_name(tmp_path: Path):
    def names(*files: str, directory: Path | None = None) -> set[str]:
        written: list[Path] = []
        writer = SubtitleWriter(files, ["srt"], lambda path, _: written.append(path), print, directory)
        for file in files:
            writer.write(file, [{"text": "x", "seconds": 2.0}])
        return {path.name for path in written}

    assert names("a.mp4", "a.mkv", "b.mp4") == {"a.mp4.srt", "a.mkv.srt", "b.srt"}
    assert names("x/a.mp4", "y/b.mp4", directory=tmp_path) == {"a.srt", "b.srt"}
    with pytest.raises(Exception, match="would have the same subtitle file"):
        names("x/a.mp4", "y/a.mp4", directory=tmp_path)


def test_columns_of_a_manifest_go_into_the_records(run: Run):
    """Whatever they are called, they replace no field of ours, of captions, failures and copies alike."""
    write(a="A", b="bad")
    Path("copy.mp4").write_text("A")
    rows = [
        {"video": "a.mp4", "text": "ground truth", "settings": {"x": 1}, "scene": 7},
        {"video": "b.mp4", "error": "none", "scene": 8},
        {"video": "copy.mp4", "scene": 9},
        {"video": "gone.mp4", "scene": 10},
    ]
    Path("list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, records, _ = run("list.jsonl")
    assert [record["meta"] for record in records] == [
        {"text": "ground truth", "settings": {"x": 1}, "scene": 7},
        {"error": "none", "scene": 8},
        {"scene": 9},
        {"scene": 10},
    ]
    assert records[0]["text"] == "A|None|None|None"
    assert records[0]["settings"] == {"bundle": "b"}
    assert records[1]["error"]["reason"] == "b.mp4: cannot be read"
    assert records[2]["copied_from"] == records[0]["id"]
    assert run("list.jsonl")[1] == records


def test_reasons_of_failures_are_told(run: Run):
    write(a="A", b="bad")
    Path("list.jsonl").write_text('{"file": "a.mp4"}\n{"file": 5}\n{"file": "b.mp4"}\n{"file": "gone.mp4"}\n')
    tally, _, _ = run("list.jsonl")
    assert sorted(tally.reasons) == [
        "b.mp4: cannot be read",
        "gone.mp4: no such file",
        "list.jsonl: line 2: Expected `str`, got `int` - at `$.file`",
    ]
    assert len(tally.reasons) == tally.failed == 3


@pytest.mark.parametrize("function", ["stat", "read"])
def test_a_disk_that_fails_is_asked_again(function: str, run: Run, monkeypatch: pytest.MonkeyPatch):
    """An error of the system while the file is looked at or read for its hash says nothing of the file."""
    write(a="A", b="B")
    module = "intertitle.runtime.batch.content"
    with pytest.MonkeyPatch.context() as patch:
        original = os.stat if function == "stat" else open

        def fail(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == "b.mp4":
                raise OSError(5, os.strerror(5))
            return original(path, *arguments, **options)

        if function == "stat":
            patch.setattr(f"{module}.os", SimpleNamespace(stat=fail, path=os.path))
        else:
            patch.setattr(f"{module}.open", fail, raising=False)
        tally, records, asked = run("a.mp4", "b.mp4")
    assert (tally.captioned, tally.failed, asked) == (1, 1, ["a.mp4"])
    assert records[1]["error"] == {
        "kind": "media",
        "reason": "b.mp4: cannot be read (Input/output error)",
        "transient": True,
    }
    tally, records, asked = run("a.mp4", "b.mp4")
    assert (tally.captioned, tally.failed, asked) == (1, 0, ["b.mp4"])
    assert records[1]["text"].startswith("B|")


def test_a_file_that_crashes_while_it_is_cut(run: Run, faults: None):
    """Files are cut in processes of their own, too."""
    write(crash="C", text="no video")
    tally, records, asked = run("crash.mp4", "text.mp4", segments=1.0)
    assert (tally.finished, tally.failed, asked) == (2, 2, [])
    assert records[0]["error"]["reason"] == "crash.mp4: a decoder crashed on it (SIGSEGV)"
    assert "not a video" in records[1]["error"]["reason"]
