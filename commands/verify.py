"""``intertitle verify``: a bundle against PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import ProgressDisplay, check_savable, save, show, table
from . import DEMO_CLIP, FAILED, options

if TYPE_CHECKING:
    from ..calibration.comparison import Report


@click.command(short_help="Compare a bundle with PyTorch, stage by stage.")
@click.argument("bundle", type=options.PATH)
@click.argument("media", type=options.PATH, nargs=-1)
@click.option("--reference", type=options.PATH, metavar="DIR", required=True, help="The checkpoint that was compiled.")
@click.option("--adapter", type=options.PATH, metavar="DIR", help="The adapter that was merged.  [default: none]")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Greedy tokens to compare."
)
@options.audio
@click.option("--json", "json_file", type=options.PATH, metavar="FILE", help="Write the report as JSON; - is stdout.")
@options.quiet
@options.debug
def verify(
    bundle: Path,
    media: tuple[Path, ...],
    reference: Path,
    adapter: Path | None,
    max_new_tokens: int,
    audio: bool,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare BUNDLE with PyTorch, stage by stage, on MEDIA (default: the shipped clip).

    PASS: every stage is within its tolerance, and the greedy tokens are equal. AMBIGUOUS: the tokens differ where two
    logits are almost equal. FAIL: the report names the first stage that fails, and the exit code is 1.

    \b
    Example: intertitle verify captioner --reference VideoLLaMA2.1-7B-AV --json report.json
    """
    options.need_compile_extra()
    from ..calibration.verify import verify_bundle

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
            audio=audio,
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
