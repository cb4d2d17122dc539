"""What an edge device gets: the runtime without PyTorch, a complete wheel, and no trace of a developer's machine."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import intertitle
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
                    assert module in ("contract", "errors", "plain_text", "whole_files", "_version"), (
                        path,
                        node.lineno,
                    )
            else:
                continue
            for name in imported:
                assert name.partition(".")[0] not in FORBIDDEN, (path, node.lineno)


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
def built(repo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel that is built from it, from a copy so that no build folder is left in the checkout."""
    directory = tmp_path_factory.mktemp("built")
    copy = directory / "source"
    for path in tracked_files(repo_dir):
        target = copy / path.relative_to(repo_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    backend = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", backend, str(directory)]
    subprocess.run(command, cwd=copy, env=environment, check=True, timeout=300, capture_output=True)
    (sdist,) = directory.glob("*.tar.gz")
    # setuptools is there already: with isolation it would be downloaded.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, str(sdist), "-w", str(directory)], env=environment, check=True, timeout=300)
    (wheel,) = directory.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def wheel(built: dict[str, Path]) -> list[str]:
    """The names in the wheel."""
    return zipfile.ZipFile(built["wheel"]).namelist()


def test_the_wheel_holds_the_package_and_nothing_else(repo_dir: Path, wheel: list[str]):
    rooms = ["runtime", "models", "calibration", "commands", "contract", "export", "benchmarks", "align"]
    expected = {str(path.relative_to(repo_dir)) for room in rooms for path in (repo_dir / room).rglob("*.py")}
    expected |= {path.name for path in repo_dir.glob("*.py")} - {"setup.py"} | {"py.typed"}
    expected |= {str(path.relative_to(repo_dir)) for path in (repo_dir / "calibration" / "clips").glob("*.mp4")}
    carried = repo_dir / "runtime" / "shipped"
    expected |= {str(path.relative_to(repo_dir)) for path in carried.rglob("*") if path.is_file()}
    inside = {name.removeprefix("intertitle/") for name in wheel if name.startswith("intertitle/")}
    assert inside == expected
    assert {"runtime/shipped/captioner/bundle.json", "runtime/shipped/clip.mp4", "__main__.py"} <= inside
    assert not [name for name in inside if name.startswith("align/shipped/") or name.endswith(".safetensors")]
    rest = [name for name in wheel if not name.startswith("intertitle/")]
    assert all(".dist-info/" in name for name in rest), rest
    assert any(name.endswith("/LICENSE") for name in rest)


def test_the_wheel_is_small(built: dict[str, Path]):
    assert built["wheel"].stat().st_size < 12_000_000


def test_the_wheel_says_what_it_is(built: dict[str, Path], repo_dir: Path):
    with zipfile.ZipFile(built["wheel"]) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{folder}/METADATA"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(f"{folder}/entry_points.txt").decode())
    assert metadata["Version"] == intertitle.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode().strip() == (repo_dir / "README.md").read_text().strip()
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"intertitle": "intertitle.__main__:main"}
    }
    # What the runtime stands on has a lower bound each, and nothing of it is for compiling.
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in required}
    assert "av" in names
    assert not names & {"torch", "transformers", "onnx", "pillow", "jinja2"}
    assert [line for line in required if ">=" not in line] == []


def test_the_sdist_holds_the_repository(built: dict[str, Path], repo_dir: Path):
    with tarfile.open(built["sdist"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {str(path.relative_to(repo_dir)) for path in tracked_files(repo_dir)} - inside
    assert missing == set()


def test_the_tests_run_from_the_sdist(built: dict[str, Path], tmp_path: Path):
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    (tmp_path / "intertitle").symlink_to(folder)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_console.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_no_link_that_only_a_checkout_has(repo_dir: Path):
    """A package index shows it away from the repository's other files."""
    text = (repo_dir / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)
    targets += re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "intertitle", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"intertitle, version {intertitle.__version__}\n"
    # What ``main`` returns is the exit code.
    assert subprocess.run([sys.executable, "-m", "intertitle", "nonsense"], capture_output=True).returncode == 2


def test_the_demo_needs_only_the_runtime():
    """Captions in an interpreter without PyTorch and all else that compiling needs."""
    program = f"{GUARD}\nfrom intertitle.cli import main\nsys.exit(main(['demo', '-q']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    caption, truth = done.stdout.splitlines()[:2]
    assert caption.removeprefix("caption: ") == truth.removeprefix("truth:   ")
