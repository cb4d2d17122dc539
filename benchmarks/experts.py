"""Seconds per token of a decoder with experts against a dense one with as many active parameters, as ratios in one run.

sparse  a layer of eight SwiGLUs of which each token passes two (VideoLLaMA2-8x7B, Mixtral)
dense   the same decoder with one SwiGLU of twice the width: a token passes as many weights

The widths have Mixtral's proportions; weights and tokens are random, so that the choice of experts changes from token
to token. ``read``: the same sparse decoder with all eight experts chosen, that is what a graph would cost that computes
every expert.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from ..contract.targets import get_target
from ..export.components import component_graph, decoder_signature
from ..export.dialects.fused import read_fused
from ..export.graph_writer import WeightReader, serialize, write_weights
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..runtime.ort import OrtDecoder
from .harness import alternate, paired_ratio, write_result

EXPERTS, CHOSEN = 8, 2


def sparse_config(hidden: int, layers: int) -> DecoderConfig:
    """Mixtral-8x7B (4096 wide, experts of 14336, 32 heads, 8 for keys and values) scaled to another width and depth."""
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_layers=layers,
        num_heads=hidden // 128,
        num_kv_heads=max(1, hidden // 512),
        head_dim=128,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        context_length=4096,
        num_experts=EXPERTS,
        experts_per_token=CHOSEN,
    )


def write_decoder(config: DecoderConfig, weights: str, folder: Path) -> OrtDecoder:
    """A decoder of random weights for the CPU, opened."""
    folder.mkdir()
    with torch.device("meta"):
        decoder = Decoder(config).eval().requires_grad_(False)
    shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    target = get_target("cpu")
    compiled = component_graph("decoder", decoder, decoder_signature(config), target, weights)
    graph = compiled.traced
    generator = torch.Generator().manual_seed(0)

    def tensor(entry: str) -> torch.Tensor:
        shape = shapes[entry]
        drawn = torch.randn(shape, generator=generator)
        return 1 + 0.1 * drawn if len(shape) == 1 else drawn / shape[1] ** 0.5

    reader = WeightReader(read_fused(tensor), compiled.stored)
    with (folder / "decoder.data").open("wb") as file:
        for _ in write_weights(graph, file, "decoder.data", reader):
            pass
    (folder / "decoder.onnx").write_bytes(serialize(graph))
    table = np.random.default_rng(0).standard_normal((1024, config.hidden_size)).astype(np.float32)
    return OrtDecoder(folder / "decoder.onnx", config.shape, lambda ids: table[ids % len(table)])


def seconds_per_token(decoder: OrtDecoder, prompt: int, tokens: int) -> float:
    """Steps of one row after a prompt of random tokens."""
    rng = np.random.default_rng(1)
    inference = decoder.open(1, prompt + tokens + 1)
    inference.prefill(0, decoder.embed(rng.integers(0, 1024, prompt)))
    inference.step(np.array([0]))
    ids = rng.integers(0, 1024, (tokens, 1))
    started = time.perf_counter()
    for token in ids:
        inference.step(token)
    return (time.perf_counter() - started) / tokens


def seconds_per_prompt(decoder: OrtDecoder, prompt: int) -> float:
    """The prefill of a prompt of random tokens."""
    embeds = decoder.embed(np.random.default_rng(2).integers(0, 1024, prompt))
    inference = decoder.open(1, prompt)
    started = time.perf_counter()
    inference.prefill(0, embeds)
    return time.perf_counter() - started


def measure(hidden: int, layers: int, weights: str, prompt: int, tokens: int, rounds: int) -> dict[str, object]:
    """The ratios for one format of weights."""
    sparse = sparse_config(hidden, layers)
    dense = replace(sparse, intermediate_size=CHOSEN * sparse.intermediate_size, num_experts=0, experts_per_token=0)
    everything = replace(sparse, experts_per_token=EXPERTS)
    with tempfile.TemporaryDirectory() as scratch:
        decoders = {
            name: write_decoder(config, weights, Path(scratch) / name)
            for name, config in (("sparse", sparse), ("dense", dense), ("all_experts", everything))
        }
        steps = alternate(
            {name: lambda each=each: seconds_per_token(each, 64, tokens) for name, each in decoders.items()}, rounds
        )
        two = {name: decoders[name] for name in ("sparse", "dense")}
        prompts = alternate({name: lambda each=each: seconds_per_prompt(each, prompt) for name, each in two.items()}, 3)
        bytes_ = {name: (Path(scratch) / name / "decoder.data").stat().st_size for name in decoders}
    return {
        "shape": f"{layers} layers, {hidden} wide, {EXPERTS} experts of {sparse.intermediate_size}, {CHOSEN} chosen",
        "weights": weights,
        "bytes": bytes_,
        "milliseconds_per_token": {name: round(1e3 * statistics.median(values), 3) for name, values in steps.items()},
        "sparse_over_dense": paired_ratio(steps["sparse"], steps["dense"]),
        "all_experts_over_dense": paired_ratio(steps["all_experts"], steps["dense"]),
        "prompt_tokens": prompt,
        "prompt_sparse_over_dense": paired_ratio(prompts["sparse"], prompts["dense"]),
        "seconds_per_token": steps,
    }


@click.command()
@click.option("--hidden", default=2048, show_default=True, help="Width of the int4 decoders; fp32 has half of it.")
@click.option("--layers", default=6, show_default=True, help="Layers.")
@click.option("--prompt", default=256, show_default=True, help="Tokens of the prompt whose prefill is timed.")
@click.option("--tokens", default=48, show_default=True, help="Steps of each measurement.")
@click.option("--rounds", default=9, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="experts", show_default=True, help="The name of the file in results/.")
def main(hidden: int, layers: int, prompt: int, tokens: int, rounds: int, result: str) -> None:
    """Measure a decode step and a prompt of a sparse decoder against a dense one."""
    figures = {
        "tokens": tokens,
        "rounds": rounds,
        "int4": measure(hidden, layers, "int4", prompt, tokens, rounds),
        "fp32": measure(hidden // 2, layers, "fp32", prompt, tokens, rounds),
    }
    path = write_result(result, figures, "python -m intertitle.benchmarks.experts")
    for weights in ("int4", "fp32"):
        figure = figures[weights]
        assert isinstance(figure, dict)
        for name in ("milliseconds_per_token", "sparse_over_dense", "all_experts_over_dense"):
            click.echo(f"{weights} {name}: {figure[name]}")
    click.echo(path)


if __name__ == "__main__":
    main()
