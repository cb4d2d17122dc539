"""Engines of the released shape, built without a GPU: ``python -m intertitle.benchmarks.engines``.

Every component of VideoLLaMA2.1-7B-AV at its released size, the decoder with one layer of each kind it has (they are
all alike: one layer, and the output head), from random weights in fp16, int4 and (encoders) int8. What it takes is the
time and the memory of the build, and the bytes of the engine; engines are built in a process each, so that the peak is
theirs. Needs 4 GB of disk for the checkpoint and 10 GB for bundles and engines.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from ..export.compile import compile_bundle
from ..models.random_checkpoint import SIZES, write_checkpoint
from .harness import run_process, write_result

_BUILD_ONE = """
import json, sys, time
from pathlib import Path
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.engines.build import build_engine
from intertitle.runtime.engines.builder import parts
from intertitle.runtime.engines.library import load_library
from intertitle.runtime.engines.shapes import default_limits, profiles
path, name, capabilities, out = sys.argv[1], sys.argv[2], sys.argv[3].split(","), Path(sys.argv[4])
bundle, library = Bundle.open(path, verify="sizes"), load_library("tensorrt-rtx")
(part,) = (part for part in parts(bundle) if part.name == name)
limits = default_limits(bundle.manifest)
started = time.perf_counter()
shapes = profiles(name, part.component, bundle.manifest, limits)
plan = build_engine(library, part.graph, shapes, max_length=limits.max_length, capabilities=capabilities)
seconds = time.perf_counter() - started
out.write_bytes(plan.engine)
print(json.dumps({"seconds": round(seconds, 2), "engine_bytes": len(plan.engine), "max_length": limits.max_length,
                  "unfused_attention": plan.unfused, "library": library.version}))
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size",
    type=click.Choice(sorted(SIZES)),
    default="7b",
    show_default=True,
    help="The shape of the random checkpoint.",
)
@click.option("--layers", default=1, show_default=True, help="Layers of the decoder.")
@click.option(
    "--compute-capability", "capabilities", default="8.6,8.9,12.0", show_default=True, help="GPUs to build for."
)
@click.option("-o", "--result", default="engines-7b-av", show_default=True, help="The name of the file in results/.")
def main(size: str, layers: int, capabilities: str, result: str) -> None:
    """Compile and build, and note what each took."""
    shape = SIZES[size]
    shape = replace(shape, decoder=replace(shape.decoder, num_layers=layers))
    figures: dict[str, object] = {"size": size, "decoder_layers": layers, "compute_capabilities": capabilities}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_checkpoint(Path(scratch) / "checkpoint", shape)
        for label, weights, encoders in (("fp16", "fp16", "fp16"), ("int4", "int4", "fp16"), ("int8", "int4", "int8")):
            compiled = compile_bundle(
                checkpoint, Path(scratch) / label, weights=weights, encoder_weights=encoders, target="tensorrt-rtx"
            )
            components = {}
            for name, component in compiled.manifest.components.items():
                if label == "int8" and component.weights != "int8":
                    continue  # as before
                engine = Path(scratch) / "engine"
                arguments = [str(compiled.path), name, capabilities, str(engine)]
                done = run_process([sys.executable, "-c", _BUILD_ONE, *arguments])
                components[name] = {
                    **json.loads(done.stdout.splitlines()[-1]),
                    "weights": component.weights,
                    "parameters": component.parameters,
                    "graph_bytes": compiled.component_bytes[name],
                    "peak_bytes": done.peak_bytes,
                }
                click.echo(f"{label} {name}: {components[name]}")
            figures[label] = components
    click.echo(write_result(result, figures, "python -m intertitle.benchmarks.engines"))


if __name__ == "__main__":
    main()
