"""``intertitle caption``: captions of a few clips, as text, JSON or subtitles."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import ProgressDisplay, check_savable, one_line, report, save, say
from ..errors import MediaError, OptionError
from . import BAD_INPUT, options

if TYPE_CHECKING:
    from ..runtime.captioner import Caption
    from ..runtime.decoding import Decoding


@click.command(short_help="Caption videos, images and sounds with a bundle.")
@click.argument("bundle", type=options.PATH)
@click.argument("media", type=options.PATH, nargs=-1, required=True)
@options.prompt
@options.no_audio
@options.decoding_options
@options.device_options
@click.option("--stream", is_flag=True, help="Print text as it is generated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file: text, tokens, timings, notes.")
@click.option("--srt", type=options.PATH, metavar="FILE", help="Also write the caption as a subtitle file (one clip).")
@options.quiet
@options.debug
def caption(
    bundle: Path,
    media: tuple[Path, ...],
    prompt: str | None,
    no_audio: bool,
    decoding: Decoding,
    device: str,
    threads: int | None,
    stream: bool,
    as_json: bool,
    srt: Path | None,
    quiet: bool,
) -> None:
    """Caption MEDIA (videos, images, folders of images, sound files) with BUNDLE.

    One file gives its caption; several give a line each, the file's name, a tab and the caption. A file that cannot
    be captioned does not stop the others.

    \b
    Example: intertitle caption captioner clip.mp4 --max-new-tokens 128 --json
    """
    from ..runtime.captioner import Captioner

    if stream and as_json:
        raise OptionError("--stream and --json exclude each other")
    if srt is not None:
        if len(media) > 1:
            raise OptionError("--srt takes one clip")
        check_savable(srt)
    with ProgressDisplay(quiet) as progress:
        captioner = Captioner.load(bundle, device=device, threads=threads, progress=progress)
    failed, several = False, len(media) > 1
    for path in media:
        name = f"{one_line(path)}\t" if several else ""
        try:
            with ProgressDisplay(quiet, str(path)) as progress:
                pieces = captioner.stream(path, prompt=prompt, audio=not no_audio, decoding=decoding, progress=progress)
                first = next(pieces, "") if stream else "".join(pieces)
        except MediaError as error:
            # One bad file does not cost the others their captions.
            report(error, click.get_current_context().ensure_object(dict))
            failed = True
            continue
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from error
        if stream:
            click.echo(name, nl=False)
            for piece in chain([first], pieces):
                click.echo(_without_breaks(piece) if several else piece, nl=False)
            click.echo()
        result = pieces.caption
        assert result is not None
        for note in result.notes:
            say(f"{path}: {note}", prefix="")
        if as_json:
            click.echo(_caption_json(path, result))
        elif not stream:
            click.echo(name + (_without_breaks(result.text) if several else result.text))
        if srt is not None:
            _save_srt(srt, path, result)
    if failed:
        raise click.exceptions.Exit(BAD_INPUT)


def _without_breaks(text: str) -> str:
    """Fit for one line of several."""
    return text.replace("\r", " ").replace("\n", " ")


def _caption_json(path: Path, result: Caption) -> str:
    record = {"file": str(path), **asdict(result), "mean_logprob": result.mean_logprob}
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        # What the locale cannot write (or a file name that is no text) stays valid JSON as \\u escapes.
        text = json.dumps(record)
    return text


def _save_srt(path: Path, clip: Path, result: Caption) -> None:
    from ..runtime.subtitles import Cue, format_srt

    if not result.seconds:
        raise OptionError(f"{clip}: --srt needs a clip with a duration, not an image")
    save(path, format_srt([Cue(0.0, result.seconds, result.text)]))
