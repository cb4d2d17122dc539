"""The ``intertitle`` command: results on stdout, everything else on stderr, bad input in one line with exit code 2."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from ._version import __version__
from .console import ProgressDisplay, describe, results
from .errors import IntertitleError, MediaError, OptionError

if TYPE_CHECKING:
    from .calibration.verify import Report
    from .runtime.captioner import Caption, Captioner
    from .runtime.decoding import Decoding

DEMO_CLIP = Path(__file__).parent / "calibration" / "clips" / "demo.mp4"

_EXISTING = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="intertitle")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Compile Video-LLM captioners and caption video without PyTorch.

    \b
    intertitle compile VideoLLaMA2.1-7B-AV -o captioner --weights int4
    intertitle caption captioner clip.mp4
    """


@cli.command("compile")
@click.argument("checkpoint", type=_EXISTING)
@click.option("-o", "--output", type=_EXISTING, required=True, help="The bundle to write (a directory).")
@click.option("--adapter", type=_EXISTING, help="A LoRA adapter (PEFT layout) to merge first.")
@click.option("--target", default="cpu", show_default=True, help="What the bundle is for.")
@click.option("--weights", help="Format of the decoder's weights: fp32 or int4.  [default: the target's, int4 for cpu]")
@click.option("--visual-tokens", type=float, metavar="RATIO", help="Share of visual tokens to keep (AuroraCap merges).")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
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
    table = Table("component", "weights", "parameters", "MB", title=f"{output}", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, size in result.component_bytes.items():
        component = result.manifest.components.get(name)
        described = (component.weights, f"{component.parameters:,}") if component else ("", "")
        table.add_row(name, *described, f"{size / 1e6:,.1f}")
    table.add_section()
    table.add_row("total", "", "", f"{sum(result.component_bytes.values()) / 1e6:,.1f}")
    results().print(table)


def _decoding_options(command):
    options = [
        click.option("--prompt", help="Instruction to the captioner.  [default: the family's own]"),
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
        click.option("--temperature", type=float, help="Sampling temperature.  [default: the checkpoint's]"),
        click.option("--top-p", type=float, help="Sampling: probability mass kept.  [default: the checkpoint's]"),
        click.option("--top-k", type=int, help="Sampling: tokens kept, 0 for all.  [default: the checkpoint's]"),
        click.option("--stop", multiple=True, help="Text that ends a caption; may be given several times."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling."),
        click.option("--device", default="auto", show_default=True, help="Where to run."),
        click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: one a core]"),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("bundle", type=_EXISTING)
@click.argument("media", type=_EXISTING, nargs=-1, required=True)
@_decoding_options
@click.option("--stream", is_flag=True, help="Print text as it is generated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file: text, tokens, timings, notes.")
@click.option("--srt", type=_EXISTING, metavar="FILE", help="Also write the caption as a subtitle file (one clip).")
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
    stop: tuple[str, ...],
    seed: int,
    device: str,
    threads: int | None,
    quiet: bool,
    stream: bool,
    as_json: bool,
    srt: Path | None,
) -> None:
    """Caption MEDIA (videos, images, folders of images, sound files) with BUNDLE.

    \b
    Example: intertitle caption captioner clip.mp4 --max-new-tokens 128 --json
    """
    from .runtime.captioner import Captioner
    from .runtime.decoding import Decoding

    if stream and as_json:
        raise OptionError("--stream and --json exclude each other")
    if srt is not None and len(media) > 1:
        raise OptionError("--srt takes one clip")
    decoding = Decoding(
        strategy=strategy,  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=seed,
    )
    with ProgressDisplay(quiet) as progress:
        captioner = Captioner.load(bundle, device=device, threads=threads, progress=progress)
    failed = 0
    for path in media:
        try:
            result = _caption_one(captioner, path, prompt, not no_audio, decoding, quiet, stream)
        except MediaError as error:
            # One bad file does not cost the others their captions.
            if len(media) == 1:
                raise
            _print_error(error)
            failed += 1
            continue
        for note in result.notes:
            click.echo(f"{path}: {note}", err=True)
        if as_json:
            click.echo(json.dumps({"file": str(path), **_caption_record(result)}, ensure_ascii=False))
        elif not stream:
            click.echo(result.text if len(media) == 1 else f"{path}\t{result.text}")
        if srt is not None:
            _write_srt(srt, result)
    if failed:
        raise IntertitleError(f"{failed} of {len(media)} files could not be captioned")


def _caption_one(
    captioner: Captioner,
    path: Path,
    prompt: str | None,
    audio: bool,
    decoding: Decoding,
    quiet: bool,
    stream: bool,
) -> Caption:
    if not stream:
        with ProgressDisplay(quiet) as progress:
            progress.label(str(path))
            return captioner.caption(path, prompt=prompt, audio=audio, decoding=decoding, progress=progress)
    with ProgressDisplay(quiet) as progress:
        pieces = captioner.stream(path, prompt=prompt, audio=audio, decoding=decoding)
        first = next(pieces, "")
    click.echo(first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    assert pieces.caption is not None
    return pieces.caption


def _caption_record(result: Caption) -> dict[str, object]:
    return {**asdict(result), "mean_logprob": result.mean_logprob}


def _write_srt(path: Path, result: Caption) -> None:
    from .runtime.subtitles import Cue, write_srt

    if result.seconds is None:
        raise OptionError("--srt needs a clip with a duration, not an image")
    write_srt(path, [Cue(0.0, result.seconds, result.text)])


@cli.command()
@click.argument("bundle", type=_EXISTING)
@click.argument("media", type=_EXISTING, nargs=-1)
@click.option("--reference", type=_EXISTING, required=True, help="The checkpoint that the bundle was compiled from.")
@click.option("--adapter", type=_EXISTING, help="The adapter that was merged.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Greedy tokens compared.")
@click.option("--no-audio", is_flag=True, help="Do not listen to the sound.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), help="Write the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
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
        click.echo(text) if str(json_file) == "-" else json_file.write_text(text + "\n")
    if str(json_file) != "-":
        _print_report(report)
    if report.verdict == "FAIL":
        sys.exit(1)


def _print_report(report: Report) -> None:
    console = results()
    for clip in report.clips:
        table = Table(
            "stage", "error", "tolerance", "", title=f"{escape(clip.clip)} ({clip.mode})", title_justify="left"
        )
        for stage in clip.stages:
            table.add_row(stage.stage, f"{stage.error:.2e}", f"{stage.tolerance:.0e}", stage.verdict)
        if clip.tokens is not None:
            near = "" if clip.tokens.margin is None else f"margin {clip.tokens.margin:.2e}"
            table.add_row(
                "greedy tokens", f"{clip.tokens.equal}/{clip.tokens.compared} equal", near, clip.tokens.verdict
            )
        console.print(table)
        if clip.drift is not None:
            drift = clip.drift
            console.print(
                f"{report.weights} against the float32 weights: logits error {drift.logits_error:.2e}, "
                f"KL {drift.kl:.2e} nats, next token agrees {drift.top1_agreement:.0%}, "
                f"{drift.equal_tokens} of {drift.compared} greedy tokens equal"
            )
    where = f": first divergent component: {report.first_divergent}" if report.first_divergent else ""
    for note in report.notes:
        console.print(note, markup=False)
    console.print(f"{report.verdict}{where}")


@cli.command()
@click.argument("bundle", type=_EXISTING)
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def info(bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE.

    \b
    Example: intertitle info captioner
    """
    import msgspec

    from .runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(opened.manifest), indent=1).decode())
    else:
        results().print(*describe(opened.manifest), sep="\n")


@cli.command()
@click.option("--keep", type=_EXISTING, metavar="DIR", help="Keep the checkpoint and the bundle there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def demo(keep: Path | None, quiet: bool) -> None:
    """Compile a tiny captioner and caption the shipped clip: the whole path in a few seconds.

    The captioner has random weights, so its text is noise. It shows that the installation works, not what a captioner
    says.
    """
    compile_bundle = _need_compile_extra()
    from .models.random_checkpoint import write_checkpoint
    from .runtime.captioner import Captioner
    from .runtime.decoding import Decoding

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        checkpoint, bundle = folder / "tiny-checkpoint", folder / "tiny-bundle"
        click.echo("$ a random checkpoint in the layout of VideoLLaMA2.1-7B-AV, compiled to int4", err=True)
        write_checkpoint(checkpoint, "tiny")
        with ProgressDisplay(quiet) as progress:
            compile_bundle(checkpoint, bundle, weights="int4", overwrite=True, progress=progress)
        with ProgressDisplay(quiet) as progress:
            result = Captioner.load(bundle).caption(DEMO_CLIP, decoding=Decoding(max_new_tokens=32), progress=progress)
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


def _print_error(error: Exception) -> None:
    click.echo(f"intertitle: {error}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 ``verify`` failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cli.main(args=arguments, prog_name="intertitle", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("intertitle: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        _print_error(Exception(error.format_message()))
        sys.exit(2)
    except BrokenPipeError:
        # The reader of a pipe went away (| head): not an error of ours, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except IntertitleError as error:
        if "--debug" in arguments:
            raise
        _print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
