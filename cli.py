"""The ``intertitle`` command: results on stdout, everything else on stderr, bad input in one line with exit code 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from ._version import __version__
from .commands import BAD_INPUT, BROKEN_PIPE, DEMO_CLIP, INTERRUPTED, options
from .commands.batch import batch
from .commands.build import build
from .commands.caption import caption
from .commands.compile import compile_command
from .commands.demo import demo
from .commands.info import info
from .commands.pairs import pairs
from .commands.verify import verify
from .console import report, say
from .errors import IntertitleError

__all__ = ["DEMO_CLIP", "cli", "main"]


class _Commands(click.Group):
    """The group of commands. click itself would exit with 1, which means that ``verify`` failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            # After the ^C that the terminal shows.
            click.echo(f"{os.linesep if sys.stderr.isatty() else ''}intertitle: interrupted", err=True)
            code = INTERRUPTED
        except BrokenPipeError:
            # The reader of a pipe went away (| head): not an error of ours.
            _silence(sys.stdout, sys.stderr)
            code = BROKEN_PIPE
        raise click.exceptions.Exit(code)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="intertitle")
@options.debug
@click.pass_context
def cli(context: click.Context) -> None:
    """Compile Video-LLM captioners and caption video without PyTorch.

    \b
    Example:
      intertitle compile VideoLLaMA2.1-7B-AV -o captioner --weights int4
      intertitle caption captioner clip.mp4
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (compile_command, build, caption, batch, pairs, verify, info, demo):
    cli.add_command(_command)


def _silence(*streams: Any) -> None:
    """Let whatever is still written to these streams vanish; Python would complain at exit."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failures, 2 bad input, 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # The shell closed it (>&-): what is written there goes nowhere.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        # A character or a file name that the locale cannot write is no reason to lose a caption.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    state: dict[str, bool] = {}
    try:
        code = cli.main(args=arguments, prog_name="intertitle", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except click.Abort:
        return INTERRUPTED
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "intertitle"
        say(f"{' '.join(error.format_message().split())} See '{command} --help'.")
    except IntertitleError as error:
        report(error, state)
    except MemoryError as error:
        report(error, state, f"not enough memory: {error}")
    except OSError as error:
        # A disk, a permission or a device, not the command.
        report(error, state, f"{error.filename or 'input or output failed'}: {error.strerror or error}")
        _silence(sys.stdout)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
