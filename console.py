"""What the command line shows while it works: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .runtime.bundle import Manifest, TensorSpec

#: Stages shorter than this many units get no share of a bar.
_UNITS = {"vision": "frames", "prefill": "tokens", "decode": "tokens"}


def results() -> Console:
    """Standard output; wide enough for every table where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class ProgressDisplay:
    """Shows ``(stage, done, total)`` reports of compile, caption and verify.

    On a terminal one bar that changes its label with the stage; elsewhere one line when a stage begins. ``quiet``
    shows nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=None, count="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def label(self, text: str) -> None:
        """Say which file is being worked on."""
        self._say(text)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report; cheap enough to be called for every token."""
        if self._bar is not None and self._task is not None:
            count = f"{done}/{total} {_UNITS[stage]}" if stage in _UNITS and total else _megabytes(stage, done, total)
            self._bar.update(self._task, description=stage, completed=done, total=total or None, count=count)
        elif stage != self._stage:
            self._say(stage)
        self._stage = stage

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)


def _megabytes(stage: str, done: int, total: int) -> str:
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if stage.startswith(("writing", "checking")) and total else ""


def describe(manifest: Manifest) -> Iterator[Table | str]:
    """A bundle's manifest for a reader."""
    files = manifest.files
    yield f"{manifest.name}: {manifest.family}, for {manifest.target} ({manifest.dialect}), decoder {manifest.weights}"
    table = Table("component", "weights", "parameters", "MB", "takes", "gives")
    for name, part in manifest.components.items():
        size = sum(files[file].size for file in (part.graph, part.data) if file)
        taken, given = (escape("\n".join(_shapes(specs))) for specs in (part.inputs, part.outputs))
        table.add_row(name, part.weights, f"{part.parameters:,}", f"{size / 1e6:,.1f}", taken, given)
    embedding = manifest.embedding
    rows, width = embedding.shape
    size = files[embedding.file].size / 1e6
    table.add_row("embedding", embedding.dtype, f"{rows * width:,}", f"{size:,.1f}", "", escape(f"[{rows}, {width}]"))
    yield table
    decoder, visual, media = manifest.decoder, manifest.visual, manifest.preprocessing
    cache = 2 * 4 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    sound = f", {media.audio.num_tokens} audio tokens" if media.audio else ", no audio branch"
    tokens = visual.blocks * visual.tokens_per_block
    yield f"sees {media.num_frames} frames ({media.frame_rule}): {tokens} visual tokens{sound}; modes: " + ", ".join(
        manifest.prompts
    )
    yield f"context {decoder.context_length} tokens; cache {cache:,} bytes a token (float32)"
    made = manifest.provenance
    adapter = f" + adapter {made.adapter}" if made.adapter else ""
    yield f"compiled from {made.checkpoint}{adapter} by intertitle {made.intertitle}"
    yield f"{sum(record.size for record in files.values()) / 1e6:,.1f} MB in {len(files)} files"


def _shapes(specs: Sequence[TensorSpec]) -> Iterator[str]:
    """``name shape`` of each tensor; a decoder's cache is dozens of alike ones, of which a line says enough."""
    cache = [spec for spec in specs if spec.name.startswith(("past.", "present."))]
    for spec in specs:
        if spec not in cache:
            yield f"{spec.name} {_shape(spec)}"
    if cache:
        yield f"{len(cache)} x {cache[0].name.split('.')[0]} {_shape(cache[0])}"


def _shape(spec: TensorSpec) -> str:
    return "[" + ",".join(str(size) for size in spec.shape) + "]"
