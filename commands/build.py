"""``intertitle build``: a bundle's engines, on the device that runs them or ahead of time."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import ProgressDisplay, show, table
from . import offers, options


@click.command(short_help="Build a bundle's TensorRT engines.")
@click.argument("bundle", type=options.PATH)
@click.option(
    "--target",
    type=click.Choice(offers.engine_targets()),
    help="TensorRT for RTX (desktop GPUs) or TensorRT (Jetson, data centre).  [default: the bundle's]",
)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="LIST",
    default="current",
    show_default=True,
    help="The GPUs to build for. current: the GPU of this machine. TensorRT for RTX also builds for others: 86,89,120.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="The most tokens of one prompt and its caption together, rounded up to a multiple of 64. The cache of keys "
    "and values grows with it.  [default: the longest prompt of the bundle and its longest caption]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="The most captions generated together. A caption with a contrast takes two, a beam search one per beam.  "
    "[default: 8]",
)
@click.option(
    "--memory",
    type=options.Bytes(),
    metavar="SIZE",
    help="The most GPU memory that one layer may use for temporary data, for example 2GiB. Less memory rules out some "
    "fast kernels.  [default: no limit]",
)
@options.quiet
@options.debug
def build(
    bundle: Path,
    target: str | None,
    capabilities: str,
    max_length: int | None,
    rows: int | None,
    memory: int | None,
    quiet: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE into this user's engine cache.

    BUNDLE was compiled for one of the targets that --target names. An engine that is up to date stays; a rebuild
    prints its reason.

    \b
    Example: intertitle build captioner --compute-capability 86,89,120
    """
    from ..runtime.bundle import Bundle
    from ..runtime.engines.builder import build_bundle, parts
    from ..runtime.engines.library import built_for, load_library
    from ..runtime.engines.shapes import default_limits

    with ProgressDisplay(quiet) as progress:
        opened = Bundle.open(bundle, progress=lambda done, total: progress("checking the bundle", done, total))
        parts(opened)
        library = load_library(target or opened.manifest.target)
        limits = default_limits(opened.manifest, max_length, rows)
        wanted, current = built_for(capabilities, library)
        built = list(build_bundle(opened, library, wanted, limits, current=current, memory=memory, progress=progress))
    engines = table("engine", ">MB", ">seconds", "")
    for each in built:
        why = "is there" if each.reason is None else f"built: {each.reason}"
        if each.unfused:
            why += "; attention has no kernel of its own and is slow"
        engines.add_row(each.name, f"{each.size / 1e6:,.1f}", f"{each.seconds:.1f}", why)
    show(
        f"{library.target} {library.version}, compute capability {', '.join(wanted)}, rows of {limits.max_length} "
        f"tokens, {limits.rows} at once:",
        engines,
        f"in {built[0].path.parent}",
    )
