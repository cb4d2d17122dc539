"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import say
from ..errors import OptionError

if TYPE_CHECKING:
    from ..runtime.captioner import Captioner

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)


def _note_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show the traceback of an error."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
no_audio = click.option("--no-audio", is_flag=True, help="Do not listen to the sound.")
prompt = click.option("--prompt", metavar="TEXT", help="Instruction to the captioner.  [default: the family's own]")


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Bytes(click.ParamType):
    """A number of bytes: ``2GiB``, ``512M``, ``1000000``. Units are powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:ib|b)?", value.strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is not a number of bytes (2GiB, 512MiB)", param, ctx)
        return int(float(found[1]) * 2 ** _UNITS[found[2].upper()])


class VisualTokens(click.ParamType):
    """A ratio (``0.5`` or ``50%``) as a float, or a number of tokens as an int."""

    name = "visual tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        if isinstance(value, (int, float)):
            return value
        try:
            if value.endswith("%"):
                return float(value[:-1]) / 100
            return int(value) if value.isdecimal() else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a ratio (0.5, 50%) nor a number of tokens (256)", param, ctx)


def viewing_options(command: Command) -> Command:
    """What of a clip the captioner looks at: ``visual_tokens`` and ``duplicates``."""
    return _with_options(
        command,
        click.option(
            "--visual-tokens",
            type=VisualTokens(),
            metavar="N|RATIO",
            help="Merge the clip's visual tokens to so many, or to this share (0.5, 50%).  [default: all]",
        ),
        click.option(
            "--drop-duplicates",
            "duplicates",
            type=click.FloatRange(min=0),
            metavar="LEVELS",
            help="Drop frames that differ from the last kept one by no more grey levels, e.g. 2.  [default: none]",
        ),
    )


def decoding_options(command: Command) -> Command:
    """The options that say how a caption is generated. The command gets them as one ``Decoding``, ``decoding``."""

    @wraps(command)
    def with_decoding(*arguments: Any, strategy: str, **others: Any) -> Any:
        from ..runtime.decoding import Decoding

        given = {name: others.pop(name) for name in _DECODING if name in others}
        if strategy == "contrastive":
            strategy, given["contrast"] = "greedy", given["contrast"] or "temporal"
        decoding = Decoding(strategy=strategy, **given)  # type: ignore[arg-type]
        sampling = any(given[name] is not None for name in ("temperature", "top_p", "top_k")) or given["min_p"]
        if strategy != "sample" and sampling:
            say("--temperature, --top-p, --top-k and --min-p do nothing without --decoding sample")
        return command(*arguments, decoding=decoding, **others)

    made = [click.option(f"--{name.replace('_', '-')}", name, **how) for name, how in _DECODING.items()]
    strategy = click.option(
        "--decoding",
        "strategy",
        type=click.Choice(["greedy", "sample", "beam", "contrastive"]),
        default="greedy",
        show_default=True,
        help="How tokens are chosen; contrastive is greedy with --contrast temporal.",
    )
    return _with_options(with_decoding, strategy, *made)


#: The fields of ``Decoding`` as options.
_DECODING: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"type": int, "help": "Longest caption, in tokens.  [default: the checkpoint's]"},
    "temperature": {"type": float, "help": "Sampling: temperature.  [default: the checkpoint's]"},
    "top_p": {"type": float, "help": "Sampling: probability mass kept.  [default: the checkpoint's]"},
    "top_k": {"type": int, "help": "Sampling: tokens kept, 0 for all.  [default: the checkpoint's]"},
    "min_p": {
        "type": float,
        "default": 0.0,
        "help": "Sampling: least share of the likeliest token's probability.  [default: off]",
    },
    "seed": {"type": int, "default": 0, "show_default": True, "help": "Seed of sampling and noise."},
    "num_beams": {"type": int, "help": "Beam search: beams.  [default: 4]"},
    "length_penalty": {
        "type": float,
        "default": 1.0,
        "show_default": True,
        "help": "Beam search: length's power.",
    },
    "repetition_penalty": {"type": float, "help": "Above 1: against repetition.  [default: the checkpoint's]"},
    "no_repeat_ngram": {"type": int, "default": 0, "help": "No N tokens in a row twice.  [default: off]"},
    "stop": {"metavar": "TEXT", "multiple": True, "help": "Text that ends a caption; repeatable.  [default: none]"},
    "prefix": {"metavar": "TEXT", "default": "", "help": "Text that the caption begins with.  [default: none]"},
    "contrast": {
        "type": click.Choice(["temporal", "noise"]),
        "help": "Subtract what is said without the evidence: of every third frame, or of noised ones.  [default: none]",
    },
    "contrast_alpha": {"type": float, "help": "Weight of the contrast.  [default: temporal 0.5, noise 1]"},
    "contrast_beta": {"type": float, "help": "Least share of the likeliest token's probability.  [default: noise 0.1]"},
    "noise_step": {"type": int, "default": 500, "show_default": True, "help": "Noise contrast: step of 1000."},
    "retrospective": {"is_flag": True, "help": "Caption again with the first caption in the prompt."},
    "confidence": {
        "type": float,
        "metavar": "LOGPROB",
        "help": "Contrast, second pass only for captions whose mean log-likelihood is below this.  [default: all]",
    },
}


def resume_options(command: Command) -> Command:
    """What happens to an output that is there already: ``retry_failed`` and ``overwrite``, which exclude each other."""

    @wraps(command)
    def checked(*arguments: Any, retry_failed: bool, overwrite: bool, **others: Any) -> Any:
        if retry_failed and overwrite:
            raise OptionError("--retry-failed and --overwrite exclude each other")
        return command(*arguments, retry_failed=retry_failed, overwrite=overwrite, **others)

    return _with_options(
        checked,
        click.option("--retry-failed", is_flag=True, help="Try again what failed in an earlier run."),
        click.option("--overwrite", is_flag=True, help="Begin afresh where the output is there already."),
    )


def device_options(command: Command) -> Command:
    """Where a captioner runs: ``device`` and ``threads``."""
    return _with_options(
        command,
        click.option(
            "--device",
            metavar="NAME",
            default="auto",
            show_default=True,
            help="Where to run: auto (the best that works), cpu, cuda, tensorrt-rtx or tensorrt.",
        ),
        click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: one a core]"),
    )


def say_device(captioner: Captioner) -> None:
    """Where a captioner runs, if it is not on the best device that its bundle is for, and why."""
    for note in captioner.device_notes:
        say(f"running on {captioner.device}, not on {note}")


def need_compile_extra() -> Callable[..., Any]:
    """``compile_bundle``; importing it needs torch and onnx, which the runtime does without."""
    try:
        from ..export.compile import compile_bundle
    except ModuleNotFoundError as error:
        raise OptionError(
            f"this command needs '{error.name}', which is not installed: pip install 'intertitle[compile]'"
        ) from None
    return compile_bundle


def _with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
