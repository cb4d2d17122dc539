"""The fuzzers on some seeds in the ordinary run, on many in the slow one; and that they find what they should."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from intertitle.errors import MediaError
from intertitle.tests.fuzz.__main__ import fuzz
from intertitle.tests.fuzz.chunks import find_chunks, mend_checksums
from intertitle.tests.fuzz.corpus import make_corpus
from intertitle.tests.fuzz.media import MediaTarget, read
from intertitle.tests.fuzz.pool import run_jobs


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
    (folder / "bundle").symlink_to(compiled("av-qwen2", "int4"))
    return folder


def test_mutants_of_bundles_records_and_checkpoints_end_in_errors_of_ours(structured_folder: Path):
    report = fuzz("structured", structured_folder, seed=0, count=150)
    assert sum(report.outcomes.values()) == 150
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
