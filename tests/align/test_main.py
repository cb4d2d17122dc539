"""The whole recipe by its commands, at the size that learns nothing: train, compile, pairs, tune, ship, compile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from intertitle.align.preference import read_pairs
from intertitle.align.tune import scene_pairs
from intertitle.errors import OptionError
from intertitle.runtime.bundle import Bundle

ALIGN = [sys.executable, "-m", "intertitle.align"]
INTERTITLE = [sys.executable, "-m", "intertitle.cli"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Everything up to the pairs."""
    folder = tmp_path_factory.mktemp("recipe")
    for command in (
        [*ALIGN, "train", "-o", folder / "work", "--recipe", "smoke", "--workers", 1, "-q"],
        [*INTERTITLE, "compile", folder / "work" / "supervised", "-o", folder / "bundle", "--weights", "fp32", "-q"],
        # The captions are noise, which no scorer prefers by much.
        [
            *(*INTERTITLE, "pairs", folder / "bundle", "--scenes", "train:100:104", "--no-refine", "--candidates", 3),
            *("--gap", 0, "--max-new-tokens", 24, "-o", folder / "pairs.jsonl", "-q"),
        ],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    return folder


def test_from_pairs_to_an_aligned_bundle(recipe: Path):
    scenes, pairs = scene_pairs(recipe / "pairs.jsonl")
    assert pairs
    assert {pair.clip for pair in pairs} == set(range(len(scenes)))
    adapter = recipe / "adapter"
    done = run(
        *ALIGN,
        "tune",
        recipe / "pairs.jsonl",
        "--base",
        recipe / "work" / "supervised",
        "-o",
        adapter,
        "--steps",
        3,
        "--batch",
        2,
        "-q",
    )
    assert (done.returncode, done.stdout) == (0, f"{adapter}\n"), done.stderr
    assert [json.loads(line)["step"] for line in (adapter / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    picture = recipe / "losses.png"
    done = run(*ALIGN, "plot", recipe / "work", "--adapter", adapter, "-o", picture)
    assert (done.returncode, done.stdout) == (0, f"{picture}\n"), done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    package = recipe / "package"
    base = recipe / "work" / "supervised"
    done = run(*ALIGN, "ship", "--base", base, "--adapter", adapter, "--scene", 2, "-o", package, "-q")
    assert done.returncode == 0, done.stderr
    trained, carried = package / "align" / "shipped", package / "runtime" / "shipped"
    assert sorted(path.name for path in trained.iterdir()) == ["base", "synpo"]
    assert sorted(path.name for path in carried.iterdir()) == ["captioner", "clip.mp4", "clip.txt", "scene.txt"]
    assert Bundle.open(carried / "captioner").manifest.provenance.adapter is not None
    # Again from what lies there, as after a change of the compiler: nothing is lost, and the same bundle comes out.
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    again = ["--base", trained / "base", "--adapter", trained / "synpo", "-o", package, "-q"]
    done = run(*ALIGN, "ship", *again)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tune", "{pairs}", "--base", "{nowhere}", "-o", "out"], "does not exist"),
        (["tune", "{pairs}", "--base", "{bundle}", "-o", "out", "-q"], "config.json"),
        (["tune", "{broken}", "--base", "{base}", "-o", "out", "-q"], "broken.jsonl"),
        (["plot", "{bundle}", "-o", "out"], "vision.jsonl"),
        (["train", "-o", "{work}", "--recipe", "small", "-q"], "another recipe"),
    ],
    ids=["no base", "not a checkpoint", "malformed pairs", "no training", "another recipe"],
)
def test_bad_input_is_one_line(recipe: Path, arguments: list[str], reason: str, tmp_path: Path):
    (recipe / "broken.jsonl").write_text('{"key": "train:1", "chosen"\n')
    names = {"pairs": recipe / "pairs.jsonl", "nowhere": tmp_path / "no", "bundle": recipe / "bundle"}
    names |= {"broken": recipe / "broken.jsonl", "base": recipe / "work" / "supervised", "work": recipe / "work"}
    done = run(*ALIGN, *[word.format(**names) if word != "out" else tmp_path / "out" for word in arguments])
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_pairs_of_files_are_refused(recipe: Path, tmp_path: Path):
    lines = (recipe / "pairs.jsonl").read_text().replace('"train:', '"file:')
    (tmp_path / "pairs.jsonl").write_text(lines)
    if list(read_pairs(tmp_path / "pairs.jsonl")):
        with pytest.raises(OptionError, match="not of a scene"):
            scene_pairs(tmp_path / "pairs.jsonl")
