"""The fuzzers on some seeds in the ordinary run, on many in the slow one; and that they find what they should."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from intertitle.errors import MediaError
from intertitle.runtime.media import open_media
from intertitle.tests.fuzz.__main__ import fuzz
from intertitle.tests.fuzz.chunks import find_chunks, mend_checksums
from intertitle.tests.fuzz.corpus import make_corpus
from intertitle.tests.fuzz.media import MediaTarget, read, way_of
from intertitle.tests.fuzz.pool import Report, run_jobs, run_seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_originals_are_of_many_formats_and_whole(folder: Path):
    paths = make_corpus(folder / "originals")
    assert len({path.suffix for path in paths}) >= 30
    assert sum(path.stat().st_size for path in paths) < 1 << 20
    failed = []
    for path in paths:
        for seed in range(3):
            try:
                read(path, random.Random(seed))
            except MediaError as error:
                # No span of an image, of the last seconds or of nothing: the words of a whole file.
                failed.append(f"{path.name}: {error}")
    assert len(failed) < len(paths)


def test_the_same_seed_gives_the_same_mutant(folder: Path):
    first, second = MediaTarget(folder), MediaTarget(folder)
    mutants = [first.make(seed) for seed in range(130)]
    assert mutants == [second.make(seed) for seed in range(130)]
    assert sum(content != first._contents[seed % len(first.formats)] for seed, (_, content) in enumerate(mutants)) > 110


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".png", ".ogg", ".flv", ".ivf", ".jpg", ".ts", ".webp"])
def test_parts_of_a_file_are_found(folder: Path, suffix: str):
    path = next(path for path in make_corpus(folder / "originals") if path.suffix == suffix)
    content = path.read_bytes()
    chunks = find_chunks(content)
    assert len(chunks) > 1
    assert all(0 <= chunk.start < chunk.stop <= len(content) for chunk in chunks)
    # What a muxer wrote has right checksums.
    assert mend_checksums(content) == content


def test_each_file_that_was_a_find_ends_in_errors_of_ours(folder: Path, data_dir: Path):
    """Made by hand, or mutants of our own originals, which are named by the seed that found them."""
    files = _finds(data_dir)
    ways = {_way(seed): seed for seed in reversed(range(60))}
    assert len(ways) == 4
    jobs = [(seed, str(path)) for path in files for seed in sorted({*_found_by(path), *ways.values()})]
    report = Report()
    for answer in run_jobs("media", jobs, folder):
        report.add(answer)
    assert sum(report.outcomes.values()) == len(jobs)
    assert report.clean, str(report)


def _finds(data_dir: Path) -> list[Path]:
    return sorted(path for path in (data_dir / "hostile").iterdir() if path.suffix != ".md")


def _found_by(path: Path) -> list[int]:
    seed = path.name.split("-")[0]
    return [int(seed)] if seed.isdigit() else []


def _way(seed: int) -> str:
    return way_of(random.Random(f"read {seed}"))


def test_mutants_of_media_end_in_errors_of_ours(folder: Path):
    report = fuzz("media", folder, seed=0, count=500)
    assert sum(report.outcomes.values()) == 500
    assert report.outcomes["ok"] > 100
    assert report.outcomes["ours"] > 100
    assert report.clean, str(report)


@pytest.mark.slow
def test_200_000_mutants_of_media(folder: Path):
    """About 15 minutes on an idle core."""
    report = fuzz("media", folder, seed=1_000_000, count=200_000)
    print(report)
    assert report.clean, str(report)


@pytest.fixture(scope="module")
def structured_folder(folder: Path, compiled: Callable[..., Path]) -> Path:
    # A copy: mutants are links to its files, and a bundle that other tests use at the same time must not change.
    shutil.copytree(compiled("av-qwen2", "int4"), folder / "bundle")
    return folder


def test_mutants_of_bundles_records_and_checkpoints_end_in_errors_of_ours(structured_folder: Path):
    report = fuzz("structured", structured_folder, seed=0, count=240)
    assert sum(report.outcomes.values()) == 240
    assert report.outcomes["ok"] > 20
    assert report.outcomes["ours"] > 50
    assert report.clean, str(report)


@pytest.mark.slow
def test_50_000_mutants_of_bundles_records_and_checkpoints(structured_folder: Path):
    """About half an hour on an idle core."""
    report = fuzz("structured", structured_folder, seed=1_000_000, count=50_000)
    print(report)
    assert report.clean, str(report)


def test_crashes_hangs_and_memory_are_told_and_the_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("intertitle.tests.fuzz.pool.MOST_SECONDS", 3.0)
    answers = list(run_jobs("faults", ((seed, "") for seed in range(7)), folder))
    assert [(answer["seed"], answer["outcome"]) for answer in answers] == [
        (0, "ok"), (1, "crash"), (2, "hang"), (3, "memory"), (4, "foreign"), (5, "ours"), (6, "wrapped")
    ]  # fmt: skip
    assert answers[1]["kind"] == "SIGSEGV"
    assert "string_at" in answers[1]["place"]
    assert "hang" in answers[2]["place"]


@pytest.mark.slow
def test_a_batch_of_1_000_items_with_200_of_the_worst(
    folder: Path, data_dir: Path, compiled: Callable[..., Path], tmp_path: Path
):
    """A minute or two. All finds, then the mutants that failed and took longest."""
    originals = [path for path in make_corpus(folder / "originals") if _is_whole(path)]
    worst = _finds(data_dir)
    target = MediaTarget(folder)
    answers = [answer for answer in run_seeds("media", range(2_000), folder) if answer["outcome"] != "ok"]
    answers.sort(key=lambda answer: (answer["outcome"] == "ours", -answer["seconds"]))
    for answer in answers[: 200 - len(worst)]:
        name, content = target.make(answer["seed"])
        worst.append(tmp_path / f"{answer['seed']}-{name}")
        worst[-1].write_bytes(content)
    assert len(worst) == 200
    rows = []
    for number in range(1_000):
        # Every fifth item is a bad one; instructions that differ make captions that differ.
        good = number % 5
        file = originals[number % len(originals)] if good else worst[number // 5]
        rows.append({"id": f"item {number}", "file": str(file), "prompt": f"What is seen at {number}?"})
    manifest, output = tmp_path / "items.jsonl", tmp_path / "records.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle = compiled("av-qwen2", "int4")
    command = [sys.executable, "-m", "intertitle", "batch", bundle, manifest, "-o", output, "--max-new-tokens", "4"]
    done = subprocess.run([*map(str, command), "--threads", "1"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == [row["id"] for row in rows]
    for number, record in enumerate(records):
        assert ("text" in record) != ("error" in record)
        if number % 5:
            assert "text" in record, record
        elif "error" in record:
            assert record["error"]["kind"] in ("media", "option"), record
    assert sum("error" in record for record in records) > 50


def _is_whole(path: Path) -> bool:
    try:
        with open_media(path) as media:
            return media.has_video or media.has_audio
    except MediaError:
        return False
