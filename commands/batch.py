"""``intertitle batch``: many clips into one file of records, to be stopped and started again at will."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import BatchDisplay, save, say
from ..errors import OptionError
from . import options
from .jobs import check_records, exit_by, load_captioner, told_when_interrupted
from .outputs import check_output

if TYPE_CHECKING:
    from ..runtime.batch import Entry, RecordFile, RecordStream, Settings, SubtitleWriter
    from ..runtime.decoding import Decoding
    from ..runtime.viewing import Viewing


class _Segments(click.ParamType):
    """A length in seconds, or ``scenes``."""

    name = "segments"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "scenes" or isinstance(value, float):
            return value
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds < float("inf"):
            self.fail(f"{value!r} is neither a length in seconds (0.1 or more) nor 'scenes'", param, ctx)
        return seconds


@click.command(cls=options.Grouped, short_help="Caption many files into one file of records; resumable.")
@click.argument("bundle", type=options.PATH)
@click.argument("inputs", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", required=True, help="The JSONL file to write; - is stdout.")
@options.prompt
@options.viewing_options()
@options.decoding_options
@options.device_options
@click.option("--rows", type=click.IntRange(1), help="Captions generated together.  [default: 8, or what fits]")
@click.option(
    "--memory",
    type=options.Bytes(),
    metavar="SIZE",
    help="The most memory for the cache of keys and values, for example 2GiB.  [default: no limit]",
)
@click.option(
    "--segments",
    type=_Segments(),
    metavar="SECONDS|scenes",
    help="Cut each video into pieces of this length or into scenes, and caption each piece.  [default: whole]",
)
@click.option("--srt", is_flag=True, help="Write a SubRip file beside each clip.")
@click.option("--vtt", is_flag=True, help="Write a WebVTT file beside each clip.")
@click.option(
    "--subtitles-dir", type=options.PATH, metavar="DIR", help="Write subtitle files there.  [default: beside the clip]"
)
@options.item_timeout
@options.resume_options
@options.quiet
@options.debug
def batch(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    prompt: str | None,
    viewing: Viewing,
    decoding: Decoding,
    device: str,
    threads: int | None,
    rows: int | None,
    memory: int | None,
    segments: float | str | None,
    srt: bool,
    vtt: bool,
    subtitles_dir: Path | None,
    item_timeout: float,
    retry_failed: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Caption INPUTS with BUNDLE, many at once, into one JSONL file.

    INPUTS are files, folders (searched for media files), patterns in quotes ('clips/**/*.mp4') and manifests. A
    manifest is a .jsonl file with an object per line or a .csv file with a header. Its fields are file (or video, or
    path), prompt, start, end (seconds) and id. Other fields go into the record, under meta. Its paths are relative to
    the manifest.

    After a stop or a kill, the same command continues. An item that cannot be captioned gets a record with the reason,
    and the exit code is then 1.

    \b
    Example: intertitle batch captioner holiday/ -o captions.jsonl --max-new-tokens 128
    """
    from ..runtime.batch import Entry, Job, Settings, read_inputs
    from ..runtime.decoding import Decoding
    from ..runtime.viewing import Viewing

    target = None if output == "-" else Path(output)
    if target is None and (srt or vtt or retry_failed or overwrite):
        raise OptionError("--srt, --vtt, --retry-failed and --overwrite need an output file, not -o -")
    if subtitles_dir is not None and not (srt or vtt):
        raise OptionError("--subtitles-dir goes with --srt or --vtt")
    if segments == "scenes" and find_spec("scenedetect") is None:
        raise OptionError("cutting at scenes needs PySceneDetect: pip install 'intertitle[scenes]'")
    if target is not None:
        check_records(target, inputs, bundle, "; use -o - and send stdout there")
    entries = read_inputs(inputs, segmented=segments is not None)
    files = [entry for entry in entries if isinstance(entry, Entry)]
    if target is not None:
        check_output(target, (entry.file for entry in files))
    subtitles = _subtitles(files, srt, vtt, subtitles_dir)
    captioner = load_captioner(bundle, device, threads, item_timeout, quiet)
    settings = Settings.of(
        bundle,
        {"prompt": prompt, "segments": segments, **viewing.record, **asdict(decoding)},
        {"prompt": None, "segments": None, **Viewing().record, **asdict(Decoding())},
    )
    with (
        _open_output(target, settings, overwrite=overwrite, retry_failed=retry_failed) as records,
        BatchDisplay(len(entries), quiet) as display,
    ):
        job = Job(
            entries,
            records,
            segments=segments,  # type: ignore[arg-type]
            subtitles=subtitles,
            watch=display,
            options={
                "prompt": prompt,
                "viewing": viewing,
                "decoding": decoding,
                "rows": rows,
                "memory": memory,
                "item_timeout": item_timeout,
            },
            debug=click.get_current_context().ensure_object(dict).get("debug", False),
        )
        with told_when_interrupted(target, display):
            tally = job.run(captioner)
    display.summary(tally, target)
    exit_by(tally)


def _open_output(target: Path | None, settings: Settings, **how: bool) -> RecordFile | RecordStream:
    from ..runtime.batch import RecordFile, RecordStream

    if target is not None:
        return RecordFile(target, settings, **how)

    def write(line: str) -> None:
        click.echo(line, nl=False)
        sys.stdout.flush()

    return RecordStream(write, settings)


def _subtitles(entries: list[Entry], srt: bool, vtt: bool, directory: Path | None) -> SubtitleWriter | None:
    from ..runtime.batch import SubtitleWriter

    formats = [name for name, wanted in (("srt", srt), ("vtt", vtt)) if wanted]
    if not formats:
        return None
    if directory is not None and not directory.is_dir():
        raise OptionError(f"{directory}: there is no such directory")
    return SubtitleWriter(
        (entry.file for entry in entries), formats, save, lambda text: say(text, prefix=""), directory
    )
