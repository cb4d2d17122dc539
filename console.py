"""What the command line shows: results on stdout, progress on stderr (a bar on a terminal, plain lines elsewhere)."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import OptionError
from .plain_text import flat, one_line, safe, safe_json, safe_pieces
from .whole_files import whole

if TYPE_CHECKING:
    from .contract.manifest import Manifest
    from .contract.pipeline import Mode, Pipeline, Variant
    from .export.compile import CompileResult
    from .runtime.batch import Tally

__all__ = [
    "BatchDisplay",
    "ProgressDisplay",
    "check_savable",
    "describe",
    "describe_compiled",
    "duration",
    "flat",
    "one_line",
    "report",
    "safe",
    "safe_json",
    "safe_pieces",
    "save",
    "say",
    "show",
    "table",
]

#: What the numbers of a stage count. Those of other stages are bytes, shown once both are known, or nothing.
_UNITS = {"vision": "frames", "prefill": "tokens", "decode": "tokens"}

#: The longest label of a bar, in characters: what is left of 80 columns beside the bar, the count and the time.
_LABEL = 32
#: Failures that are named at the end of a batch.
_REASONS = 5


def show(*parts: Table | str, columns: int = 120) -> None:
    """Print to stdout. Tables fit the terminal, or so many columns where there is none; text is one line a part."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else columns)
    for part in parts:
        if isinstance(part, str):
            click.echo(one_line(part))
            continue
        # By way of a string: rich would answer a broken pipe with an exit of its own.
        with console.capture() as capture:
            console.print(part)
        click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def table(*columns: str) -> Table:
    """An empty plain table. A leading ``>`` in a column's name aligns it to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return made


def say(message: object, prefix: str = "intertitle: ") -> None:
    """One line on stderr."""
    click.echo(prefix + one_line(message), err=True)


def report(error: Exception, state: Mapping[str, bool], message: str | None = None) -> None:
    """An error as one line on stderr, or with its traceback where ``state`` (the context's object) says ``debug``."""
    if state.get("debug"):
        click.echo(safe("".join(traceback.format_exception(error))), nl=False, err=True)
    else:
        say(message or error)


def check_savable(path: Path) -> None:
    """``OptionError`` when ``save`` would fail for certain: better before the work than after."""
    if not path.parent.is_dir():
        problem = f"there is no directory {path.parent}"
    elif path.is_dir():
        problem = "it is a directory"
    elif not os.access(path.parent if path.is_file() or not path.exists() else path, os.W_OK):
        problem = "no permission to write there"
    else:
        return
    raise OptionError(f"{path}: cannot be written: {problem}")


def save(path: Path, text: str) -> None:
    """Write a result file: whole, or what was there before stays. Pipes and devices are written into.

    ``OptionError`` when that fails (a full disk, no permission).
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        # A killed batch leaves half a subtitle file; the next run takes it over.
        with whole(path.resolve(), alone=True) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror}") from error


class ProgressDisplay:
    """Shows ``(stage, done, total)`` reports of compile, caption and verify while its ``with`` block lasts.

    On a terminal one bar that is labelled with the stage and disappears at the end. Elsewhere one line for each stage
    as it begins, or a single one where a file is being captioned: ``captioning`` is its path. ``quiet`` shows nothing.
    """

    def __init__(self, quiet: bool = False, captioning: str = "") -> None:
        self.console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._file = one_line(captioning)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._open = False

    def __enter__(self) -> ProgressDisplay:
        self._open = not self._quiet
        if not self._open:
            return self
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(
                *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._task = self._bar.add_task(self._label(""), total=None, count="")
            self._bar.start()
        elif self._file:
            self._say(f"captioning {self._file}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report; cheap enough to be called for every token."""
        if not self._open:
            return
        begins, self._stage = stage != self._stage, stage
        if self._bar is not None and self._task is not None:
            # A stage that is entered once a token says so each time, without knowing how far it has come.
            if begins or total:
                self._bar.update(
                    self._task,
                    description=self._label(stage),
                    completed=done,
                    total=total or None,
                    count=_count(stage, done, total),
                )
            if begins and not total:
                # To ``update`` no total means the same as before.
                task = self._bar.tasks[0]
                task.total = task.finished_time = None
        elif begins and not self._file:
            self._say(one_line(stage))

    def _label(self, stage: str) -> str:
        stage = one_line(stage).replace("_", " ")
        name = self._file.rpartition("/")[2]
        room = max(_LABEL - len(stage) - 2, 8)
        if len(name) > room:
            name = f"…{name[1 - room :]}"
        label = f"{name}: {stage}" if name and stage else name or stage
        return label if len(label) <= 2 * _LABEL else f"…{label[1 - 2 * _LABEL :]}"

    @staticmethod
    def _say(text: str) -> None:
        click.echo(text, err=True)


class BatchDisplay:
    """Shows how far a batch is while its ``with`` block lasts: a bar on a terminal, elsewhere a line now and then.

    Speed and time left follow the last minute. ``quiet`` shows nothing but the summary.
    """

    #: Seconds between plain lines, and the seconds of which the speed is the mean.
    INTERVAL, WINDOW = 10.0, 60.0

    def __init__(self, inputs: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._inputs, self._quiet = inputs, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._said = time.monotonic()
        #: When, inputs that were worked on until then, captions and failures until then.
        self._history: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._seen = self._free = 0

    def __enter__(self) -> BatchDisplay:
        if self.console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[count]}", markup=False),
                TimeElapsedColumn(),
            )
            self._bar = Progress(
                *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._task = self._bar.add_task("captioning", total=self._inputs, count=f"0/{self._inputs}")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, tally: Tally) -> None:
        """Take a report."""
        if self._quiet:
            return
        now, worked = time.monotonic(), tally.captioned + tally.failed
        if worked == self._history[-1][2]:
            # Nothing was made for it: what an earlier run did says nothing about the speed of this one.
            self._free += tally.finished - self._seen
        self._seen = tally.finished
        self._history.append((now, tally.finished - self._free, worked))
        while len(self._history) > 2 and now - self._history[0][0] > self.WINDOW:
            self._history.popleft()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=tally.finished, count=self.state(tally))
        elif self._bar is None and now - self._said >= self.INTERVAL:
            self._said = now
            click.echo(self.state(tally), err=True)

    def state(self, tally: Tally) -> str:
        """``12/80, 31.0 clips/min, 1 failed, 2:11 left``."""
        (then, inputs, worked), (now, inputs_now, worked_now) = self._history[0], self._history[-1]
        parts = [f"{tally.finished}/{tally.inputs}"]
        passed = now - then
        if passed > 0 and worked_now > worked:
            parts.append(f"{60 * (worked_now - worked) / passed:.1f} clips/min")
        if tally.failures:
            parts.append(f"{tally.failures} failed")
        if passed > 0 and inputs_now > inputs:
            left = (tally.inputs - tally.finished) * passed / (inputs_now - inputs)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def summary(self, tally: Tally, output: Path | None = None) -> None:
        """On stderr: what was done, what had been, how fast, and the first reasons of failures."""
        passed = time.monotonic() - self._began
        speed = f"{60 * tally.captioned / passed:.1f} clips/min, " if tally.captioned and passed > 0 else ""
        before = f" ({tally.already_failed} of them before)" if tally.already_failed else ""
        click.echo(
            f"{tally.captioned} captioned, {tally.already} already done, {tally.copied} copied, "
            f"{tally.failures} failed{before}; {speed}{duration(passed)} in all",
            err=True,
        )
        for reason in tally.reasons[:_REASONS]:
            click.echo(f"  failed: {one_line(reason)}", err=True)
        if tally.failures and output is not None:
            more = tally.failures - min(len(tally.reasons), _REASONS)
            others = f"{more} more in {one_line(output)}; " if more else ""
            click.echo(f"  {others}--retry-failed tries them again", err=True)


def duration(seconds: float) -> str:
    """``M:SS``, or ``H:MM:SS`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(stage: str, done: int, total: int) -> str:
    if not total:
        return ""
    if stage in _UNITS:
        return f"{done}/{total} {_UNITS[stage]}"
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if stage.startswith(("writing", "checking")) else ""


def describe_compiled(result: CompileResult) -> Iterator[Table | str]:
    """What each part of a new bundle weighs."""
    yield f"{result.path}:"
    weighed = table("component", "weights", ">parameters", ">MB")
    rows, width = result.manifest.embedding.shape
    for name, size in result.component_bytes.items():
        part = result.manifest.components.get(name)
        weights, parameters = (part.weights, f"{part.parameters:,}") if part else ("", "")
        if name == "embedding":
            weights, parameters = result.manifest.embedding.dtype, f"{rows * width:,}"
        weighed.add_row(name, weights, parameters, f"{size / 1e6:,.1f}")
    weighed.add_row("total", "", "", f"{sum(result.component_bytes.values()) / 1e6:,.1f}")
    yield weighed


def describe(manifest: Manifest) -> Iterator[Table | str]:
    """A bundle's manifest for a reader, in at most 80 columns."""
    files = manifest.files
    yield f"{manifest.name}: {manifest.family}, for {manifest.target} ({manifest.dialect}), decoder {manifest.weights}"
    parts = table("component", "weights", ">parameters", ">MB")
    loaded = 0
    for name, part in manifest.components.items():
        size = sum(files[file].size for file in (part.graph, part.data) if file)
        loaded += size
        parts.add_row(name, part.weights, f"{part.parameters:,}", f"{size / 1e6:,.1f}")
    rows, width = manifest.embedding.shape
    embedding = files[manifest.embedding.file].size
    parts.add_row("embedding", manifest.embedding.dtype, f"{rows * width:,}", f"{embedding / 1e6:,.1f}")
    parts.add_row(f"{len(files)} files", "", "", f"{sum(record.size for record in files.values()) / 1e6:,.1f}")
    yield parts
    facts = Table.grid("name", "fact", padding=(0, 2, 0, 0))
    for name, fact in _facts(manifest, loaded):
        facts.add_row(name, escape(one_line(fact)))
    yield facts


def _clip_tokens(pipeline: Pipeline, mode: Mode, variant: Variant | None = None) -> int:
    """Tokens that the stages of a prompt give a clip of all frames."""
    from .contract.pipeline import stages_of

    places, names = pipeline.sampling.count, stages_of(pipeline.prompts[mode].pieces)
    return sum(pipeline.units(name, places) * pipeline.tokens(name, variant) for name in names)


def _facts(manifest: Manifest, loaded: int) -> Iterator[tuple[str, str]]:
    """What a captioner takes, does and needs. ``loaded``: bytes of the components that are loaded to run it."""
    from .runtime.viewing import Share

    decoder, pipeline, decoding = manifest.decoder, manifest.pipeline, manifest.generation
    sampling, merging = pipeline.sampling, pipeline.merging
    variants = () if merging is None else merging.variants
    tokens = _clip_tokens(pipeline, "video", variants[0] if variants else None)
    shares = [f"{Share(each.keep)} gives {_clip_tokens(pipeline, 'video', each)}" for each in variants]
    kept = f" (merging: {', '.join(shares)})" if shares[1:] or (variants and variants[0].keep != 1) else ""
    rate = "" if sampling.fps is None else f", {sampling.fps:g} a second"
    yield "pictures", f"{sampling.count} frames of a clip ({sampling.rule}{rate}), {tokens} visual tokens{kept}"
    sound = _clip_tokens(pipeline, "audio") if "audio" in pipeline.prompts else 0
    yield "sound", f"{sound} audio tokens" if pipeline.sound else "is ignored: there is no audio branch"
    yield "modes", ", ".join(pipeline.prompts)
    yield "prompt", f'"{manifest.default_instruction}" unless another is given'
    length = f"up to {decoding.max_new_tokens} new tokens, context {decoder.context_length} tokens"
    yield "decoding", f"greedy unless asked otherwise, {length}, repetition penalty {decoding.repetition_penalty:g}"
    yield "sampling", f"temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, top-k {decoding.top_k or 'off'}"
    longest = min(tokens + sound + decoding.max_new_tokens, decoder.context_length)
    yield (
        "memory",
        f"{loaded / 1e6:,.1f} MB of weights are loaded; the embedding stays on disk. The cache takes "
        f"{manifest.cache_bytes:,} bytes a token ({manifest.cache_dtype}): {longest * manifest.cache_bytes / 1e6:,.1f} "
        f"MB for a whole clip with the longest caption. Activations come on top.",
    )
    yield "time", "depends on the machine: intertitle caption BUNDLE CLIP --json prints the seconds of each stage"
    made = manifest.provenance
    adapter = f" + adapter {made.adapter}" if made.adapter else ""
    yield "made from", f"{made.checkpoint}{adapter} by intertitle {made.intertitle}"
