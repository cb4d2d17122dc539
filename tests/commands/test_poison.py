"""Items that would end a run if they could: each costs itself, in batch, pairs and caption of several files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from intertitle.calibration.render import random_scene, write_clip

SHORT = ("--max-new-tokens", 4, "-q")

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(compiled: Callable[..., Path]) -> Path:
    """One that hears."""
    return compiled("av-qwen2", "fp32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a clip under names that say what becomes of the process that opens it."""
    monkeypatch.chdir(tmp_path)
    write_clip(random_scene(1, size=(64, 48), fps=8, seconds=2.0), tmp_path / "first.mp4")
    content = Path("first.mp4").read_bytes()
    for name in ("crash", "abort", "leave", "print", "memory", "disk", "bug"):
        # Not the same content: a copy of a caption is no work.
        Path(f"{name}.mp4").write_bytes(content + name.encode())
    write_clip(random_scene(2, size=(64, 48), fps=8, seconds=2.0), tmp_path / "last.mp4")
    return tmp_path


def records(path: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    named = {Path(record.get("file", record.get("source"))).name: record for record in found}
    assert len(named) == len(found)
    return named


CAPTIONED = {"first.mp4", "print.mp4", "last.mp4"}
FAILED = {
    "crash.mp4": "a decoder crashed on it (SIGSEGV)",
    "abort.mp4": "a decoder crashed on it (SIGABRT)",
    "leave.mp4": "the process that read it ended with exit code 7",
    "memory.mp4": "reading it takes too much memory",
    "disk.mp4": "cannot be read (Input/output error)",
    "bug.mp4": "RuntimeError: of our own",
}


def test_a_batch_of_them(
    bundle: Path, folder: Path, command: Command, data_dir: Path, faults: None, monkeypatch: pytest.MonkeyPatch
):
    """With files that once crashed or ended a run: a record for each, in one go, and nothing twice."""
    hostile = sorted(path for path in (data_dir / "hostile").iterdir() if path.suffix != ".md")
    inputs = ["first.mp4", *FAILED, "print.mp4", *hostile, "last.mp4"]
    result = command("batch", bundle, *inputs, "-o", "out.jsonl", "--debug", *SHORT)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    found = records("out.jsonl")
    assert list(found) == [Path(path).name for path in inputs]
    for name in CAPTIONED | {"ICtCp.mp4", "YCgCo.mp4", "ch8_min.wav"}:  # the last three are whole, only rare
        assert "text" in found[name]
    for name, reason in FAILED.items():
        assert found[name]["error"]["reason"] == f"{name}: {reason}"
    for name in ("16k16.gif", "32k.g.jpg", "chunk.png", "min_bad3.png", "sr0.aac"):
        assert name in found[name]["error"]["reason"]
        assert found[name]["error"]["reason"].isprintable()
    assert "sitecustomize.py" in found["bug.mp4"]["error"]["traceback"]
    assert [name for name, record in found.items() if record.get("error", {}).get("transient")] == ["disk.mp4"]

    # What may pass is tried again, the rest when that is asked for.
    monkeypatch.setenv("PYTHONPATH", "")
    for options, healed in ((), ["disk.mp4"]), (("--retry-failed",), [name for name in FAILED if name != "disk.mp4"]):
        again = command("batch", bundle, "first.mp4", *FAILED, "-o", "out.jsonl", *options, *SHORT)
        assert again.code == (0 if options else 1)
        assert again.err.startswith(f"{len(healed)} captioned, ")
        assert all("text" in records("out.jsonl")[name] for name in healed)


def test_pieces_of_them(bundle: Path, folder: Path, command: Command, data_dir: Path, faults: None):
    hostile = [data_dir / "hostile" / name for name in ("spans.ivf", "scene.flv", "best.flv", "stszraw.mp4", "sr0.aac")]
    result = command(
        "batch", bundle, "first.mp4", "crash.mp4", *hostile, "last.mp4", "-o", "out.jsonl", "--segments", 1, *SHORT
    )
    assert result.code == 1
    found = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    by_name = {name: [each for each in found if Path(each["file"]).name == name] for name in ("first.mp4", "last.mp4")}
    for each in by_name.values():
        assert [(one["start"], one["end"], "text" in one) for one in each] == [(0, 1, True), (1, 2, True)]
    (spans,) = [each for each in found if each["file"].endswith("spans.ivf")]
    assert "not cut into" in spans["error"]["reason"]
    assert {Path(each["file"]).name for each in found} == {
        "first.mp4",
        "crash.mp4",
        "last.mp4",
        *(path.name for path in hostile),
    }


def test_pairs_of_them(bundle: Path, folder: Path, command: Command, faults: None):
    inputs = ["first.mp4", "crash.mp4", "bug.mp4", "disk.mp4", "last.mp4"]
    how = ("--candidates", 2, "--no-refine", "--gap", 0)
    result = command("pairs", bundle, *inputs, "-o", "pairs.jsonl", *how, *SHORT)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    found = records("pairs.jsonl")
    assert list(found) == inputs
    for name in inputs[1:4]:
        assert found[name]["error"]["reason"] == f"{name}: {FAILED[name]}"
    assert found["disk.mp4"]["error"]["transient"]
    assert all(found[name]["candidates"] for name in ("first.mp4", "last.mp4"))


def test_captions_of_several(bundle: Path, folder: Path, command: Command, faults: None):
    inputs = ["crash.mp4", "first.mp4", "bug.mp4", "last.mp4"]
    result = command("caption", bundle, *inputs, "--json", *SHORT)
    assert result.code == 2
    assert [json.loads(line)["file"] for line in result.out.splitlines()] == ["first.mp4", "last.mp4"]
    assert result.err.splitlines() == [f"intertitle: {name}: {FAILED[name]}" for name in ("crash.mp4", "bug.mp4")]


@pytest.mark.parametrize("name", ["batch", "pairs"])
def test_a_time_limit(name: str, bundle: Path, folder: Path, command: Command):
    result = command(name, bundle, "first.mp4", "-o", "out.jsonl", "--item-timeout", 0.001, *SHORT)
    assert result.code == 1
    assert records("out.jsonl")["first.mp4"]["error"]["reason"] == "first.mp4: reading it took more than 0.001 s"


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_no_output_replaces_an_input(link: str | None, bundle: Path, folder: Path, command: Command):
    target = Path("first.mp4")
    if link is not None:
        getattr(Path("other.srt"), link)(target.resolve())
        target = Path("other.srt")
    before = target.read_bytes()
    result = command("caption", bundle, "first.mp4", "--srt", target, *SHORT)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"intertitle: {target}: is an input (first.mp4): choose another name for the output\n"
    assert target.read_bytes() == before
    Path("list.jsonl").write_text('{"file": "first.mp4"}\n')
    for output in ("list.jsonl", "LIST"):
        if output == "LIST":
            if link is None:
                continue
            getattr(Path("LIST"), link)(Path("list.jsonl").resolve())
        for name in ("batch", "pairs"):
            result = command(name, bundle, "list.jsonl", "-o", output, "--overwrite", "-q")
            assert (result.code, result.out) == (2, "")
            assert result.err.startswith(f"intertitle: {output}: is an input (list.jsonl)")
            assert Path("list.jsonl").read_text() == '{"file": "first.mp4"}\n'


@pytest.mark.parametrize("content", [b"my diary\n", b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n", b"\0" * 100])
def test_subtitles_replace_subtitles_only(content: bytes, bundle: Path, folder: Path, command: Command):
    Path("notes").write_bytes(content)
    result = command("caption", bundle, "first.mp4", "--srt", "notes", *SHORT)
    assert (result.code, result.out) == (2, "")
    assert result.err == "intertitle: notes: is there and holds no subtitles: choose another name\n"
    assert Path("notes").read_bytes() == content


def test_a_span_has_its_own_times_in_subtitles(bundle: Path, folder: Path, command: Command):
    """The same cue as a batch gives, also over an older subtitle file."""
    Path("clip.srt").write_text("1\n00:00:00,000 --> 00:00:09,000\nan older one\n")
    command("caption", bundle, "first.mp4", "--start", 0.5, "--end", 1.5, "--srt", "clip.srt", *SHORT)
    Path("list.jsonl").write_text('{"file": "first.mp4", "start": 0.5, "end": 1.5}\n')
    command("batch", bundle, "list.jsonl", "-o", "out.jsonl", "--srt", *SHORT)
    assert Path("clip.srt").read_text().splitlines()[1] == "00:00:00,500 --> 00:00:01,500"
    assert Path("clip.srt").read_text() == Path("first.srt").read_text()
    # A span that is longer than what is left of the clip ends with it.
    command("caption", bundle, "first.mp4", "--start", 1.5, "--end", 9, "--srt", "clip.srt", *SHORT)
    Path("list.jsonl").write_text('{"file": "last.mp4", "start": 1.5, "end": 9}\n')
    command("batch", bundle, "list.jsonl", "-o", "other.jsonl", "--srt", *SHORT)
    for path in ("clip.srt", "last.srt"):
        assert Path(path).read_text().splitlines()[1] == "00:00:01,500 --> 00:00:02,000"


def test_records_say_what_was_asked_and_how(bundle: Path, folder: Path, command: Command):
    """The instruction and the settings as they were in the end: the bundle's own where nothing was given."""
    command("batch", bundle, "first.mp4", "-o", "out.jsonl", "--strategy", "sample", "--seed", 3, *SHORT)
    record = records("out.jsonl")["first.mp4"]
    line = command("caption", bundle, "first.mp4", "--json", "--strategy", "sample", "--seed", 3, *SHORT).out
    said = json.loads(line)
    generation = json.loads((bundle / "bundle.json").read_text())["generation"]
    instruction = json.loads((bundle / "bundle.json").read_text())["default_instruction"]
    assert record["instruction"] == said["instruction"] == instruction
    for decoding in (record["decoding"], said["decoding"]):
        assert (decoding["strategy"], decoding["seed"], decoding["max_new_tokens"]) == ("sample", 3, 4)
        assert decoding["temperature"] == generation["temperature"]
    # What was given is beside it, as before.
    assert record["settings"].keys() == {"bundle", "strategy", "seed", "max_new_tokens"}
    seen = ("--no-audio", "--visual-tokens", "50%", "--duplicates", 2)
    command("batch", bundle, "first.mp4", "-o", "seen.jsonl", *seen, *SHORT)
    settings = records("seen.jsonl")["first.mp4"]["settings"]
    assert settings.pop("bundle")
    assert settings == {"audio": False, "visual_tokens": "50%", "duplicates": 2.0, "max_new_tokens": 4}


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_closed_stdout(bundle: Path, folder: Path):
    command = [
        sys.executable,
        "-m",
        "intertitle",
        "batch",
        str(bundle),
        "first.mp4",
        "-o",
        "out.jsonl",
        *map(str, SHORT),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("1 captioned")
    assert "text" in records("out.jsonl")["first.mp4"]
