"""``intertitle batch`` as a user meets it, on a fixture bundle: records, resuming, refusals, kills, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import intertitle
import pytest
from intertitle.benchmarks.batch_kills import run_kills, write_inputs
from intertitle.calibration.render import random_scene, write_clip
from intertitle.runtime.batch import RecordFile, Settings

Compiled = Callable[..., Path]
SHORT = ("--max-new-tokens", 6, "--no-audio")


Run = Callable[..., Any]


@pytest.fixture
def run(command: Run) -> Run:
    return partial(command, "batch")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, a copy of the first and a file that is none."""
    folder = tmp_path_factory.mktemp("batch") / "clips"
    write_inputs(folder, 3)
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_what_the_captioner_says(bundle: Path, clips: Path, run: Run, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    result = run(bundle, clips, "-o", output, *SHORT)
    assert (result.code, result.out) == (1, "")
    *_, summary, failure, hint = result.err.splitlines()
    assert summary.startswith("3 captioned, 0 already done, 1 copied, 1 failed; ")
    assert failure.startswith("  failed: ")
    assert hint == "  --retry-failed tries them again"
    found = records(output)
    assert [Path(record["file"]).name for record in found] == [
        "clip000.mp4", "clip001.mp4", "clip002.mp4", "copy.mp4", "junk.mp4",
    ]  # fmt: skip
    captioner = intertitle.Captioner.load(bundle)
    for record in found[:4]:
        caption = captioner.caption(record["file"], audio=False, decoding=intertitle.Decoding(max_new_tokens=6))
        assert (record["text"], record["token_ids"]) == (caption.text, caption.token_ids)
        assert record["mean_logprob"] == pytest.approx(caption.mean_logprob, abs=1e-4)
        assert record["seconds"] == caption.seconds
    assert found[4]["error"]["kind"] == "media"
    assert "not a video" in found[4]["error"]["reason"]

    again = run(bundle, clips, "-o", output, "-q", *SHORT)
    assert again.code == 1  # the failure of before still counts
    assert again.err.startswith("0 captioned, 4 already done, 0 copied, 1 failed (1 of them before); ")
    assert records(output) == found
    assert run(bundle, clips / "copy.mp4", "-o", output, *SHORT).code == 0
    assert run(bundle, clips / "junk.mp4", "-o", output, "--retry-failed", "-q", *SHORT).err.startswith(
        "0 captioned, 0 already"
    )

    refused = run(bundle, clips, "-o", output, "--max-new-tokens", 7, "--no-audio", "-q")
    assert refused == (
        2,
        "",
        f"intertitle: {output}: was written with other settings (max_new_tokens: there 6, now 7); "
        "--overwrite starts afresh\n",
    )
    assert run(bundle, clips / "copy.mp4", "-o", output, "--overwrite", "--max-new-tokens", 7).code == 0
    assert len(records(output)) == 1


def test_to_stdout(bundle: Path, clips: Path, run: Run):
    result = run(bundle, clips / "clip000.mp4", "-o", "-", "-q", *SHORT)
    assert result.code == 0
    assert json.loads(result.out)["file"] == str(clips / "clip000.mp4")
    assert result.err.startswith("1 captioned")


def test_segments_and_subtitles(bundle: Path, run: Run, tmp_path: Path):
    clip = tmp_path / "long.mp4"
    write_clip(random_scene(1, size=(64, 48), fps=8, seconds=3.0), clip)
    result = run(bundle, clip, "-o", tmp_path / "out.jsonl", "--segments", 1, "--srt", "--vtt", *SHORT)
    assert (result.code, result.out) == (0, "")
    found = records(tmp_path / "out.jsonl")
    assert [(record["start"], record["end"]) for record in found] == [(0, 1), (1, 2), (2, 3)]
    captioner = intertitle.Captioner.load(bundle)
    alone = captioner.caption(clip, start=1, end=2, audio=False, decoding=intertitle.Decoding(max_new_tokens=6))
    assert found[1]["token_ids"] == alone.token_ids
    for name, kind in (("long.srt", "srt"), ("long.vtt", "webvtt")):
        with av.open(str(tmp_path / name), format=kind) as subtitles:
            cues = [packet for packet in subtitles.demux() if packet.size]
        assert [(cue.pts, cue.duration) for cue in cues] == [(0, 1000), (1000, 1000), (2000, 1000)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["CLIPS"], "Missing option '-o'"),
        (["-o", "out.jsonl"], "Missing argument 'INPUTS...'"),
        (["nowhere.mp4", "-o", "out.jsonl"], "nowhere.mp4: no such file or folder"),
        (["none/*.mp4", "-o", "out.jsonl"], "none/*.mp4: matches no video, sound or image files"),
        (["empty", "-o", "out.jsonl"], "empty: the folder holds no video, sound or image files"),
        (["bad.csv", "-o", "out.jsonl"], "bad.csv: the first line names the columns"),
        (["bad.jsonl", "-o", "out.jsonl"], "bad.jsonl: the manifest holds no usable line: line 1: "),
        (["CLIPS", "-o", "missing/out.jsonl"], "there is no directory missing"),
        (["CLIPS", "-o", "bad.jsonl"], "bad.jsonl: line 1 is not a record of batch"),
        (["CLIPS", "-o", "bad.jsonl", "--overwrite"], "bad.jsonl: is not an output of batch, so it is not overwritten"),
        (["CLIPS", "-o", "bad.csv"], "bad.csv: records are written as JSON lines"),
        (["CLIPS", "-o", "out.parquet"], "out.parquet: records are written as JSON lines"),
        (["CLIPS", "bad.jsonl", "-o", "./bad.jsonl", "--overwrite"], "bad.jsonl: is an input (bad.jsonl)"),
        (["CLIPS", "-o", "out.jsonl", "--prompt", "a", "--prompt", "b"], "give it once"),
        (["CLIPS", "-o", "out.jsonl", "--num-beams", "2"], "does nothing without --strategy beam"),
        (["CLIPS", "-o", "locked.jsonl"], "locked.jsonl: another run is writing it"),
        (["CLIPS", "-o", "-", "--srt"], "need an output file, not -o -"),
        (["CLIPS", "-o", "out.jsonl", "--retry-failed", "--overwrite"], "exclude each other"),
        (["CLIPS", "-o", "out.jsonl", "--subtitles-dir", "empty"], "goes with --srt or --vtt"),
        (["CLIPS", "-o", "out.jsonl", "--srt", "--subtitles-dir", "gone"], "gone: there is no such directory"),
        (["CLIPS", "-o", "out.jsonl", "--segments", "often"], "neither a length in seconds"),
        (["CLIPS", "-o", "out.jsonl", "--segments", "0"], "neither a length in seconds"),
        (["CLIPS", "-o", "out.jsonl", "--memory", "much"], "'much' is not a number of bytes"),
        (["CLIPS", "-o", "out.jsonl", "--memory", "1KiB"], "of cache, the limit is 0 MiB"),
        (["CLIPS", "-o", "out.jsonl", "--rows", "0"], "0 is not in the range"),
        (["CLIPS", "-o", "out.jsonl", "--item-timeout", "inf"], "item_timeout is seconds above 0 and at most"),
        (["CLIPS", "-o", "out.jsonl", "--item-timeout", "nan"], "item_timeout is seconds above 0 and at most"),
        (["CLIPS", "-o", "out.jsonl", "--item-timeout", "1e300"], "item_timeout is seconds above 0 and at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_in_one_line(
    arguments: list[str], reason: str, bundle: Path, clips: Path, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.csv").write_text("name\na.mp4\n")
    Path("bad.jsonl").write_text("nonsense\n")
    with RecordFile(Path("locked.jsonl"), Settings({})):
        result = run(bundle, *[clips if word == "CLIPS" else word for word in arguments], "-q")
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("intertitle: ")
    assert reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "bad.jsonl", "empty"]
    assert Path("bad.csv").read_text() == "name\na.mp4\n"
    assert Path("bad.jsonl").read_text() == "nonsense\n"


def test_a_missing_bundle_leaves_nothing(clips: Path, run: Run, tmp_path: Path):
    result = run(tmp_path / "gone", clips, "-o", tmp_path / "out.jsonl", "-q")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"intertitle: {tmp_path / 'gone'}: there is no such directory")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(bundle: Path, clips: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "out.jsonl"
    append, pwrite = RecordFile.append, os.pwrite

    def full(self: RecordFile, record: dict) -> None:
        if self.known:
            monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        append(self, record)

    monkeypatch.setattr(RecordFile, "append", full)
    result = run(bundle, clips, "-o", output, "-q", *SHORT)
    assert (result.code, result.err) == (2, f"intertitle: {output}: cannot be written: No space left on device\n")
    assert len(records(output)) == 1
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(RecordFile, "append", append)
    assert run(bundle, clips, "-o", output, "-q", *SHORT).code == 1
    assert len(records(output)) == 5


def test_ctrl_c_keeps_what_is_done(bundle: Path, clips: Path, run: Run, tmp_path: Path):
    many = tmp_path / "many"
    many.mkdir()
    for index in range(60):
        # Different content, so that each has to be captioned: what follows an MP4's boxes is passed over.
        (many / f"{index:02}.mp4").write_bytes((clips / "clip000.mp4").read_bytes() + bytes(8) + bytes([index]))
    output = tmp_path / "out.jsonl"
    words = ["batch", bundle, many, "-o", output, "--no-audio", "--max-new-tokens", 200, "--rows", 1, "-q"]
    process = subprocess.Popen([sys.executable, "-m", "intertitle.cli", *map(str, words)], stderr=subprocess.PIPE)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().splitlines() == [
        f"{output}: what is done is kept; the same command goes on from there",
        "intertitle: interrupted",
    ]
    assert 1 <= len(records(output)) < 60


def test_killed_again_and_again(bundle: Path, tmp_path: Path):
    """A few of the kills of ``benchmarks/batch_kills.py``."""
    write_inputs(tmp_path / "clips", 12)
    findings = run_kills(bundle, tmp_path / "clips", tmp_path, kills=8, seed=1)
    assert findings.kills == 8
    assert findings.items == 14
    assert findings.sound, findings
    shutil.rmtree(tmp_path / "clips")
