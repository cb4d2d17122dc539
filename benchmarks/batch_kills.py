"""``intertitle batch`` killed (SIGKILL) at random moments and started again: is anything lost, duplicated or torn?

A run that is never killed says what the records are. Then runs are killed at a moment drawn from 0 to the time that
this one took; after each kill the output is read as any program would. Once an output is complete it is compared with
the undisturbed one and the next begins from nothing, until there were as many kills as asked for.

    python -m intertitle.benchmarks.batch_kills --kills 200
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from ..calibration.render import random_scene, write_clip
from .harness import write_result

_FAILED = 1


@dataclass
class Findings:
    """What was found. ``lost``, ``duplicated``, ``torn`` and ``different`` are to stay empty.

    ``rounds``: outputs that became complete. ``undone``: kills before anything new was on disk. ``cut``: outputs that
    a kill left with a part of a line at the end. ``full_seconds``: an undisturbed run.
    """

    items: int
    full_seconds: float
    kills: int = 0
    rounds: int = 0
    undone: int = 0
    cut: int = 0
    records_checked: int = 0
    kills_in_a_round: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.duplicated or self.torn or self.different)


def write_inputs(folder: Path, clips: int) -> int:
    """``clips`` short clips, a copy of the first and a file that is none; how many items these are."""
    folder.mkdir()
    for seed in range(clips):
        write_clip(random_scene(seed, size=(64, 48), fps=8, seconds=1.0), folder / f"clip{seed:03}.mp4")
    shutil.copyfile(folder / "clip000.mp4", folder / "copy.mp4")
    (folder / "junk.mp4").write_text("This is not a video.\n")
    return clips + 2


def run_kills(bundle: Path, inputs: Path, scratch: Path, kills: int, seed: int = 0) -> Findings:
    """Kill runs over ``inputs`` until ``kills`` of them hit; see above. Files go into ``scratch``."""
    chance = random.Random(seed)
    began = time.perf_counter()
    _run(_command(bundle, inputs, scratch / "reference"))
    expected = _contents(scratch / "reference")
    findings = Findings(len(expected[0]), time.perf_counter() - began)
    while findings.kills < kills:
        folder = scratch / f"round{findings.rounds}"
        before, hits = findings.kills, 0
        seen: dict[str, str] = {}
        while findings.kills < kills and _killed(
            _command(bundle, inputs, folder), chance.uniform(0, findings.full_seconds)
        ):
            findings.kills += 1
            hits += 1
            found = _check(folder / "out.jsonl", seen, findings, f"kill {findings.kills}")
            findings.undone += found == seen
            seen = found
        if findings.kills == kills:
            _run(_command(bundle, inputs, folder))
        _compare(_contents(folder), expected, findings, f"kills {before + 1} to {findings.kills}")
        findings.rounds += 1
        findings.kills_in_a_round.append(hits)
        print(f"{findings.kills} of {kills} kills, {findings.rounds} outputs complete", file=sys.stderr, flush=True)
    return findings


def _command(bundle: Path, inputs: Path, folder: Path) -> list[str]:
    (folder / "srt").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "intertitle.cli", "batch", bundle, inputs, "-o", folder / "out.jsonl", "--no-audio"]
    return [
        *map(os.fspath, words),
        "-q",
        "--max-new-tokens",
        "8",
        "--srt",
        "--subtitles-dir",
        os.fspath(folder / "srt"),
    ]


def _run(command: Sequence[str]) -> None:
    """To its end, with the exit code of a batch that has a failure in it."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != _FAILED:
        raise RuntimeError(f"exit code {finished.returncode}: {finished.stderr}")


def _killed(command: Sequence[str], after: float) -> bool:
    """Whether the process was still there to be killed ``after`` so many seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return process.returncode != _FAILED
    if process.returncode != _FAILED:
        raise RuntimeError(f"exit code {process.returncode}: {said}")
    return False


def _check(output: Path, seen: dict[str, str], findings: Findings, when: str) -> dict[str, str]:
    """Records by id in an output that a kill may have cut: at most the last line, and none of ``seen`` is gone."""
    found: dict[str, str] = {}
    *lines, rest = output.read_bytes().split(b"\n") if output.exists() else [b""]
    findings.cut += bool(rest)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            findings.torn.append(f"{when}: line {number}")
            continue
        if record["id"] in found:
            findings.duplicated.append(f"{when}: {record['file']}")
        found[record["id"]] = _outcome(record)
        findings.records_checked += 1
    findings.lost += [f"{when}: {name}" for name in seen if name not in found]
    findings.different += [f"{when}: {name}" for name in seen if found.get(name, seen[name]) != seen[name]]
    return found


def _compare(found: tuple[list, dict], expected: tuple[list, dict], findings: Findings, when: str) -> None:
    """A complete output against the undisturbed one: the same items in the same order, each once."""
    ids, wanted = [name for name, _ in found[0]], [name for name, _ in expected[0]]
    findings.lost += [f"{when}: {name}" for name in wanted if name not in ids]
    findings.duplicated += [f"{when}: {name}" for name in set(ids) if ids.count(name) > 1]
    if found != expected:
        findings.different.append(f"{when}: the complete output")


def _contents(folder: Path) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Each record's id and outcome in their order, and the subtitle files; nothing else lies in the folder."""
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    subtitles = {path.name: path.read_bytes() for path in sorted((folder / "srt").iterdir())}
    others = {path.name for path in folder.iterdir()} - {"out.jsonl", "srt"}
    if others:
        raise RuntimeError(f"left behind: {sorted(others)}")
    return [(record["id"], _outcome(record)) for record in records], subtitles


def _outcome(record: dict[str, Any]) -> str:
    """What does not depend on the moment."""
    caption = [record.get("text"), record.get("token_ids"), record.get("finish_reason")]
    return json.dumps([record["file"], record["sha256"], caption, record.get("error")])


@click.command()
@click.option(
    "--kills", type=click.IntRange(1), default=200, show_default=True, help="The number of processes to kill."
)
@click.option("--clips", type=click.IntRange(1), default=40, show_default=True, help="The number of clips of a run.")
@click.option("--seed", default=0, show_default=True, help="The seed of the moments at which processes are killed.")
def main(kills: int, clips: int, seed: int) -> None:
    """Kill batches of a tiny captioner (random weights) and write what was found to results/batch-kills.json."""
    from ..export.compile import compile_bundle
    from ..models.random_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        compile_bundle(write_checkpoint(scratch / "checkpoint", "tiny"), scratch / "bundle", weights="int4")
        write_inputs(scratch / "clips", clips)
        findings = run_kills(scratch / "bundle", scratch / "clips", scratch, kills, seed)
    command = f"python -m intertitle.benchmarks.batch_kills --kills {kills} --clips {clips} --seed {seed}"
    print(write_result("batch-kills", {**asdict(findings), "sound": findings.sound}, command))
    if not findings.sound:
        sys.exit(1)


if __name__ == "__main__":
    main()
