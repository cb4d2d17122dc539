"""Captioners that do not fit on this disk: compiled at their true widths, a few layers deep.

The checkpoints are hollow: their tensors are zeros that were never written. One tensor after the other goes through the
compiler, so what it takes in memory does not depend on the number of layers. What the whole bundle weighs follows from
the traced graphs of one layer and of two.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch

from ..contract.manifest import MANIFEST_FILE
from ..contract.targets import get_target
from ..export.components import component_graph, decoder_signature
from ..export.graph_writer import payload_size
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.random_checkpoint import SIZES, write_checkpoint
from ..runtime.bundle import parse_manifest
from .harness import run_process, write_result

_COMPILE = [sys.executable, "-m", "intertitle.cli", "compile"]
#: Layers of the decoder that are compiled.
_DEEP = 2


def layer_bytes(config: DecoderConfig, weights: str) -> int:
    """What one more layer adds to the data of a decoder for the CPU."""

    def traced(layers: int) -> int:
        cut = replace(config, num_layers=layers)
        with torch.device("meta"):
            decoder = Decoder(cut).eval().requires_grad_(False)
        graph = component_graph("decoder", decoder, decoder_signature(cut), get_target("cpu"), weights)
        return payload_size(graph.traced)

    return traced(2) - traced(1)


def measure(name: str, weights: str, encoders: str) -> dict[str, object]:
    """Compile one size, cut to a few layers; the figures of that and of the whole."""
    size = SIZES[name]
    layers = size.decoder.num_layers
    with tempfile.TemporaryDirectory() as scratch:
        cut = replace(size, decoder=replace(size.decoder, num_layers=_DEEP))
        checkpoint = write_checkpoint(Path(scratch) / name, cut, hollow=True)
        bundle = Path(scratch) / "bundle"
        formats = ["--weights", weights, "--encoder-weights", encoders]
        compiled = run_process([*_COMPILE, str(checkpoint), "-o", str(bundle), *formats])
        manifest = parse_manifest((bundle / MANIFEST_FILE).read_bytes(), name)
        held = {file: record.size for file, record in manifest.files.items()}
    each = layer_bytes(size.decoder, weights)
    written = sum(held.values())
    return {
        "weights": weights,
        "encoder_weights": encoders,
        "compiled_layers": _DEEP,
        "compile_seconds": round(compiled.seconds, 1),
        "compile_peak_bytes": compiled.peak_bytes,
        "written_bytes": written,
        "written_bytes_by_file": {file: size for file, size in held.items() if size > 1 << 20},
        "bytes_of_a_layer": each,
        "layers": layers,
        "bundle_bytes": written + (layers - _DEEP) * each,
    }


@click.command()
@click.option(
    "--size", "sizes", multiple=True, default=("videollama2-72b", "videollama2-8x7b"), help="Sizes; repeatable."
)
@click.option("--weights", default="int4", show_default=True, help="The decoder's weights.")
@click.option("--encoder-weights", "encoders", default="int8", show_default=True, help="The encoders' weights.")
@click.option("-o", "--result", default="large", show_default=True, help="The name of the file in results/.")
def main(sizes: tuple[str, ...], weights: str, encoders: str, result: str) -> None:
    """Measure what compiling a large captioner takes and what its bundle weighs."""
    figures = {name: measure(name, weights, encoders) for name in sizes}
    path = write_result(result, figures, "python -m intertitle.benchmarks.large")
    for name, figure in figures.items():
        click.echo(f"{name}: {figure}")
    click.echo(path)


if __name__ == "__main__":
    main()
