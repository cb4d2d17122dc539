"""``intertitle caption``: captions of a few clips, as text, JSON or subtitles."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import ProgressDisplay, flat, one_line, report, safe, safe_json, safe_pieces, save, say
from ..errors import BundleError, IntertitleError, OptionError, TargetError
from . import BAD_INPUT, options
from .outputs import check_output, check_subtitles

if TYPE_CHECKING:
    from ..runtime.caption import Caption, CaptionStream
    from ..runtime.captioner import Captioner, PreparedClip
    from ..runtime.decoding import Decoding
    from ..runtime.viewing import Viewing


@click.command(cls=options.Grouped, short_help="Caption videos, images and sounds with a bundle.")
@click.argument("bundle", type=options.PATH)
@click.argument("media", type=options.PATH, nargs=-1, required=True)
@click.option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    help="The instruction to the model; repeatable, the clip is encoded once.  [default: the bundle's own]",
)
@options.viewing_options(span=True)
@options.decoding_options
@click.option(
    "--candidates",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Print this many captions of each clip, the likeliest first, each with its number and mean log-likelihood.",
)
@options.device_options
@click.option("--staged", is_flag=True, help="Save memory: load one component at a time, again for each clip.")
@click.option("--stream", is_flag=True, help="Print text as it is generated.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per caption: text, tokens, timings, notes.")
@click.option("--srt", type=options.PATH, metavar="FILE", help="Also write the caption of one clip as a SubRip file.")
@options.quiet
@options.debug
def caption(
    bundle: Path,
    media: tuple[Path, ...],
    prompts: tuple[str, ...],
    viewing: Viewing,
    decoding: Decoding,
    candidates: int,
    device: str,
    threads: int | None,
    staged: bool,
    stream: bool,
    as_json: bool,
    srt: Path | None,
    quiet: bool,
) -> None:
    """Caption MEDIA (videos, images, folders of images, sound files) with BUNDLE.

    For one file the command prints its caption. For several files it prints one line per file: name, tab, caption.
    Several instructions and several captions of a clip are printed in the same way. If a file cannot be captioned,
    the others are captioned all the same.

    \b
    Example: intertitle caption captioner clip.mp4 --max-new-tokens 128 --json
    """
    from ..runtime.batching import as_item_error
    from ..runtime.captioner import Captioner

    if stream and as_json:
        raise OptionError("--stream and --json exclude each other")
    if candidates > 1 and (stream or srt is not None):
        raise OptionError("--candidates goes neither with --stream nor with --srt")
    if srt is not None:
        if len(media) > 1 or len(prompts) > 1:
            raise OptionError("--srt takes one clip and one instruction")
        check_output(srt, media)
        check_subtitles(srt)
    # A file that crashes its decoder must not cost the others their captions.
    readers = options.start_readers(1) if len(media) > 1 else None
    with ProgressDisplay(quiet) as progress:
        captioner = Captioner.load(bundle, device=device, threads=threads, progress=progress, staged=staged)
    options.say_device(captioner)
    captioner.readers = readers
    asked = _Asked(captioner, prompts, decoding, candidates, viewing)
    failed, result = False, None
    for path in media:
        show = _Show(path, len(media) > 1, len(prompts) > 1, candidates > 1, as_json)
        answers = asked.answers(path, quiet, stream)
        while True:
            try:
                answer = next(answers, None)
            except (BundleError, TargetError):
                raise
            except Exception as error:
                if len(media) == 1 and not isinstance(error, IntertitleError):
                    raise
                # One bad file does not cost the others their captions.
                mine = as_item_error(error, path)
                message = f"{path}: {mine}" if isinstance(mine, OptionError) else str(mine)
                report(mine, click.get_current_context().ensure_object(dict), message)
                failed, result = True, None
                break
            if answer is None:
                break
            result = show(*answer)
        if srt is not None and result is not None:
            _save_srt(srt, path, result)
    if failed:
        raise click.exceptions.Exit(BAD_INPUT)


@dataclass(frozen=True)
class _Asked:
    """What is wanted of each clip."""

    captioner: Captioner
    prompts: tuple[str, ...]
    decoding: Decoding
    candidates: int
    viewing: Viewing

    def answers(
        self, path: Path, quiet: bool, stream: bool
    ) -> Iterator[tuple[int, str | None, CaptionStream | Caption]]:
        """Number, instruction and caption of each answer. A ``stream`` has its first piece of text.

        The captions of one instruction are numbered from 1, the likeliest first.
        """
        source: Path | PreparedClip = path
        viewing: dict[str, Any] = {"viewing": self.viewing}
        if len(self.prompts) > 1:
            with ProgressDisplay(quiet, str(path)) as progress:
                source, viewing = self.captioner.prepare(path, progress=progress, **viewing), {}
        for prompt in self.prompts or (None,):
            with ProgressDisplay(quiet, str(path)) as progress:
                how: dict[str, Any] = {"prompt": prompt, "decoding": self.decoding, "progress": progress, **viewing}
                if self.candidates > 1:
                    found: list[Any] = self.captioner.candidates(source, self.candidates, **how)
                elif stream:
                    found = [self.captioner.stream(source, **how)]
                    found[0].peek()
                else:
                    found = [self.captioner.caption(source, **how)]
            yield from ((number, prompt, one) for number, one in enumerate(found, 1))


@dataclass(frozen=True)
class _Show:
    """Prints the captions of one file."""

    path: Path
    several_files: bool
    several_prompts: bool
    several_captions: bool
    as_json: bool

    def __call__(self, number: int, prompt: str | None, pieces: CaptionStream | Caption) -> Caption:
        from ..runtime.caption import CaptionStream

        if isinstance(pieces, CaptionStream):
            click.echo(self._label(prompt), nl=False)
            for piece in safe_pieces(pieces):
                click.echo(piece if self._alone else flat(piece), nl=False)
            click.echo()
            assert pieces.caption is not None
            result = pieces.caption
        else:
            result = pieces
            line = _caption_json(self.path, prompt, result) if self.as_json else None
            score = f"{number}\t{result.mean_logprob:.3f}\t" if self.several_captions else ""
            text = safe(result.text) if self._alone else flat(result.text)
            click.echo(line or f"{self._label(prompt)}{score}{text}")
        for note in result.notes:
            say(f"{self.path}: {note}", prefix="")
        return result

    def _label(self, prompt: str | None) -> str:
        name = f"{one_line(self.path)}\t" if self.several_files else ""
        return name + (f"{one_line(prompt)}\t" if self.several_prompts else "")

    @property
    def _alone(self) -> bool:
        """Whether this is the only caption; of several, each takes one line."""
        return not (self.several_files or self.several_prompts or self.several_captions)


def _caption_json(path: Path, prompt: str | None, result: Caption) -> str:
    record = {"file": str(path), "prompt": prompt, **asdict(result), "mean_logprob": result.mean_logprob}
    text = safe_json(json.dumps(record, ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        # What the locale cannot write (or a file name that is no text) stays valid JSON as \\u escapes.
        text = json.dumps(record)
    return text


def _save_srt(path: Path, clip: Path, result: Caption) -> None:
    from ..runtime.subtitles import cue_of, format_srt

    cue = cue_of(result.text, result.start, result.seconds)
    if cue is None:
        raise OptionError(f"{clip}: --srt needs a clip with a duration, and this one has none (an image has none)")
    save(path, format_srt([cue]))
