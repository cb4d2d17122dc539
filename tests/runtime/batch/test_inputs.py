"""What a batch is asked to caption, against listings made by hand."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from intertitle.errors import OptionError
from intertitle.runtime.batch import BadLine, Entry, read_inputs

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """``tree("a/b.mp4", ...)``: empty files below the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> Path:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        return tmp_path

    return make


def files(*inputs: str) -> list[str]:
    return [entry.file for entry in read_inputs(inputs) if isinstance(entry, Entry)]


def test_folders_are_searched_in_order(tree: Tree):
    tree(
        "c/b.MP4", "c/a.wav", "c/z/1.jpg", "c/z/.hidden.mp4", "c/.git/x.mp4", "c/notes.txt", "c/captions.jsonl", "d.mkv"
    )
    assert files("d.mkv", "c") == ["d.mkv", "c/a.wav", "c/b.MP4", "c/z/1.jpg"]
    assert files("c/notes.txt") == ["c/notes.txt"]  # asked for by name: its content decides


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP])
def test_an_input_that_cannot_be_looked_at(number: int, tree: Tree, monkeypatch: pytest.MonkeyPatch):
    tree("c/a.mp4")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        with pytest.raises(OptionError) as caught:
            read_inputs(["c/a.mp4"])
    assert str(caught.value) == f"c/a.mp4: cannot be read: {os.strerror(number)}"


def test_links_that_go_round(tree: Tree):
    tree("c/a.mp4", "c/d/b.mp4")
    Path("c/d/up").symlink_to("..")
    Path("c/e").symlink_to("d")
    Path("c/gone.mp4").symlink_to("nowhere")
    assert files("c") == ["c/a.mp4", "c/d/b.mp4"]


def test_patterns(tree: Tree):
    tree("c/a.mp4", "c/b.txt", "c/d/e/f.mp4", "c/d/e/g.wav", "odd[1].mp4")
    assert files("c/**/*.mp4") == ["c/a.mp4", "c/d/e/f.mp4"]
    assert files("c/d/e/*") == ["c/d/e/f.mp4", "c/d/e/g.wav"]
    assert files("c/*") == ["c/a.mp4"]
    # A name that is there is a name, whatever its characters.
    assert files("odd[1].mp4") == ["odd[1].mp4"]


def test_the_same_again_is_one(tree: Tree):
    root = tree("c/a.mp4", "c/b.mp4")
    Path("list.csv").write_text("file,prompt\nc/a.mp4,\nc/a.mp4,What?\nc/a.mp4,What?\n")
    found = read_inputs(["c/a.mp4", "c", "./c/../c/a.mp4", root / "c" / "b.mp4", "list.csv"])
    assert [(os.path.basename(entry.file), entry.prompt) for entry in found if isinstance(entry, Entry)] == [  # noqa: PTH119
        ("a.mp4", None),
        ("b.mp4", None),
        ("a.mp4", "What?"),
    ]
    assert len({entry.id for entry in found}) == 3


def test_a_jsonl_manifest(tree: Tree):
    tree("m/x")
    Path("m/list.jsonl").write_text(
        '\ufeff{"file": "a.mp4", "id": 7}\n'
        "\n"
        '{"file": "../b.mp4", "prompt": "Was hört man? 犬", "start": 1, "end": 2.5, "id": "é"}\n'
        '{"file": "c.mp4", "video": "d.mp4"}\n'
        '{"file": 5}\n'
        "no json\n"
        '{"file": "a.mp4", "start": 3, "end": 3}\n'
        '{"file": "a.mp4", "start": -1}\n'
        '{"file": "a.mp4", "id": 7, "end": 1}\n'
        '{"file": "last.mp4"}',
        encoding="utf-8",
    )
    found = read_inputs(["m/list.jsonl"])
    assert [
        (entry.file, entry.prompt, entry.start, entry.end, entry.own_id) for entry in found if isinstance(entry, Entry)
    ] == [
        ("m/a.mp4", None, None, None, "7"),
        ("m/../b.mp4", "Was hört man? 犬", 1, 2.5, "é"),
        ("m/last.mp4", None, None, None, None),
    ]
    bad = {entry.line: entry.reason for entry in found if isinstance(entry, BadLine)}
    assert list(bad) == [4, 5, 6, 7, 8, 9]
    for line, said in {
        4: "names its file twice: 'file' and 'video'",
        5: "$.file",
        6: "malformed",
        7: "not after",
        8: "from 0",
        9: "already that of",
    }.items():
        assert said in bad[line]


def test_a_csv_manifest(tree: Tree):
    tree("m/x")
    Path("m/list.csv").write_bytes(
        '\ufefffile,start,end,id,prompt\r\n"a, b.mp4",0.5,2,01,"say ""what""\nis heard"\r\n'
        "1,,,,\r\n\r\nc.mp4,soon,,,\r\nd.mp4,nan,,,\r\n,1,,,\r\ne.mp4,1,2,3,4,5\r\nf.mp4\r\n".encode()
    )
    found = read_inputs(["m/list.csv"])
    assert [
        (entry.file, entry.prompt, entry.start, entry.end, entry.own_id) for entry in found if isinstance(entry, Entry)
    ] == [
        ("m/a, b.mp4", 'say "what"\nis heard', 0.5, 2, "01"),
        ("m/1", None, None, None, None),
        ("m/f.mp4", None, None, None, None),
    ]
    bad = {entry.line: entry.reason for entry in found if isinstance(entry, BadLine)}
    assert list(bad) == [6, 7, 8, 9]
    for line, said in {6: "soon", 7: "nan", 8: "file", 9: "6 cells under 5 columns"}.items():
        assert said in bad[line]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere.mp4", "nowhere.mp4: no such file or folder"),
        ("c/*.mp4", "matches no video, sound or image files"),
        ("empty", "holds no video, sound or image files"),
        ("nothing.jsonl", "holds no usable line"),
        ("bad.jsonl", "holds no usable line: line 1: "),
        ("header.csv", "the first line names the columns: file or video or path, prompt, start, end, id"),
        ("twice.csv", "no name twice"),
        ("both.csv", "the first line names the columns"),
        ("latin.csv", "is not a CSV file in UTF-8"),
        ("only-header.csv", "holds no usable line"),
    ],
)
def test_what_is_refused(given: str, reason: str, tree: Tree):
    tree("c/a.txt", "empty/.hidden.mp4", "nothing.jsonl")
    Path("bad.jsonl").write_text("what\n")
    Path("header.csv").write_text("name\na.mp4\n")
    Path("twice.csv").write_text("file,note,note\na.mp4,1,2\n")
    Path("both.csv").write_text("file,path\na.mp4,b.mp4\n")
    Path("latin.csv").write_bytes("file\né.mp4\n".encode("latin-1"))
    Path("only-header.csv").write_text("file\n")
    with pytest.raises(OptionError) as caught:
        read_inputs([given])
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("column", ["file", "video", "path"])
def test_columns_that_are_not_ours_come_along(column: str, tree: Tree):
    tree("m/x")
    Path("m/a.csv").write_text(f"split,{column},prompt,label\ntrain,a.mp4,What?,\n,b.mp4,,犬\n", encoding="utf-8")
    Path("m/b.jsonl").write_text(f'{{"{column}": "c.mp4", "label": {{"boxes": [[1, 2.5, null]]}}, "settings": 5}}\n')
    found = read_inputs(["m/a.csv", "m/b.jsonl"])
    assert [(entry.file, dict(entry.meta)) for entry in found if isinstance(entry, Entry)] == [
        ("m/a.mp4", {"split": "train"}),
        ("m/b.mp4", {"label": "犬"}),
        ("m/c.mp4", {"label": {"boxes": [[1, 2.5, None]]}, "settings": 5}),
    ]


def test_the_same_with_other_columns_is_told(tree: Tree):
    """Its columns would be lost, were it taken for a repetition."""
    tree("x")
    Path("a.csv").write_text("file,split,id\na.mp4,train,\na.mp4,test,\na.mp4,train,\na.mp4,test,7\n")
    found = read_inputs(["a.csv"])
    assert [entry.line for entry in found] == [2, 3, 5]  # line 4 repeats line 2
    assert [(bad.line, bad.reason) for bad in found if isinstance(bad, BadLine)] == [
        (3, "asks the same of a.mp4 as line 2, with other columns: add an id")
    ]


def test_ids_that_are_names_of_other_records(tree: Tree):
    """Whichever comes first, the id that somebody chose gives way; ids that only look like such names stay."""
    tree("p.mp4")
    (plain,) = read_inputs(["p.mp4"])
    ids = ["x/0000", "x", "s", "s/0000", "x/00000", "x/12345", "x/1", "y/0000", "m.jsonl:1", "other.jsonl:1", ":1"]
    ids += [f"{plain.id}/0001", plain.id]
    spans = {"s": {"start": 1, "end": 2}}
    rows = [{"file": f"{place}.mp4", "id": name, **spans.get(name, {})} for place, name in enumerate(ids)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = {"m.jsonl:1": "a line of m.jsonl"}
    segments = {name: "a segment of 1.mp4" for name in ("x/0000", "x/12345")}
    segments[f"{plain.id}/0001"] = "a segment of p.mp4"
    for segmented, refused in ((False, taken), (True, taken | segments)):
        found = read_inputs(["m.jsonl", "p.mp4"], segmented=segmented)
        reasons = {ids[entry.line - 1]: entry.reason for entry in found if isinstance(entry, BadLine)}
        assert reasons.pop(plain.id) == f"the id '{plain.id}' is already that of p.mp4"
        assert reasons == {name: f"the id '{name}' is that of {whose}" for name, whose in refused.items()}
        assert len(found) == len({entry.id for entry in found}) == len(ids) + 1


def test_manifests_are_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch):
    tree("x")
    nested = "[" * 101 + "]" * 101
    Path("long.jsonl").write_text(
        '{"file": "a.mp4"}\n'
        f'{{"file": "b.mp4", "text": "{"x" * (1 << 20)}"}}\n'
        f'{{"file": "c.mp4", "deep": {nested}}}\n'
        f'{{"file": "d.mp4", "deep": {"[" * 100_000}}}\n'
        f'{{"file": "e.mp4", "deep": {nested[1:-1]}}}\n'
        '{"file": "f.mp4", "number": 1e999}\n'
    )
    found = read_inputs(["long.jsonl"])
    assert [entry.file for entry in found if isinstance(entry, Entry)] == ["a.mp4", "e.mp4"]
    bad = {entry.line: entry.reason for entry in found if isinstance(entry, BadLine)}
    assert (bad[2], bad[3]) == ("is longer than 1 MiB", "is nested more than 100 deep")
    assert all(len(reason) < 300 for reason in bad.values())
    Path("huge.jsonl").touch()
    os.truncate("huge.jsonl", 1 << 40)  # no disk is used
    with pytest.raises(OptionError, match=r"huge\.jsonl: is larger than 1 GiB: split the manifest"):
        read_inputs(["huge.jsonl"])
    monkeypatch.setattr("intertitle.runtime.batch.inputs.MOST_LINES", 3)
    with pytest.raises(OptionError, match=r"long\.jsonl: has more than 3 lines: split the manifest"):
        read_inputs(["long.jsonl"])
