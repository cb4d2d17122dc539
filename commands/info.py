"""``intertitle info``: what is in a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from ..console import ProgressDisplay, describe, safe_json, show
from . import options


@click.command(short_help="Show what is in a bundle.")
@click.argument("bundle", type=options.PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@options.quiet
@options.debug
def info(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Check the files of BUNDLE, then show what it holds, what it takes and what it needs.

    \b
    Example: intertitle info captioner
    """
    import msgspec

    from ..runtime.backends import where
    from ..runtime.bundle import Bundle

    with ProgressDisplay(quiet) as progress:
        opened = Bundle.open(bundle, progress=lambda done, total: progress("checking the bundle", done, total))
    if as_json:
        click.echo(safe_json(msgspec.json.format(msgspec.json.encode(opened.manifest), indent=1).decode()))
    else:
        show(*describe(opened.manifest), columns=80)
        show(*_here(where(opened)))


def _here(devices: list[tuple[str, str | None]]) -> Iterator[str]:
    if works := [name for name, reason in devices if reason is None]:
        yield f"runs here on {', '.join(works)}"
    for name, reason in devices:
        if reason is not None:
            yield f"does not run here on {name}: {reason}"
