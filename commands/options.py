"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ..console import say
from ..errors import OptionError

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


def decoding_options(command: Command) -> Command:
    """The options that say how a caption is generated. The command gets them as one ``Decoding``, ``decoding``."""

    @wraps(command)
    def with_decoding(
        *arguments: Any,
        strategy: str,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        seed: int,
        stop: tuple[str, ...],
        **others: Any,
    ) -> Any:
        from ..runtime.decoding import Decoding

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
            say("--temperature, --top-p and --top-k do nothing without --decoding sample")
        return command(*arguments, decoding=decoding, **others)

    return _with_options(
        with_decoding,
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
    )


def device_options(command: Command) -> Command:
    """Where a captioner runs: ``device`` and ``threads``."""
    return _with_options(
        command,
        click.option("--device", metavar="NAME", default="auto", show_default=True, help="Where to run: auto or cpu."),
        click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: one a core]"),
    )


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
