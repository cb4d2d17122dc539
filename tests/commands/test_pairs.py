"""``intertitle pairs`` as a user meets it, on fixture bundles: records, refusals, a judge, kills."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from intertitle.align.preference import read_pairs
from intertitle.benchmarks.batch_kills import write_inputs

SHORT = ("--max-new-tokens", 5, "--no-audio", "--candidates", 2, "--no-retrospective")


Run = Callable[..., Any]


@pytest.fixture
def run(command: Run) -> Run:
    return partial(command, "pairs")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "clips"
    write_inputs(folder, 2)
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_by_agreement(bundle: Path, clips: Path, run: Run, tmp_path: Path):
    output = tmp_path / "pairs.jsonl"
    result = run(bundle, clips, "-o", output, "--gap", 0, *SHORT)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("3 pairs of 3 clips, 0 too close, 0 clips already done, 1 failed; 3 ")
    found = records(output)
    assert [Path(one["source"]).name for one in found] == ["clip000.mp4", "clip001.mp4", "copy.mp4", "junk.mp4"]
    assert all(len(one["segments"]) == 2 for one in found[:3])
    assert "not a video" in found[3]["error"]["reason"]
    for pair, record in zip(read_pairs(output), found, strict=False):
        totals = {one["text"]: one["scores"]["total"] for one in record["candidates"]}
        assert totals[pair.chosen] == max(totals.values())
        assert totals[pair.rejected] == min(totals.values())
        assert pair.gap == pytest.approx(totals[pair.chosen] - totals[pair.rejected])
    again = run(bundle, clips, "-o", output, "--gap", 0, "-q", *SHORT)
    assert again.code == 1
    assert again.err.startswith(
        "0 pairs of 0 clips, 0 too close, 3 clips already done, 1 failed (1 of them before); 3 "
    )
    assert records(output) == found
    refused = run(bundle, clips, "-o", output, "-q", *SHORT)
    assert refused.code == 2
    assert "was written with other settings (gap: there 0.0, now the default)" in refused.err
    refused = run(bundle, clips, "-o", output, "--gap", 0, "--segment-prompt", "", "-q", *SHORT)
    assert "(segment_prompt: there the default, now )" in refused.err


def test_scenes_by_their_facts(bundle: Path, run: Run, tmp_path: Path):
    output = tmp_path / "pairs.jsonl"
    result = run(bundle, "--scenes", "validation:3:5", "-o", output, "-q", *SHORT)
    assert result.code == 0
    found = records(output)
    assert [(one["key"], one["source"]) for one in found] == [
        ("validation:3", "scene validation:3"), ("validation:4", "scene validation:4"),
    ]  # fmt: skip
    assert found[0]["settings"]["scorer"] == "scenes"
    assert found[0]["segments"] == []
    # A captioner of random weights says nothing of the scene.
    assert all(one["scores"]["factuality"] == 0 for one in found[0]["candidates"])
    assert all(not one["kept"] for one in found)


def test_a_judge(bundle: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = Path(__file__).parent.parent / "align" / "preference" / "conftest.py"
    spec = importlib.util.spec_from_file_location("stub_of_a_judge", path)
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    server = stub.StubServer()
    output = tmp_path / "pairs.jsonl"
    words = ["--scenes", "train:0:2", "-o", output, "-q", "--scorer", "judge", "--judge-url", server.url]
    words += ["--judge-model", "stub", "--gap", 0, *SHORT]
    monkeypatch.setenv("INTERTITLE_JUDGE_API_KEY", "very-secret")
    try:
        result = run(bundle, *words)
        assert result.code == 0
        assert {headers["Authorization"] for headers, _ in server.requests} == {"Bearer very-secret"}
        assert len(records(output)) == 2
        server.answer = lambda *_: (401, {}, b"no such key: very-secret")
        refused = run(bundle, *words, "--overwrite")
        assert (refused.code, refused.err) == (2, "intertitle: the judge refuses the API key (status 401)\n")
    finally:
        server.close()
    for text in (output.read_text(), result.err, refused.err):
        assert "very-secret" not in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-o", "out.jsonl"], "give either INPUTS or --scenes"),
        (["CLIPS", "--scenes", "train:0:1", "-o", "out.jsonl"], "give either INPUTS or --scenes"),
        (["CLIPS"], "Missing option '-o'"),
        (["nowhere.mp4", "-o", "out.jsonl"], "nowhere.mp4: no such file or folder"),
        (["--scenes", "moon:0:1", "-o", "out.jsonl"], "scenes are SPLIT:FIRST:STOP"),
        (["--scenes", "train:2:2", "-o", "out.jsonl"], "scenes train:2:2 is an empty range"),
        (["CLIPS", "--scorer", "scenes", "-o", "out.jsonl"], "so it goes with --scenes"),
        (["CLIPS", "--scorer", "judge", "-o", "out.jsonl"], "needs --judge-url and --judge-model"),
        (["CLIPS", "--judge-url", "http://h/v1", "-o", "out.jsonl"], "go with --scorer judge"),
        (["CLIPS", "--scorer", "judge", "--judge-url", "ftp://h", "--judge-model", "m", "-o", "out.jsonl"], "address"),
        (["CLIPS", "-o", "missing/out.jsonl"], "there is no directory missing"),
        (["CLIPS", "-o", "-"], "-: pairs need a file"),
        (["CLIPS", "-o", "bad.jsonl"], "bad.jsonl: line 1 is not a record of pairs"),
        (["CLIPS", "-o", "bad.jsonl", "--overwrite"], "bad.jsonl: is not an output of pairs"),
        (["CLIPS", "-o", "out.jsonl", "--retry-failed", "--overwrite"], "exclude each other"),
        (["CLIPS", "-o", "out.jsonl", "--gap", "14"], "the gap of a pair is from 0 to 13.5"),
        (["CLIPS", "-o", "out.jsonl", "--candidates", "0"], "0 is not in the range"),
        (["CLIPS", "-o", "out.jsonl", "--item-timeout", "inf"], "item_timeout is seconds above 0 and at most"),
        (["CLIPS", "-o", "out.jsonl", "--temperature", "0"], "temperature must be a positive number"),
        (["CLIPS", "-o", "out.jsonl", "--contrast-alpha", "-1"], "contrast_alpha must be 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_in_one_line(
    arguments: list[str], reason: str, bundle: Path, clips: Path, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"id": "of batch", "settings": {}}\n')
    result = run(bundle, *[clips if word == "CLIPS" else word for word in arguments], "-q")
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("intertitle: ")
    assert reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_ctrl_c_does_not_wait_for_a_silent_judge(bundle: Path, tmp_path: Path):
    output = tmp_path / "pairs.jsonl"
    words = ["pairs", bundle, "--scenes", "train:0:9", "-o", output, "-q", "--scorer", "judge", "--judge-model", "m"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        words += ["--judge-url", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", *SHORT]
        process = subprocess.Popen([sys.executable, "-m", "intertitle.cli", *map(str, words)], stderr=subprocess.PIPE)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.decode().splitlines() == [
        f"{output}: what is done is kept; the same command goes on from there",
        "intertitle: interrupted",
    ]


def test_killed_again_and_again(bundle: Path, tmp_path: Path):
    """After any number of SIGKILLs the same records as of an undisturbed run; none is ever lost, doubled or torn."""

    def command(output: Path) -> list[str]:
        words = [sys.executable, "-m", "intertitle.cli", "pairs", bundle, "--scenes", "train:0:40", "-o", output, "-q"]
        return [*map(os.fspath, words), *map(str, SHORT)]

    subprocess.run(command(tmp_path / "whole.jsonl"), check=True, capture_output=True)
    chance, output, before = random.Random(3), tmp_path / "killed.jsonl", 0
    for target in (1, 6, 13, 20):
        process = subprocess.Popen(command(output), stderr=subprocess.DEVNULL)
        while process.poll() is None and len(whole_lines(output)) < target:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.wait()
        keys = [json.loads(line)["key"] for line in whole_lines(output)]
        assert len(set(keys)) == len(keys) >= max(before, target)
        before = len(keys)
    assert before < 40
    finished = subprocess.run(command(output), check=True, capture_output=True, text=True)
    assert f"of {40 - before} clips, {40 - before} too close, {before} clips already done, 0 failed" in finished.stderr
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
