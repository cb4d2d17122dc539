"""What an edge device gets: the runtime without PyTorch, a complete wheel, and no trace of a developer's machine."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FORBIDDEN = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "jinja2", "sentencepiece", "PIL")

#: Imports the modules named in argv in an interpreter where the packages of FORBIDDEN do not exist.
GUARD = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def modules(repo: Path, room: str) -> list[str]:
    """The dotted names of all modules of a room."""
    paths = sorted((repo / room).rglob("*.py"))
    return [".".join(("intertitle", *path.relative_to(repo).with_suffix("").parts)) for path in paths]


def guarded(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARD, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_guard_guards():
    result = guarded("onnx")
    assert result.returncode != 0
    assert "No module named 'onnx'" in result.stderr


def test_the_runtime_needs_no_pytorch(repo_dir: Path):
    names = [name.removesuffix(".__init__") for name in modules(repo_dir, "runtime")]
    assert "intertitle.runtime.bundle" in names
    result = guarded("intertitle", "intertitle.runtime", "intertitle.cli", *names)
    assert result.returncode == 0, result.stderr


def test_no_module_of_the_runtime_names_what_a_device_lacks(repo_dir: Path):
    """Imports inside functions are found here too."""
    for path in (repo_dir / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # A relative import out of the room may only reach what lies at the root.
                imported = [node.module or ""]
                depth = len(path.relative_to(repo_dir).parts) - node.level
                if node.level and depth == 0:
                    module = (node.module or "").partition(".")[0]
                    assert module in ("errors", "plain_text", "_version"), (path, node.lineno)
            else:
                continue
            for name in imported:
                assert name.partition(".")[0] not in FORBIDDEN, (path, node.lineno)


def test_every_package_is_listed(repo_dir: Path):
    """setup.cfg lists the packages by hand; a forgotten one would be missing from every installation."""
    config = configparser.ConfigParser()
    config.read(repo_dir / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    present = {
        ".".join(("intertitle", *path.parent.relative_to(repo_dir).parts))
        for path in repo_dir.rglob("__init__.py")
        if not any(part.startswith(".") or part in ("build", "tests") for part in path.relative_to(repo_dir).parts)
    }
    assert listed == present


def tracked_files(repo: Path) -> list[Path]:
    """The files of the repository, those included that are new and not ignored."""
    if shutil.which("git") is None or not (repo / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=repo, capture_output=True, check=True).stdout
    return [path for name in listing.split(b"\0") if name and (path := repo / os.fsdecode(name)).is_file()]


# Spelled so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(rb"(?<![A-Za-z0-9_.])/(?:w[o]rk|r[o]ot|opt/p[y]pi|h[o]me/[a-z]+|U[s]ers/[a-z]+)/")


def test_no_file_names_a_path_of_a_machine(repo_dir: Path):
    assert MACHINE_PATH.search(b"/".join([b"in ", b"root", b"venv"]))
    files = tracked_files(repo_dir)
    assert len(files) > 20
    found = {str(path.relative_to(repo_dir)) for path in files if MACHINE_PATH.search(path.read_bytes())}
    assert found == set()


@pytest.fixture(scope="module")
def wheel(repo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in the wheel, built from a copy so that no build folder is left in the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "source"
    for path in tracked_files(repo_dir):
        target = copy / path.relative_to(repo_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    # setuptools is there already: with isolation it would be downloaded.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "-w", str(directory)], cwd=copy, env=environment, check=True, timeout=300)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_the_package_and_nothing_else(repo_dir: Path, wheel: list[str]):
    rooms = ["runtime", "models", "calibration", "commands", "export", "benchmarks", "align"]
    expected = {str(path.relative_to(repo_dir)) for room in rooms for path in (repo_dir / room).rglob("*.py")}
    expected |= {path.name for path in repo_dir.glob("*.py")}
    expected |= {str(path.relative_to(repo_dir)) for path in (repo_dir / "calibration" / "clips").glob("*.mp4")}
    shipped = repo_dir / "align" / "shipped"
    expected |= {str(path.relative_to(repo_dir)) for path in shipped.rglob("*") if path.is_file()}
    inside = {name.removeprefix("intertitle/") for name in wheel if name.startswith("intertitle/")}
    assert inside == expected
    rest = [name for name in wheel if not name.startswith("intertitle/")]
    assert all(".dist-info/" in name for name in rest), rest
    assert any(name.endswith("/LICENSE") for name in rest)
