"""Every code block of the README and of docs/ runs, and the pages that are written by a command are up to date.

Stand-ins lie in a temporary folder: ``clip.mp4`` and ``other.mp4``, the shipped bundle ``captioner``, and a tiny
checkpoint in the layout of ``VideoLLaMA2.1-7B-AV``. The comment before a block says what is done: ``<!-- slow -->``
leaves it to the slow tests. ``<!-- not run: REASON -->`` checks the syntax of Python and the options of commands only.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from intertitle.benchmarks import tables
from intertitle.cli import DEMO_CLIP, cli, main
from intertitle.commands import reference

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
#: In the output that a page shows: any lines, or the rest of a line.
_LEFT_OUT = "…"


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run: ")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name,
            text[: found.start("text")].count("\n") + 1,
            found["language"],
            found["text"],
            found["mark"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
CONSOLE = [block for block in BLOCKS if block.language == "console"]


def commands(block: Block) -> Iterator[tuple[list[str], list[str]]]:
    """Each command of a console block as its words, and the lines that the page shows as its output."""
    joined = block.text.replace("\\\n", " ")
    parts = re.split(r"^(?:host|board)?\$ ", joined, flags=re.MULTILINE)
    assert not parts[0].strip(), "output before the first command"
    for part in parts[1:]:
        line, _, output = part.partition("\n")
        for one in line.split(" && "):
            yield shlex.split(one, comments=True), output.splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The folder in which the blocks run."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(DEMO_CLIP, folder / "clip.mp4")
    shutil.copy(DEMO_CLIP, folder / "other.mp4")
    (folder / "VideoLLaMA2.1-7B-AV").symlink_to(data_dir / "av-qwen2")
    assert main(["demo", "--quiet", "--keep", str(folder / "captioner")]) == 0
    return folder


def test_every_block_is_of_a_kind_that_is_tested():
    assert len(CONSOLE) > 8
    assert {block.language for block in BLOCKS} <= {"python", "console", "text"}
    for block in BLOCKS:
        assert block.mark == "slow" or not block.runs or not block.mark, str(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for block in (block for block in blocks(page) if block.language == "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.runs:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


def run_console(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    for words, shown in commands(block):
        check(words)
        if words[0] == "intertitle":
            capfd.readouterr()
            assert main(words[1:]) == 0, capfd.readouterr().err
            # Columns may be wider than on the page.
            pattern = "".join(_line(" ".join(line.split())) for line in shown)
            out = "".join(f"{' '.join(line.split())}\n" for line in capfd.readouterr().out.splitlines())
            assert not shown or re.fullmatch(pattern, out), out


def _line(shown: str) -> str:
    """The pattern of a line of shown output."""
    if shown == _LEFT_OUT:
        return r"(?:.*\n)*?"
    return r"[^\n]*".join(re.escape(part) for part in shown.split(_LEFT_OUT)) + r"\n"


@pytest.mark.parametrize("block", [one for one in CONSOLE if one.runs and one.mark != "slow"], ids=str)
def test_console(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    run_console(block, place, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("block", [one for one in CONSOLE if one.mark == "slow"], ids=str)
def test_slow_console(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    run_console(block, place, monkeypatch, capfd)


@pytest.mark.parametrize("block", [one for one in CONSOLE if not one.runs or one.mark == "slow"], ids=str)
def test_commands_that_are_not_run_have_these_options(block: Block):
    for words, _ in commands(block):
        check(words)


def check(words: list[str]) -> None:
    """A command of the project has these options; ``pip install`` names extras that exist."""
    words = [word for word in words if "=" not in word or not word.split("=")[0].isupper()]
    if words[:2] == ["pip", "install"]:
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words)))):
            assert extra in settings["options.extras_require"], extra
    elif words[0] == "intertitle":
        _parsed(cli.commands[words[1]], words[2:])
    elif words[:2] == ["python", "-m"]:
        name = words[2] + (".__main__" if words[2] == "intertitle.align" else "")
        command = importlib.import_module(name).main
        _parsed(command.commands[words[3]], words[4:]) if isinstance(command, click.Group) else _parsed(
            command, words[3:]
        )


def _parsed(command: click.Command, arguments: list[str]) -> None:
    try:
        command.make_context("x", list(arguments))
    except click.BadParameter as error:
        # Files that only a reader has.
        if "does not exist" not in str(error):
            raise


def test_commands_in_text_have_these_options():
    """``intertitle ...`` and ``python -m intertitle...`` in backticks, and every ``--option``."""
    known = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    align = importlib.import_module("intertitle.align.__main__").main
    known |= {name for command in align.commands.values() for option in command.params for name in option.opts}
    known |= {name for command in cli.commands.values() for option in command.params for name in option.secondary_opts}
    script = importlib.import_module("intertitle.benchmarks.make_checkpoint").main
    known |= {name for option in script.params for name in option.opts}
    for page in PAGES:
        if page.name in ("benchmarks.md", "facts.md"):
            continue
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for option in re.findall(r"`[^`\n]*?(--[a-z][\w-]+)", text):
            assert option in known | {"--help"}, (page.name, option)
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module) is not None, module


def test_benchmarks_say_what_the_files_say():
    wanted = tables.page()
    assert tables.PAGE.read_text(encoding="utf-8") == wanted, "run python -m intertitle.benchmarks.tables"
    readme = tables.README.read_text(encoding="utf-8")
    assert readme == tables.with_speed(readme, tables.speed()), "run python -m intertitle.benchmarks.tables"
    # By hand from real-size-7b-av.json and gpu-h100-cuda.json.
    assert "| VideoLLaMA2.1-7B-AV | int4, encoders int8 | cpu, 2 cores AMD EPYC | 222 | 8.9 GB |" in readme
    assert "| fp16 | 155 | 311 | 607 | 1,169 | 2,246 | 4,337 | 0.73 |" in wanted


def test_the_command_line_is_described_as_it_is():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python -m intertitle.commands.reference"
    text = reference.page()
    for name, command in cli.commands.items():
        section = text.partition(f"## intertitle {name}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"`{option.opts[-1]}`" in section, (name, option.opts)


def test_the_table_of_targets_is_that_of_the_exporter():
    from intertitle.contract.targets import TARGETS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)`[^|]*\| ([^|]+) \| ([^|]+) \| (?!`)", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(TARGETS)
    for name, decoder, encoders in rows:
        target = TARGETS[name]
        assert sorted(decoder.split(", ")) == sorted(target.decoder_formats)
        assert sorted(encoders.split(", ")) == sorted(target.encoder_formats)


def test_a_package_index_can_show_the_readme():
    """A relative link leads nowhere there, and the README must stay short."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", text)
    assert len(re.findall(r"[A-Za-z]{2,}", _FENCE.sub("", text))) < 1100
