"""Arguments and options that several commands share, and how a help text groups them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import say
from ..errors import OptionError
from . import offers

if TYPE_CHECKING:
    from ..runtime.captioner import Captioner
    from ..runtime.reading import Readers
    from ..runtime.viewing import Share, TokenBudget

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)

#: The sections of a help text and the options (by parameter name) that stand in each, in this order. An option that is
#: in none of them stands in the last section.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "Clip options": (
        "scenes",
        "prompt",
        "prompts",
        "audio",
        "start",
        "end",
        "segments",
        "segment_prompt",
        "item_timeout",
        "visual_tokens",
        "duplicates",
    ),
    "Decoding options": (
        "strategy",
        "max_new_tokens",
        "candidates",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "num_beams",
        "length_penalty",
        "repetition_penalty",
        "no_repeat_ngram",
        "stop",
        "prefix",
        "contrast",
        "contrast_alpha",
        "contrast_beta",
        "noise_step",
        "retrospective",
        "confidence",
        "deadline",
    ),
    "Scoring options": ("scorer_name", "judge_url", "judge_model", "judge_workers", "judge_timeout", "gap"),
    "Output options": (
        "output",
        "stream",
        "as_json",
        "srt",
        "vtt",
        "subtitles_dir",
        "retry_failed",
        "overwrite",
    ),
    "Device options": ("device", "threads", "staged", "rows", "memory"),
}


def sections(command: click.Command) -> dict[str, list[click.Option]]:
    """The options of a command by the section of its help text; a command that is not ``Grouped`` has one."""
    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    if not isinstance(command, Grouped):
        return {"Options": list(options.values())} if options else {}
    found = {title: [options.pop(name) for name in names if name in options] for title, names in _SECTIONS.items()}
    found["Other options"] = list(options.values())
    return {title: options for title, options in found.items() if options}


#: Options by the names that they had, before each had one name from here to the records.
_OLD_NAMES = {
    "decoding": "strategy",
    "drop-duplicates": "duplicates",
    "n-best": "candidates",
    "no-refine": "no-retrospective",
    "refine": "retrospective",
}


class Grouped(click.Command):
    """A command with many options, whose help text shows them in sections. It takes their old names too."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        settings = {"token_normalize_func": lambda name: _OLD_NAMES.get(name, name)}
        super().__init__(*arguments, **{"context_settings": settings, **others})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = sections(self)
        if (help_option := self.get_help_option(ctx)) is not None:
            found.setdefault("Other options", []).append(help_option)
        for title, options in found.items():
            records = (option.get_help_record(ctx) for option in options)
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


def _note_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show an error with its traceback."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
audio = click.option("--audio/--no-audio", default=True, help="Listen to the sound or ignore it.  [default: --audio]")


def _only_one(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
    if len(values) > 1:
        raise click.BadParameter("give it once; a manifest can hold an instruction for each file", context, parameter)
    return values[0] if values else None


prompt = click.option(
    "--prompt",
    metavar="TEXT",
    multiple=True,
    callback=_only_one,
    help="The instruction to the model.  [default: the bundle's own]",
)


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
    """A budget of visual tokens: ``50%`` is a share, ``256`` a number of tokens."""

    name = "visual tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TokenBudget:
        from ..runtime.viewing import parse_budget

        if not isinstance(value, str):
            return value
        try:
            return parse_budget(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)


class VisualShare(VisualTokens):
    """A share of visual tokens only."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Share:
        from ..runtime.viewing import Share

        budget = super().convert(value, param, ctx)
        if not isinstance(budget, Share):
            self.fail(f"'{budget}' is a number of tokens, and a bundle holds shares: give one such as 50%", param, ctx)
        return budget


def viewing_options(*, span: bool = False) -> Callable[[Command], Command]:
    """How a clip is viewed; ``span``: also ``--start`` and ``--end``. The command gets a ``Viewing``, ``viewing``."""
    made = {name: option for name, option in _VIEWING.items() if span or name not in ("start", "end")}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_viewing(*arguments: Any, **others: Any) -> Any:
            from ..runtime.viewing import Viewing

            viewing = Viewing(**{name: others.pop(name) for name in made})
            return command(*arguments, viewing=viewing, **others)

        return _with_options(with_viewing, *made.values())

    return decorate


#: The fields of ``Viewing`` as options.
_VIEWING: dict[str, Callable[[Command], Command]] = {
    "audio": audio,
    "start": click.option("--start", type=float, metavar="SECONDS", help="Start here.  [default: the beginning]"),
    "end": click.option("--end", type=float, metavar="SECONDS", help="Stop here.  [default: the end]"),
    "visual_tokens": click.option(
        "--visual-tokens",
        type=VisualTokens(),
        metavar="N|SHARE",
        help="Keep this many visual tokens (256) or this share of them (50%); similar ones are merged.  [default: the "
        "bundle's]",
    ),
    "duplicates": click.option(
        "--duplicates",
        type=click.FloatRange(min=0),
        metavar="LEVELS",
        help="Skip a frame that differs from the last kept one by at most this many grey levels (0 to 255).  "
        "[default: keep all]",
    ),
}

item_timeout = click.option(
    "--item-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on a file that takes longer to read.",
)


def decoding_options(command: Command) -> Command:
    """The options that say how a caption is generated. The command gets them as one ``Decoding``, ``decoding``."""

    @wraps(command)
    def with_decoding(*arguments: Any, strategy: str, **others: Any) -> Any:
        from ..runtime.decoding import Decoding

        given = {name: others.pop(name) for name in _DECODING if name in others}
        if strategy == "contrastive":
            strategy, given["contrast"] = "greedy", given["contrast"] or "temporal"
        context = click.get_current_context()
        for name, needed in _NEEDED.items():
            source = context.get_parameter_source(name)
            if strategy != needed and source is click.core.ParameterSource.COMMANDLINE:
                raise OptionError(f"--{name.replace('_', '-')} does nothing without --strategy {needed}")
        decoding = Decoding(strategy=strategy, **given)  # type: ignore[arg-type]
        return command(*arguments, decoding=decoding, **others)

    made = [click.option(f"--{name.replace('_', '-')}", name, **how) for name, how in _DECODING.items()]
    strategy = click.option(
        "--strategy",
        type=click.Choice(["greedy", "sample", "beam", "contrastive"]),
        default="greedy",
        show_default=True,
        help="How the next token is chosen. contrastive means greedy with --contrast temporal.",
    )
    return _with_options(with_decoding, strategy, *made)


#: The strategy that an option is of.
_NEEDED = {
    "temperature": "sample",
    "top_p": "sample",
    "top_k": "sample",
    "min_p": "sample",
    "num_beams": "beam",
    "length_penalty": "beam",
}

#: The fields of ``Decoding`` as options.
_DECODING: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"type": int, "help": "Stop after this many tokens.  [default: the bundle's]"},
    "temperature": {"type": float, "help": "Sampling: divide the logits by this.  [default: the bundle's]"},
    "top_p": {
        "type": float,
        "help": "Sampling: keep the likeliest tokens that together have this probability.  [default: the bundle's]",
    },
    "top_k": {
        "type": int,
        "help": "Sampling: keep this many of the likeliest tokens; 0 keeps all.  [default: the bundle's]",
    },
    "min_p": {
        "type": float,
        "default": 0.0,
        "help": "Sampling: drop tokens less than this times as likely as the likeliest token.  [default: off]",
    },
    "seed": {
        "type": int,
        "default": 0,
        "show_default": True,
        "help": "The seed of sampling and noise.",
    },
    "num_beams": {"type": int, "help": "Beam search: the number of beams.  [default: 4]"},
    "length_penalty": {
        "type": float,
        "default": 1.0,
        "show_default": True,
        "help": "Beam search: divide a beam's log-likelihood by its length to this power.",
    },
    "repetition_penalty": {
        "type": float,
        "help": "Above 1, tokens that were generated become less likely.  [default: the bundle's]",
    },
    "no_repeat_ngram": {
        "type": int,
        "default": 0,
        "help": "Never generate the same sequence of this many tokens twice.  [default: off]",
    },
    "stop": {"metavar": "TEXT", "multiple": True, "help": "Stop at this text; repeatable.  [default: none]"},
    "prefix": {"metavar": "TEXT", "default": "", "help": "Begin the caption with this text.  [default: none]"},
    "contrast": {
        "type": click.Choice(["temporal", "noise"]),
        "help": "Contrastive decoding: subtract the logits of a second view of the clip. temporal: every third frame "
        "(SynPO). noise: frames with noise (VCD).  [default: none]",
    },
    "contrast_alpha": {
        "type": float,
        "help": "Contrast: its weight; 0 is no contrast.  [default: 0.5 for temporal, 1 for noise]",
    },
    "contrast_beta": {
        "type": float,
        "help": "Contrast: drop tokens less than this times as likely as the likeliest token of the whole clip.  "
        "[default: off for temporal, 0.1 for noise]",
    },
    "noise_step": {
        "type": int,
        "default": 500,
        "show_default": True,
        "help": "Noise contrast: how much noise the frames get, from 0 (almost none) to 999 (only noise).",
    },
    "retrospective": {
        "is_flag": True,
        "help": "Caption twice: the second prompt holds the first caption and asks for corrections (SynPO).",
    },
    "confidence": {
        "type": float,
        "metavar": "LOGPROB",
        "help": "Use the contrast and the second pass only if the plain caption's mean token log-likelihood is below "
        "this, for example -1.5.  [default: always]",
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
        click.option("--retry-failed", is_flag=True, help="Try the items again that failed in an earlier run."),
        click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
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
            help=f"Where to run: {offers.devices()}; auto takes the best that works.",
        ),
        click.option(
            "--threads", type=click.IntRange(1, 1024), help="The number of CPU threads.  [default: one per core]"
        ),
    )


def start_readers(count: int, time_limit: float | None = None) -> Readers | None:
    """Processes that read media. They start while the bundle is loaded, and end with the command."""
    from ..runtime.reading import TIME_LIMIT, start_readers

    readers = start_readers(count, TIME_LIMIT if time_limit is None else time_limit)
    if readers is not None:
        click.get_current_context().call_on_close(readers.close)
    return readers


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
