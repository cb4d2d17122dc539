"""``docs/cli.md``, written from the help texts: ``python -m intertitle.commands.reference``.

The page is made of the commands themselves, not of their printed help, whose form depends on the version of click.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from .options import sections

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

_HEAD = """\
# Command line

This page is written by `python -m intertitle.commands.reference` from the help texts. `intertitle COMMAND --help`
prints the same.

Results go to stdout, everything else to stderr. Exit codes: 0 is success, 1 means that items of a batch or a `verify`
failed, 2 is bad input, 130 is Ctrl-C. A caption or a file name never reaches a terminal with its control characters:
they are printed as escapes such as `\\x1b`.
"""


def page() -> str:
    """The text of ``docs/cli.md``."""
    from ..align.__main__ import main as align
    from ..cli import cli

    parts = [_HEAD]
    for name, command in cli.commands.items():
        parts.append("\n".join(_described(f"intertitle {name}", command)))
    for name, command in align.commands.items():
        parts.append("\n".join(_described(f"python -m intertitle.align {name}", command)))
    return "\n".join(parts)


def _described(name: str, command: click.Command) -> Iterator[str]:
    yield f"## {name}\n"
    arguments = [_argument(one) for one in command.params if isinstance(one, click.Argument)]
    yield f"`{' '.join([name, '[OPTIONS]', *arguments])}`\n"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            example = paragraph.removeprefix("\b\n").replace("Example:", "").strip("\n")
            yield f"Example:\n\n{textwrap.indent(inspect.cleandoc(example), '    ')}\n"
        else:
            yield " ".join(paragraph.split()) + "\n"
    for title, options in sections(command).items():
        yield f"{title}:\n"
        for option in options:
            yield f"- {_option(option)}"
        yield ""


def _argument(argument: click.Argument) -> str:
    name = (argument.name or "").upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag or option.count else f" {_metavar(option)}"
    said = " ".join((option.help or "").replace("[default: ", "Default: ").replace("]", "").split())
    if option.required:
        said += " Required."
    elif option.show_default is True and not option.is_flag:
        default = option.default
        said += f" Default: {', '.join(map(str, default)) if isinstance(default, (tuple, list)) else default}."
    return f"{names}{kind}: {said.rstrip('.')}."


def _metavar(option: click.Option) -> str:
    if option.metavar:
        return option.metavar.replace("|", " or ")
    if isinstance(option.type, click.Choice):
        return " or ".join(map(str, option.type.choices))
    return {"integer range": "INTEGER", "float range": "FLOAT"}.get(option.type.name, option.type.name.upper())


def main() -> None:
    """Write ``docs/cli.md``."""
    PAGE.write_text(page(), encoding="utf-8")
    click.echo(PAGE)


if __name__ == "__main__":
    main()
