"""What the commands of many clips (``batch``, ``pairs``) have in common: their captioner, their output, their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import BatchDisplay, ProgressDisplay, say
from ..errors import OptionError
from . import FAILED, options
from .outputs import check_output, check_record_name

if TYPE_CHECKING:
    from ..runtime.batch import Tally
    from ..runtime.captioner import Captioner


def check_records(output: Path, inputs: tuple[str, ...], bundle: Path, instead: str) -> None:
    """``OptionError`` for an output that cannot be gone on with; ``instead``: what to do about a pipe or a device."""
    check_record_name(output)
    check_output(output, (*inputs, bundle / "bundle.json"))
    if output.exists() and not output.is_file():
        raise OptionError(f"{output}: is a pipe or a device{instead}")


def load_captioner(bundle: Path, device: str, threads: int | None, item_timeout: float, quiet: bool) -> Captioner:
    """The captioner, and beside it the processes that read its files. They start while it is loaded."""
    from ..runtime.batching import READ_AHEAD
    from ..runtime.captioner import Captioner

    readers = options.start_readers(READ_AHEAD, item_timeout)
    with ProgressDisplay(quiet) as progress:
        captioner = Captioner.load(bundle, device=device, threads=threads, progress=progress)
    captioner.readers = readers
    options.say_device(captioner)
    return captioner


@contextmanager
def told_when_interrupted(output: Path | None, display: BatchDisplay) -> Iterator[None]:
    """On Ctrl-C, say that what is done is kept."""
    try:
        yield
    except KeyboardInterrupt:
        display.stop()
        if output is not None:
            say(f"{output}: what is done is kept; the same command goes on from there", prefix="")
        raise


def exit_by(tally: Tally) -> None:
    """The exit code of a job: 1 where an item failed, in this run or before."""
    if tally.failures:
        raise click.exceptions.Exit(FAILED)
