"""``intertitle pairs``: preference pairs from clips, for training a captioner towards what is true."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import BatchDisplay, duration, say
from ..errors import OptionError
from . import options
from .jobs import check_records, exit_by, load_captioner, told_when_interrupted
from .outputs import check_output

if TYPE_CHECKING:
    from ..align.preference import Item, PairTally, Scorer
    from ..runtime.batch import BadLine, Entry
    from ..runtime.viewing import Viewing

#: Where the judge's key is looked for: a command line is seen by every user of a machine, and kept in histories.
KEY = "INTERTITLE_JUDGE_API_KEY"


@click.command(cls=options.Grouped, short_help="Preference pairs from clips, for aligning a captioner; resumable.")
@click.argument("bundle", type=options.PATH)
@click.argument("inputs", nargs=-1)
@click.option("-o", "--output", type=options.PATH, metavar="FILE", required=True, help="The JSONL file to write.")
@click.option(
    "--scenes", metavar="SPLIT:FIRST:STOP", help="Use rendered scenes instead of INPUTS: train:0:500.  [default: none]"
)
@click.option(
    "--scorer",
    "scorer_name",
    type=click.Choice(["reference-free", "scenes", "judge"]),
    help="How captions are scored: by their agreement, by the facts of the scene, or by a language model.  [default: "
    "scenes with --scenes, else reference-free]",
)
@click.option(
    "--judge-url",
    metavar="URL",
    help=f"Judge: an OpenAI-compatible API, http://host/v1; key in ${KEY}.  [default: none]",
)
@click.option("--judge-model", metavar="NAME", help="Judge: the name of its model.  [default: none]")
@click.option(
    "--judge-workers", type=click.IntRange(1, 256), default=8, show_default=True, help="Judge: questions in flight."
)
@click.option(
    "--judge-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Judge: wait this many seconds for an answer. A question is asked up to 5 times.",
)
@click.option(
    "--candidates", type=click.IntRange(1), default=8, show_default=True, help="Captions to sample of each clip."
)
@click.option(
    "--contrast-alpha",
    type=float,
    multiple=True,
    default=(0.5,),
    help="Add a caption with temporal contrast of this weight; repeatable.  [default: 0.5]",
)
@click.option(
    "--gap",
    type=float,
    default=4.0,
    show_default=True,
    help="Keep a pair if the scores of its two captions differ by at least this. A score is at most 13.5.",
)
@click.option(
    "--retrospective/--no-retrospective",
    default=True,
    show_default=True,
    help="Caption again with each caption in the prompt, and add the results.",
)
@options.prompt
@click.option(
    "--segment-prompt",
    metavar="TEXT",
    help="The instruction for the segments of a clip; '' uses --prompt. The default asks to say only what is certain.  "
    "[default: a cautious one]",
)
@options.viewing_options()
@options.item_timeout
@click.option("--max-new-tokens", type=click.IntRange(1), help="Stop after this many tokens.  [default: the bundle's]")
@click.option("--temperature", type=float, default=0.9, show_default=True, help="Sampling: divide the logits by this.")
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Sampling: keep the likeliest tokens that together have this probability.",
)
@click.option(
    "--top-k",
    type=int,
    default=32,
    show_default=True,
    help="Sampling: keep this many of the likeliest tokens; 0 keeps all.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of sampling.")
@options.device_options
@options.resume_options
@options.quiet
@options.debug
def pairs(
    bundle: Path,
    inputs: tuple[str, ...],
    output: Path,
    scenes: str | None,
    scorer_name: str | None,
    judge_url: str | None,
    judge_model: str | None,
    judge_workers: int,
    judge_timeout: float,
    gap: float,
    viewing: Viewing,
    item_timeout: float,
    segment_prompt: str | None,
    device: str,
    threads: int | None,
    retry_failed: bool,
    overwrite: bool,
    quiet: bool,
    **decoding: Any,
) -> None:
    """Caption INPUTS with BUNDLE several times each, score the captions, and write the best and the worst.

    INPUTS are the same as for batch: files, folders, patterns and manifests. The steps are those of SynPO. The bundle
    captions segments of the clip, then the whole clip several times (sampled, greedy, contrastive), then again with
    each caption in the prompt. Each caption gets a score for factuality, fluency and consistency.

    After a stop or a kill, the same command continues. A clip that fails gets a record with the reason, and the exit
    code is then 1.

    \b
    Example: intertitle pairs captioner holiday/ -o pairs.jsonl --scorer judge \\
               --judge-url http://localhost:8000/v1 --judge-model qwen-plus
    """
    from ..align.preference import CAUTIOUS, GAP, PairFile, PairJob, Proposer, Recipe, read_pairs
    from ..runtime.batch import Entry, Settings

    name = scorer_name or ("scenes" if scenes is not None else "reference-free")
    _check(inputs, scenes, name, judge_url, judge_model)
    recipe = Recipe(
        **decoding,
        viewing=viewing,
        segment_prompt=CAUTIOUS if segment_prompt is None else segment_prompt or None,
    )
    entries = _entries(inputs, scenes)
    scorer = _scorer(name, judge_url, judge_model, judge_workers, judge_timeout)
    if str(output) == "-":
        raise OptionError("-: pairs need a file that can be gone on with, not stdout")
    check_records(output, inputs, bundle, ", and pairs need a file that can be gone on with")
    check_output(output, (entry.file for entry in entries if isinstance(entry, Entry)))
    captioner = load_captioner(bundle, device, threads, item_timeout, quiet)
    settings = Settings.of(
        bundle,
        {**recipe.record, "scorer": scorer.name, "judge_model": judge_model, "gap": gap},
        {**Recipe().record, "judge_model": None, "gap": GAP},
    )
    debug = click.get_current_context().ensure_object(dict).get("debug", False)
    began = time.monotonic()
    with (
        PairFile(output, settings, overwrite=overwrite, retry_failed=retry_failed) as records,
        BatchDisplay(len(entries), quiet) as display,
    ):
        job = PairJob(entries, records, scorer, gap=gap, watch=display, debug=debug)
        proposer = Proposer(captioner, recipe, segments=scorer.needs_segments, likelihoods=scorer.needs_likelihoods)
        with told_when_interrupted(output, display):
            tally = job.run(proposer)
    in_file = sum(1 for _ in read_pairs(output)) if output.exists() else 0
    say(_summary(tally, in_file, time.monotonic() - began), prefix="")
    exit_by(tally)


def _check(inputs: tuple[str, ...], scenes: str | None, scorer: str, url: str | None, model: str | None) -> None:
    """``OptionError`` for what does not go together."""
    if bool(inputs) == (scenes is not None):
        raise OptionError("give either INPUTS or --scenes, not both and not neither")
    if scorer == "scenes" and scenes is None:
        raise OptionError("--scorer scenes scores by the facts of a scene, so it goes with --scenes")
    if scorer == "judge" and not (url and model):
        raise OptionError("--scorer judge needs --judge-url and --judge-model")
    if scorer != "judge" and (url or model):
        raise OptionError("--judge-url and --judge-model go with --scorer judge")


def _entries(inputs: tuple[str, ...], scenes: str | None) -> list[Item | Entry | BadLine]:
    if scenes is not None:
        from ..align.preference import scene_items

        return [*scene_items(scenes)]
    from ..runtime.batch import read_inputs

    return [*read_inputs(inputs)]


def _scorer(name: str, url: str | None, model: str | None, workers: int, timeout: float) -> Scorer:
    from ..align.preference import Endpoint, GroundTruth, Judge, ReferenceFree

    if name == "judge":
        return Judge(Endpoint(url or "", model or "", os.environ.get(KEY), timeout=timeout), workers)
    return GroundTruth() if name == "scenes" else ReferenceFree()


def _summary(tally: PairTally, in_file: int, seconds: float) -> str:
    close = tally.captioned - tally.kept
    before = f" ({tally.already_failed} of them before)" if tally.already_failed else ""
    speed = f"{60 * tally.captioned / seconds:.1f} clips/min, " if tally.captioned and seconds > 0 else ""
    return (
        f"{tally.kept} pairs of {tally.captioned} clips, {close} too close, {tally.already} clips already done, "
        f"{tally.failures} failed{before}; {in_file} pairs in the file; {speed}{duration(seconds)} in all"
    )
