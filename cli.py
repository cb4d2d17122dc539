"""The ``intertitle`` command: results on stdout, everything else on stderr, bad input in one line with exit code 2."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .console import ProgressDisplay, check_savable, describe, describe_compiled, one_line, save, show, table
from .errors import IntertitleError, MediaError, OptionError

if TYPE_CHECKING:
    from .calibration.comparison import Report
    from .runtime.captioner import Caption

DEMO_CLIP = Path(__file__).parent / "calibration" / "clips" / "demo.mp4"

#: Exit codes besides 0: ``verify`` failed, bad input, Ctrl-C, and what shells show for a reader that went away.
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

_PATH = click.Path(path_type=Path)


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


def _note_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


_debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show the traceback of an error."
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="intertitle")
@_debug
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


@cli.command("compile", short_help="Compile a checkpoint into a bundle.")
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--output", type=_PATH, metavar="DIR", required=True, help="The bundle to write, a new directory.")
@click.option("--adapter", type=_PATH, metavar="DIR", help="A LoRA adapter (PEFT layout) to merge.  [default: none]")
@click.option("--target", metavar="NAME", default="cpu", show_default=True, help="What the bundle is for: cpu.")
@click.option("--weights", metavar="FORMAT", help="The decoder's weights: int4 or fp32.  [default: int4 for cpu]")
@click.option(
    "--visual-tokens",
    type=float,
    metavar="RATIO",
    help="Share of visual tokens that AuroraCap's merging keeps, up to 1.  [default: 1]",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@_quiet
@_debug
def compile_command(
    checkpoint: Path,
    output: Path,
    adapter: Path | None,
    target: str,
    weights: str | None,
    visual_tokens: float | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile CHECKPOINT (a folder in its released layout) into a bundle.

    \b
    Example: intertitle compile VideoLLaMA2.1-7B-AV -o captioner --weights int4
    """
    compile_bundle = _need_compile_extra()
    with ProgressDisplay(quiet) as progress:
        result = compile_bundle(
            checkpoint,
            output,
            adapter=adapter,
            target=target,
            weights=weights,
            visual_tokens=visual_tokens,
            overwrite=overwrite,
            progress=progress,
        )
    show(*describe_compiled(result))


def _decoding_options(command):
    options = [
        click.option("--prompt", metavar="TEXT", help="Instruction to the captioner.  [default: the family's own]"),
        click.option("--no-audio", is_flag=True, help="Do not listen to the sound."),
        click.option(
            "--decoding",
            "strategy",
            type=click.Choice(["greedy", "sample"]),
            default="greedy",
            show_default=True,
            help="How tokens are chosen.",
        ),
        click.option("--max-new-tokens", type=int, help="Longest caption, in tokens.  [default: the checkpoint's]"),
        click.option("--temperature", type=float, help="Sampling: temperature.  [default: the checkpoint's]"),
        click.option("--top-p", type=float, help="Sampling: probability mass kept.  [default: the checkpoint's]"),
        click.option("--top-k", type=int, help="Sampling: tokens kept, 0 for all.  [default: the checkpoint's]"),
        click.option("--seed", type=int, default=0, show_default=True, help="Sampling: seed."),
        click.option(
            "--stop", metavar="TEXT", multiple=True, help="Text that ends a caption; repeatable.  [default: none]"
        ),
        click.option("--device", metavar="NAME", default="auto", show_default=True, help="Where to run: auto or cpu."),
        click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: one a core]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(short_help="Caption videos, images and sounds with a bundle.")
@click.argument("bundle", type=_PATH)
@click.argument("media", type=_PATH, nargs=-1, required=True)
@_decoding_options
@click.option("--stream", is_flag=True, help="Print text as it is generated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file: text, tokens, timings, notes.")
@click.option("--srt", type=_PATH, metavar="FILE", help="Also write the caption as a subtitle file (one clip).")
@_quiet
@_debug
def caption(
    bundle: Path,
    media: tuple[Path, ...],
    prompt: str | None,
    no_audio: bool,
    strategy: str,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    stop: tuple[str, ...],
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
    from .runtime.captioner import Captioner
    from .runtime.decoding import Decoding

    if stream and as_json:
        raise OptionError("--stream and --json exclude each other")
    if srt is not None:
        if len(media) > 1:
            raise OptionError("--srt takes one clip")
        check_savable(srt)
    decoding = Decoding(
        strategy=strategy,  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=seed,
    )
    if strategy == "greedy" and any(value is not None for value in (temperature, top_p, top_k)):
        _say("--temperature, --top-p and --top-k do nothing without --decoding sample")
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
            _report(error, click.get_current_context().ensure_object(dict))
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
            _say(f"{path}: {note}", prefix="")
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
    from .runtime.subtitles import Cue, format_srt

    if not result.seconds:
        raise OptionError(f"{clip}: --srt needs a clip with a duration, not an image")
    save(path, format_srt([Cue(0.0, result.seconds, result.text)]))


@cli.command(short_help="Compare a bundle with PyTorch, stage by stage.")
@click.argument("bundle", type=_PATH)
@click.argument("media", type=_PATH, nargs=-1)
@click.option("--reference", type=_PATH, metavar="DIR", required=True, help="The checkpoint that was compiled.")
@click.option("--adapter", type=_PATH, metavar="DIR", help="The adapter that was merged.  [default: none]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Greedy tokens compared.")
@click.option("--no-audio", is_flag=True, help="Do not listen to the sound.")
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Write the report as JSON; - for stdout.")
@_quiet
@_debug
def verify(
    bundle: Path,
    media: tuple[Path, ...],
    reference: Path,
    adapter: Path | None,
    max_new_tokens: int,
    no_audio: bool,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare BUNDLE with PyTorch, stage by stage, on MEDIA (default: the shipped clip).

    Exits with 1 when a stage fails and names the first one. PASS: every stage within its tolerance and the greedy
    tokens equal. AMBIGUOUS: the tokens part at a near-tie.

    \b
    Example: intertitle verify captioner --reference VideoLLaMA2.1-7B-AV --json report.json
    """
    _need_compile_extra()
    from .calibration.verify import verify_bundle

    to_stdout = str(json_file) == "-"
    if json_file is not None and not to_stdout:
        check_savable(json_file)
    with ProgressDisplay(quiet) as progress:
        report = verify_bundle(
            bundle,
            reference,
            media or (DEMO_CLIP,),
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            audio=not no_audio,
            progress=lambda text: progress(text, 0, 0),
        )
    if json_file is not None:
        text = json.dumps(asdict(report), indent=1)
        click.echo(text) if to_stdout else save(json_file, text + "\n")
    if not to_stdout:
        _show_report(report)
    if report.verdict == "FAIL":
        raise click.exceptions.Exit(FAILED)


def _show_report(report: Report) -> None:
    for clip in report.clips:
        stages = table("stage", ">error", ">tolerance", "verdict")
        for stage in clip.stages:
            error = "-" if stage.relative_error is None else f"{stage.relative_error:.2e}"
            stages.add_row(stage.stage, error, f"{stage.tolerance:.0e}", stage.verdict)
        if clip.tokens is not None:
            equal = f"{clip.tokens.equal}/{clip.tokens.compared} equal"
            margin = "" if clip.tokens.margin is None else f"margin {clip.tokens.margin:.2e}"
            stages.add_row("greedy tokens", equal, margin, clip.tokens.verdict)
        problems = (f"{stage.stage}: {stage.problem}" for stage in clip.stages if stage.problem is not None)
        show(f"{clip.clip} ({clip.mode}):", stages, *problems)
        if clip.drift is not None:
            drift = clip.drift
            show(
                f"{report.weights} against the float32 weights: logits error {drift.logits_error:.2e}, "
                f"KL {drift.kl:.2e} nats, next token agrees {drift.top1_agreement:.0%}, "
                f"{drift.equal_tokens} of {drift.compared} greedy tokens equal"
            )
    where = f": first divergent component: {report.first_divergent}" if report.first_divergent else ""
    show(*report.notes, f"{report.verdict}{where}")


@cli.command(short_help="Show what is in a bundle.")
@click.argument("bundle", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
@_quiet
@_debug
def info(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Show what is in BUNDLE, once its files have been checked.

    \b
    Example: intertitle info captioner
    """
    import msgspec

    from .runtime.bundle import Bundle

    with ProgressDisplay(quiet) as progress:
        opened = Bundle.open(bundle, progress=lambda done, total: progress("checking the bundle", done, total))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(opened.manifest), indent=1).decode())
    else:
        show(*describe(opened.manifest))


@cli.command(short_help="Compile a tiny captioner and caption the shipped clip.")
@click.option(
    "--keep", type=_PATH, metavar="DIR", help="Keep checkpoint and bundle there.  [default: they are removed]"
)
@_quiet
@_debug
def demo(keep: Path | None, quiet: bool) -> None:
    """Compile a tiny captioner and caption the shipped clip: the whole path in a few seconds.

    The captioner has random weights, so its text is noise. It shows that the installation works, not what a captioner
    says.

    \b
    Example: intertitle demo --keep tiny
    """
    compile_bundle = _need_compile_extra()
    from .models.random_checkpoint import write_checkpoint
    from .runtime.captioner import Captioner
    from .runtime.decoding import Decoding

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        checkpoint, bundle = folder / "tiny-checkpoint", folder / "tiny-bundle"
        if not checkpoint.exists():
            _say("a random checkpoint in the layout of VideoLLaMA2.1-7B-AV: tiny-checkpoint", prefix="")
            write_checkpoint(checkpoint, "tiny")
        _say("$ intertitle compile tiny-checkpoint -o tiny-bundle --weights int4 --overwrite", prefix="")
        with ProgressDisplay(quiet) as progress:
            compile_bundle(checkpoint, bundle, weights="int4", overwrite=True, progress=progress)
        # Sampled from the whole vocabulary: the likeliest tokens of random weights are one token again and again.
        options = "--max-new-tokens 32 --decoding sample --temperature 1 --top-p 1 --top-k 0 --seed 1"
        decoding = Decoding(strategy="sample", max_new_tokens=32, temperature=1, top_p=1, top_k=0, seed=1)
        _say(f"$ intertitle caption tiny-bundle {DEMO_CLIP.name} {options}", prefix="")
        with ProgressDisplay(quiet, DEMO_CLIP.name) as progress:
            result = Captioner.load(bundle).caption(DEMO_CLIP, decoding=decoding, progress=progress)
    click.echo(f"caption (of random weights, so noise): {result.text!r}")
    click.echo(f"heard and saw: {result.mode}, {result.prompt_tokens} prompt tokens, {len(result.token_ids)} new")
    for stage, seconds in result.timings.items():
        click.echo(f"  {stage:<12} {seconds * 1000:8.1f} ms")


def _need_compile_extra():
    """``compile_bundle``; importing it needs torch and onnx, which the runtime does without."""
    try:
        from .export.compile import compile_bundle
    except ModuleNotFoundError as error:
        raise OptionError(
            f"this command needs '{error.name}', which is not installed: pip install 'intertitle[compile]'"
        ) from None
    return compile_bundle


def _say(message: object, prefix: str = "intertitle: ") -> None:
    click.echo(prefix + one_line(message), err=True)


def _report(error: Exception, state: Mapping[str, bool], message: str | None = None) -> None:
    """One line, or the traceback if that was asked for."""
    if state.get("debug"):
        traceback.print_exception(error)
    else:
        _say(message or error)


def _silence(*streams: Any) -> None:
    """Let whatever is still written to these streams vanish; Python would complain at exit."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 ``verify`` failed, 2 bad input, 130 interrupted."""
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
        _say(f"{' '.join(error.format_message().split())} See '{command} --help'.")
    except IntertitleError as error:
        _report(error, state)
    except MemoryError as error:
        _report(error, state, f"not enough memory: {error}")
    except OSError as error:
        # A disk, a permission or a device, not the command.
        _report(error, state, f"{error.filename or 'input or output failed'}: {error.strerror or error}")
        _silence(sys.stdout)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
