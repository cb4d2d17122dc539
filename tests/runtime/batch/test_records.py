"""The file of records under everything that may happen to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from intertitle.errors import ItemError, MediaError, OptionError, TransientMediaError
from intertitle.runtime.batch import RecordFile, Settings
from intertitle.runtime.batch.records import encode, error_record

SETTINGS = Settings({"bundle": "b" * 64, "max_new_tokens": 8})


def record(name: str, text: str | None = "a dog", **more: Any) -> dict[str, Any]:
    made = {"id": name, "file": f"{name}.mp4", "start": None, "end": None, "sha256": name, "size": 1, "mtime_ns": 2}
    outcome: dict[str, Any] = {"error": {"kind": "media", "reason": "no"}} if text is None else {"text": text}
    return made | outcome | more


def names(path: Path) -> list[str]:
    """What another program reads."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


ITEMS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=8)


@examples(max_examples=150, deadline=None)
@given(ITEMS, st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1), st.booleans()), max_size=8), st.randoms())
def test_kills_at_any_byte(texts: list[str], runs: list[tuple[int, float, bool]], random: Any):
    """Any number of runs, each killed after some records and some bytes of the next, then one that is not."""
    order = [f"item {index}" for index in range(len(texts))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        on_disk: set[str] = set()
        for survives, part, reordered in [*runs, (len(texts), 1.0, True)]:
            with RecordFile(path, SETTINGS) as records:
                assert set(records.known) == on_disk
                todo = [index for index in range(len(texts)) if order[index] not in on_disk]
                random.shuffle(todo)
                for index in todo[:survives]:
                    records.append(record(order[index], texts[index]))
                    on_disk.add(order[index])
                if reordered:
                    records.finish(order)
                torn = todo[survives : survives + 1]
                if torn:
                    whole = path.stat().st_size
                    records.append(record(order[torn[0]], texts[torn[0]]))
                    written = path.stat().st_size - whole
                    os.truncate(path, whole + int(part * (written - 1)))
            assert {name for name in names_of_whole_lines(path)} == on_disk
        assert names(path) == order
        found = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        assert [entry["text"] for entry in found] == texts
        assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def names_of_whole_lines(path: Path) -> list[str]:
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line)["id"] for line in lines]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_the_file_is_put_in_order(moment: str, path: Path, monkeypatch: pytest.MonkeyPatch):
    with RecordFile(path, SETTINGS) as records:
        for name in "cab":
            records.append(record(name))
    before = path.read_bytes()
    leftover = path.with_name(".captions.jsonl.intertitle-partial")
    leftover.write_bytes(before[:50] if moment == "writing" else before)
    with RecordFile(path, SETTINGS) as records:
        assert not leftover.exists()
        assert path.read_bytes() == before
        records.finish(["a", "b", "c"])
    assert names(path) == ["a", "b", "c"]


def test_one_run_at_a_time_whatever_was_renamed(path: Path):
    with RecordFile(path, SETTINGS) as records:
        records.append(record("b"))
        records.append(record("a"))
        with pytest.raises(OptionError, match="another run is writing it"):
            RecordFile(path, SETTINGS)
        records.finish(["a", "b"])
        with pytest.raises(OptionError, match="another run is writing it"):
            RecordFile(path, SETTINGS)
        records.append(record("c"))
    assert names(path) == ["a", "b", "c"]
    RecordFile(path, SETTINGS).close()


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ({"drop_duplicates": 2.0, "visual_tokens": 0.35}, {"duplicates": 2.0, "visual_tokens": "35%"}),
        ({"visual_tokens": 1e-8}, {"visual_tokens": "0.000001%"}),
        ({"visual_tokens": 256}, {"visual_tokens": "256"}),
        ({"refine": False, "contrasts": [0.5, 1.0]}, {"retrospective": False, "contrast_alpha": [0.5, 1.0]}),
    ],
)
def test_settings_under_their_older_names(older: dict[str, Any], now: dict[str, Any], path: Path):
    with RecordFile(path, Settings(older)) as records:
        records.append(record("a"))
    with RecordFile(path, Settings(now)) as records:
        assert list(records.known) == ["a"]
    with pytest.raises(OptionError, match="was written with other settings"):
        RecordFile(path, Settings({}))


def test_other_settings_are_refused_by_name(path: Path):
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
    before = path.read_bytes()
    other = Settings({"bundle": "b" * 64, "prompt": "What is heard?"})
    with pytest.raises(OptionError) as caught:
        RecordFile(path, other)
    assert "max_new_tokens: there 8, now the default; prompt: there the default, now What is heard?" in str(
        caught.value
    )
    assert path.read_bytes() == before
    with RecordFile(path, other, overwrite=True) as records:
        assert records.known == {}
        records.append(record("z"))
    assert names(path) == ["z"]


@pytest.mark.parametrize("content", [b"my diary", b"a,b\n1,2\n", b'{"id": 5}\n', b"\0" * 40, b'{"file": "a.mp4"}\n'])
def test_no_other_file_is_touched(content: bytes, path: Path):
    path.write_bytes(content)
    for overwrite in (False, True):
        if overwrite and content.startswith(b'{"id": 5'):
            continue
        with pytest.raises(OptionError):
            RecordFile(path, SETTINGS, overwrite=overwrite)
        assert path.read_bytes() == content


def test_failures_are_dropped_for_another_try(path: Path):
    with RecordFile(path, SETTINGS) as records:
        for name, text in [("a", "yes"), ("b", None), ("c", "yes"), ("d", None)]:
            records.append(record(name, text))
    with RecordFile(path, SETTINGS) as records:
        assert [name for name, known in records.known.items() if known.failed] == ["b", "d"]
    with RecordFile(path, SETTINGS, retry_failed=True) as records:
        assert list(records.known) == ["a", "c"]
        records.append(record("d"))
        assert records.read("d")["text"] == "a dog"
        assert records.read("c")["text"] == "yes"
    assert names(path) == ["a", "c", "d"]


def test_a_later_record_stands_for_an_item(path: Path):
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a", "old"))
        records.append(record("b", "b", part_of="x"))
        records.append(record("a", "new"))
        records.append(record("earlier"))
        assert records.captioned_like(("a", None, None, None)) == records.read("a")
        records.finish(["a"], {"a", "x"})
        assert records.read("a")["text"] == "new"
    assert names(path) == ["a", "earlier"]


def test_a_full_disk_costs_nothing_that_was_written(path: Path, monkeypatch: pytest.MonkeyPatch):
    write = os.pwrite
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
        before = path.read_bytes()

        def full(descriptor: int, data: bytes, offset: int) -> int:
            if len(data) > 20:
                return write(descriptor, data[:20], offset)
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "pwrite", lambda d, data, o: full(d, data[:40], o))
        with pytest.raises(OptionError, match=r"captions\.jsonl: cannot be written: No space left on device"):
            records.append(record("b"))
        assert path.read_bytes() == before
        monkeypatch.undo()
        records.append(record("c"))
    assert names(path) == ["a", "c"]


def test_an_output_without_records_leaves_no_file(path: Path):
    RecordFile(path, SETTINGS).close()
    assert not path.exists()
    path.touch()
    RecordFile(path, SETTINGS).close()
    assert path.exists()


def test_a_last_line_without_its_end_is_made_again(path: Path):
    """Its end is what says that it is whole."""
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
        records.append(record("b"))
    os.truncate(path, path.stat().st_size - 1)
    with RecordFile(path, SETTINGS) as records:
        assert list(records.known) == ["a"]
        records.append(record("b"))
    assert names(path) == ["a", "b"]


def test_names_that_are_no_text(path: Path):
    odd = os.fsdecode(b"\xff.mp4")
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a", "犬", file=odd, mean_logprob=float("nan")))
    with RecordFile(path, SETTINGS) as records:
        found = records.read("a")
    assert (found["file"], found["text"], found["mean_logprob"]) == (odd, "犬", None)


WRONG = {
    "settings": [[], "x", None, 5],
    "file": [5, [], {}],
    "sha256": [[], 5, {"a": 1}],
    "size": ["1", -0.5, []],
    "mtime_ns": ["1", []],
    "prompt": [5, []],
    "start": ["0", -1, float("nan"), float("inf"), 10**400],
    "end": [[], float("nan")],
    "seconds": ["4", -1, {}],
    "segments": [0, -1, 10**12, "3", [1], {}],
    "part_of": [5, []],
    "text": [None, 5, []],
    "error": [None, "no", [], {"transient": "yes"}, {"kind": 5}],
    "id": [None, 5, []],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda value: str(value)[:9],
)
def test_fields_of_a_wrong_type_are_told(field: str, value: Any, path: Path):
    """Bit rot and hand edits: nothing hangs, nothing is lost, and the line is named."""
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
        records.append(record("b"))
    first, second = path.read_bytes().splitlines(keepends=True)
    try:
        changed = json.dumps(json.loads(second) | {field: value}).encode() + b"\n"
    except ValueError:  # more digits than Python writes
        changed = (
            json.dumps(json.loads(second) | {field: "DIGITS"}).replace('"DIGITS"', "1" + "0" * 9999) + "\n"
        ).encode()
    path.write_bytes(first + changed)
    for again in ({}, {"retry_failed": True}):
        with pytest.raises(OptionError, match=r"captions\.jsonl: line 2 is not a record of batch"):
            RecordFile(path, SETTINGS, **again)
        assert path.read_bytes() == first + changed


def test_a_file_that_says_that_it_lasts_for_ever(path: Path):
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a", seconds=2.0**80))
    with RecordFile(path, SETTINGS) as records:
        assert records.read("a")["seconds"] == 2.0**80


def test_nesting_is_told(path: Path):
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
    before = path.read_bytes() + b'{"id": "b", "meta": ' + b"[" * 200_000 + b"\n"
    path.write_bytes(before)
    with pytest.raises(OptionError, match="line 2 is not a record"):
        RecordFile(path, SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("zeros", [1, 511, 70_000])
def test_zeros_at_the_end_are_a_torn_line(zeros: int, path: Path):
    """What some file systems leave of a record when the power fails."""
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
        whole = path.read_bytes()
        records.append(record("b"))
    for kept in (whole, path.read_bytes()[:-20]):
        path.write_bytes(kept + bytes(zeros))
        with RecordFile(path, SETTINGS) as records:
            assert list(records.known) == ["a"]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": "a", "caption": "of another program"}',
        b'{"id": "a", "settings": {}}',
        b'{"id": "a", "text": "no dog", "run": 1}\n',
        b'{"id": "a"}\n{"id": "b"',
        bytes(4096),
    ],
)
def test_files_that_begin_alike_are_not_ours(content: bytes, path: Path):
    """A file of one line without an end is whole if it can be read: only a record that broke off is removed."""
    path.write_bytes(content)
    for how in ({}, {"overwrite": True}, {"retry_failed": True}):
        with pytest.raises(OptionError):
            RecordFile(path, SETTINGS, **how)
        assert path.read_bytes() == content


def test_files_beside_the_output_are_not_touched(path: Path):
    beside = [path.with_name(name) for name in (".captions.jsonl.partial", "captions.jsonl.partial", "captions.jsonl~")]
    for each in beside:
        each.write_text("mine")
    with RecordFile(path, SETTINGS) as records:
        for name in "ba":
            records.append(record(name))
        records.finish(["a", "b"])
    assert names(path) == ["a", "b"]
    assert all(each.read_text() == "mine" for each in beside)


def test_what_may_pass_is_tried_again_unasked(path: Path):
    errors = {
        "disk": TransientMediaError("disk.mp4: cannot be read (Input/output error)"),
        "broken": MediaError("broken.mp4: not a video"),
        "bug": ItemError("bug.mp4: ZeroDivisionError"),
    }
    with RecordFile(path, SETTINGS) as records:
        records.append(record("a"))
        for name, error in errors.items():
            made = {key: value for key, value in record(name).items() if key != "text"}
            records.append(made | error_record(error, str(error), debug=False))
    found = {each["id"]: each.get("error") for each in map(json.loads, path.read_bytes().splitlines())}
    assert found == {
        "a": None,
        "disk": {"kind": "media", "reason": "disk.mp4: cannot be read (Input/output error)", "transient": True},
        "broken": {"kind": "media", "reason": "broken.mp4: not a video"},
        "bug": {"kind": "item", "reason": "bug.mp4: ZeroDivisionError"},
    }
    with RecordFile(path, SETTINGS) as records:
        assert list(records.known) == ["a", "broken", "bug"]
    with RecordFile(path, SETTINGS, retry_failed=True) as records:
        assert list(records.known) == ["a"]


def test_the_traceback_of_a_failure_is_kept_when_asked(path: Path):
    try:
        raise ItemError("a.mp4: ZeroDivisionError") from ZeroDivisionError("by zero")
    except ItemError as error:
        found = error_record(error, str(error), debug=True)["error"]
    assert "ZeroDivisionError: by zero" in found["traceback"]
    assert "in test_the_traceback_of_a_failure_is_kept_when_asked" in found["traceback"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(number: int, path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RecordFile(path, SETTINGS) as records:
        for name in "ba":
            records.append(record(name))
        records.finish(["a", "b"])
    assert names(path) == ["a", "b"]


def test_a_record_holds_no_character_that_a_terminal_obeys():
    """``batch -o -`` writes to a terminal, and readers that know U+2028 would see two lines."""
    said = {"id": "a", "text": "\x1b]0;t\x07\x9b2J \u202ex\u2028y\x85 é 犬", "file": "odd\udcff.mp4"}
    line = encode(said).decode()
    assert json.loads(line) == said
    assert line.splitlines() == [line[:-1]]
    assert not set(line) & set("\x1b\x07\x9b\u202e")
    assert "é 犬" in line
