"""Install what a user installs, on every Python that is there, and caption with it.

    python3 tests/install/check.py              # or: make check-install
    python3 tests/install/check.py --only 3.12

Builds the sdist and from it the wheel. Then, for each Python from 3.10 to 3.13 that is on the path or that pyenv has:
a clean virtual environment, the wheel with ``[cpu]`` and the newest dependencies (no constraints), and in an empty
folder the demo, a video, an image and a sound, a batch. Once more on the lowest Python with the lowest versions that
setup.cfg allows. On the newest Python, ``mypy --strict`` reads a user's program beside the installed wheel.

One line for each; the exit code is 1 if any failed, 2 if there was nothing to check. Needs only the standard library,
and packages from where pip gets them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import wave
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

REPOSITORY = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: Those that all of the lowest versions have wheels for.
WITH_LOWEST = ("3.10", "3.11", "3.12")
#: What the runtime must not pull in.
ABSENT = ("torch", "transformers", "onnx", "PIL")
#: Megabytes that the wheel may take.
MOST_WHEEL = 12.0

PROGRAM = """\
from pathlib import Path

import intertitle


def describe(bundle: Path, clip: Path) -> list[str]:
    captioner = intertitle.Captioner.load(bundle)
    decoding = intertitle.Decoding(max_new_tokens=16)
    caption: intertitle.Caption = captioner.caption(clip, decoding=decoding)
    seconds: float = sum(caption.timings.values())
    return [caption.text, f"{seconds:.1f} s", *captioner.stream(clip)]
"""
#: What mypy must refuse in the same program: it proves that the types are seen.
WRONG = '\n\nlength: int = intertitle.Captioner.load("bundle").caption("clip.mp4").text\n'


class CheckError(Exception):
    """A step that failed; the text says which and why."""


@dataclass
class Environment:
    """A clean virtual environment: its folder, and the environment variables of what runs in it."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def pip(self, *arguments: str) -> None:
        run([self.program("python"), "-m", "pip", "install", "-q", *arguments], self.variables)


def run(command: list[str], variables: dict[str, str], folder: Path | None = None, code: int = 0) -> str:
    """stdout of a command that must exit with ``code``; ``CheckError`` with the end of what it said otherwise."""
    done = subprocess.run(
        command, env=variables, cwd=folder, text=True, capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != code:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise CheckError(f"{' '.join(command)} exited with {done.returncode}, not {code}:\n{said}")
    return done.stdout


def clean_variables() -> dict[str, str]:
    """The environment without what would change which versions pip takes or which packages Python sees."""
    dropped = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_PRE", "PYTHONPATH", "PYTHONHOME", "PYENV_VERSION")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def find_python(version: str) -> str | None:
    """The interpreter of a Python such as ``3.12``: on the path, or among pyenv's."""
    candidates = [f"python{version}", "python3"]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], text=True, capture_output=True, check=False).stdout.strip()
        found = Path(root or ".").glob(f"versions/{version}.*/bin/python")
        candidates += sorted(map(str, found), key=lambda path: [int(part) for part in re.findall(r"\d+", path)])[::-1]
    program = f"import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for candidate in candidates:
        if path := shutil.which(candidate):
            done = subprocess.run([path, "-c", program], env=clean_variables(), capture_output=True, check=False)
            if done.returncode == 0:
                return path
    return None


def create(python: str, folder: Path) -> Environment:
    variables = clean_variables()
    run([python, "-m", "venv", str(folder)], variables)
    return Environment(folder, variables)


def build(python: str, folder: Path) -> Path:
    """The wheel, built from the sdist, which is built from a copy of the checkout."""
    source = folder / "source"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, source, ignore=left_out, symlinks=True)
    tools = create(python, folder / "tools")
    tools.pip("build")
    run([tools.program("python"), "-m", "build", "--outdir", str(folder / "dist"), str(source)], tools.variables)
    (wheel,) = (folder / "dist").glob("*.whl")
    if wheel.stat().st_size > MOST_WHEEL * 1e6:
        raise CheckError(f"the wheel takes {wheel.stat().st_size / 1e6:.1f} MB, more than {MOST_WHEEL}")
    return wheel


def lowest_versions(wheel: Path) -> list[str]:
    """``name==version`` of every lower bound of the runtime and of ``[cpu]``, from the wheel's metadata."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    bounds = []
    for line in required:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if marker and marker.replace('"', "'") != "extra == 'cpu'":
            continue
        match = re.fullmatch(r"([\w.-]+?)>=([\w.]+)(,.*)?", requirement.replace(" ", ""))
        if match is None:
            raise CheckError(f"setup.cfg: {requirement!r} has no lower bound")
        bounds.append(f"{match[1]}=={match[2]}")
    return bounds


def write_picture(path: Path, width: int = 96, height: int = 72) -> None:
    """A PNG file: a red square on a grey ground."""
    square = range(height // 3, 2 * height // 3)
    rows = b"".join(
        b"\0" + b"".join(b"\xd0\x20\x20" if y in square and x in square else b"\x80\x80\x80" for x in range(width))
        for y in range(height)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def write_sound(path: Path, seconds: int = 2, rate: int = 16_000) -> None:
    """A WAV file: a tone of 440 Hz."""
    tone = (int(12_000 * math.sin(2 * math.pi * 440 * index / rate)) for index in range(seconds * rate))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in tone))


def check_captions(environment: Environment, folder: Path) -> Iterator[str]:
    """Caption in the empty ``folder`` with what is installed; yields what is worth telling."""
    intertitle, variables = environment.program("intertitle"), environment.variables
    python = environment.program("python")
    version = run([intertitle, "--version"], variables, folder)
    if run([python, "-m", "intertitle", "--version"], variables, folder) != version:
        raise CheckError("python -m intertitle is not the command intertitle")
    run([python, "-m", "pip", "check"], variables, folder)
    for name in ABSENT:
        run([python, "-c", f"import {name}"], variables, folder, code=1)

    started = time.monotonic()
    lines = run([intertitle, "demo", "--keep", "captioner", "-q"], variables, folder).splitlines()
    yield f"demo {time.monotonic() - started:.1f} s"
    said = dict(line.split(":", 1) for line in lines if line.startswith(("caption:", "truth:")))
    if said["caption"].strip() != said["truth"].strip():
        raise CheckError(f"the demo's caption is not what is in its clip: {said}")

    place = "import intertitle, pathlib; print(pathlib.Path(intertitle.__file__).parent)"
    package = Path(run([python, "-c", place], variables, folder).strip())
    if environment.folder.resolve() not in package.resolve().parents:
        raise CheckError(f"intertitle came from {package}, not from the environment")
    media = folder / "media"
    media.mkdir()
    shutil.copyfile(package / "runtime" / "shipped" / "clip.mp4", media / "clip.mp4")
    write_picture(media / "picture.png")
    write_sound(media / "tone.wav")
    names = ["clip.mp4", "picture.png", "tone.wav"]
    command = [intertitle, "caption", "captioner", *(f"media/{name}" for name in names), "--json", "-q"]
    captions = [json.loads(line) for line in run(command, variables, folder).splitlines()]
    texts = [caption["text"] for caption in captions]
    if len(texts) != len(names) or not all(texts) or texts[0] != said["caption"].strip():
        raise CheckError(f"captions of {names}: {texts}")
    if "tone is heard" not in texts[2]:
        raise CheckError(f"the caption of a tone does not tell it: {texts[2]}")
    run([intertitle, "batch", "captioner", "media", "-o", "captions.jsonl", "-q"], variables, folder)
    records = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(records) != len(names) or any(record.get("error") for record in records):
        raise CheckError(f"records of the batch: {records}")
    # A line without a file and a clip that was cut off have a record each, and the others are captioned all the same.
    (media / "cut.mp4").write_bytes((media / "clip.mp4").read_bytes()[:5000])
    (media / "list.csv").write_text("file,start\nclip.mp4,1\n,2\ncut.mp4,\n", encoding="utf-8")
    run([intertitle, "batch", "captioner", "media/list.csv", "-o", "list.jsonl", "-q"], variables, folder, code=1)
    records = [json.loads(line) for line in (folder / "list.jsonl").read_text(encoding="utf-8").splitlines()]
    if [bool(record.get("error")) for record in records] != [False, True, True]:
        raise CheckError(f"records of a list with two bad lines: {records}")
    yield "video, image, sound, batch, bad items"


def check_types(environment: Environment, tools: Environment, folder: Path) -> str:
    """``mypy --strict`` on a program that uses the installed wheel: clean, and an error where the program is wrong."""
    tools.pip("mypy")
    program = folder / "program.py"
    mypy = [tools.program("mypy"), "--strict", "--python-executable", environment.program("python"), str(program)]
    program.write_text(PROGRAM, encoding="utf-8")
    run(mypy, tools.variables, folder)
    program.write_text(PROGRAM + WRONG, encoding="utf-8")
    said = run(mypy, tools.variables, folder, code=1)
    if "[assignment]" not in said:
        raise CheckError(f"mypy does not see the wheel's types:\n{said}")
    return "mypy --strict"


def installed(environment: Environment) -> str:
    """The versions that were chosen of what the runtime stands on, and what everything takes on the disk."""
    told = ("av", "numpy", "onnxruntime", "opencv-python-headless", "tokenizers")
    program = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {told}))"
    versions = run([environment.program("python"), "-c", program], environment.variables).strip()
    size = sum(path.lstat().st_size for path in environment.folder.rglob("*") if not path.is_dir())
    return f"{versions}; {size / 1e6:.0f} MB"


def check(python: str, wheel: Path, pins: list[str], folder: Path, tools: Environment | None) -> str:
    """Everything for one Python; what is worth telling on one line."""
    folder.mkdir()
    started = time.monotonic()
    environment = create(python, folder / "environment")
    environment.pip(f"{wheel}[cpu]", *pins)
    told = [f"installed in {time.monotonic() - started:.0f} s", installed(environment)]
    empty = folder / "empty"
    empty.mkdir()
    told += check_captions(environment, empty)
    if tools is not None:
        told.append(check_types(environment, tools, empty))
    return "; ".join(told)


def main() -> int:
    """Check every Python; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PYTHONS, action="append", help="this Python only; repeatable")
    parser.add_argument("--wheel", type=Path, help="check this wheel instead of building one")
    arguments = parser.parse_args()
    found = {version: python for version in arguments.only or PYTHONS if (python := find_python(version))}
    for version in arguments.only or PYTHONS:
        if version not in found:
            print(f"Python {version}: not here, skipped", flush=True)
    if not found:
        return 2
    first, last = next(iter(found)), list(found)[-1]
    failed = False
    with tempfile.TemporaryDirectory(prefix="intertitle-install-") as scratch:
        folder = Path(scratch)
        try:
            wheel = arguments.wheel or build(found[last], folder)
            lowest = lowest_versions(wheel)
            tools = create(found[last], folder / "mypy")
        except CheckError as error:
            print(f"FAIL: {error}", flush=True)
            return 1
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        runs: list[tuple[str, str, list[str]]] = [(version, "newest", []) for version in found]
        if first in WITH_LOWEST:
            runs.append((first, "lowest", ["--only-binary", ":all:", *lowest]))
        else:
            print(f"lowest versions: need Python {' or '.join(WITH_LOWEST)}, skipped", flush=True)
        for version, what, pins in runs:
            try:
                own = tools if (version, what) == (last, "newest") else None
                told = check(found[version], wheel.resolve(), pins, folder / f"{version}-{what}", own)
                print(f"Python {version}, {what}: pass: {told}", flush=True)
            except CheckError as error:
                failed = True
                print(f"Python {version}, {what}: FAIL: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
