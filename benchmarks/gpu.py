"""Everything that wants a GPU, in one run and one JSON file: ``python -m intertitle.benchmarks.gpu``.

    python -m intertitle.benchmarks.gpu                                # an NVIDIA GPU with TensorRT for RTX
    python -m intertitle.benchmarks.gpu --device tensorrt              # ... with TensorRT (data centre, Jetson)
    python -m intertitle.benchmarks.gpu --device cpu --size tiny       # dry run, no GPU

Parity of the sessions with PyTorch for fixtures and the shipped captioner; then at a released shape with random
weights, for each weight format: seconds by stage, time to first token, tokens a second greedy, in contrast and for
batches, memory, beside PyTorch (transformers' decoder of the same shape, eager and compiled) and beside the floor that
the weights' bytes over the measured bandwidth set. A part that fails is noted with its reason and the others go on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..commands import SHIPPED
from ..export.compile import compile_bundle
from ..models import open_checkpoint
from ..models.random_checkpoint import SIZES, write_checkpoint
from ..runtime.captioner import Captioner
from ..runtime.decoding import Decoding, Settings, TokenSearch, generate
from .gpu_device import CpuPlace, GpuPlace, Place
from .harness import write_result
from .parity import parity
from .peers.torch_decoder import torch_decoder_seconds

DEVICES = ("tensorrt-rtx", "tensorrt", "cpu")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--device", type=click.Choice(["tensorrt-rtx", "tensorrt", "cpu"]), default="tensorrt-rtx", show_default=True
)
@click.option("--size", type=click.Choice(sorted(SIZES)), default="7b", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Use (or write and keep) the checkpoint there.")
@click.option("--fixtures", type=click.Path(path_type=Path), help="Folder of fixture checkpoints.  [default: none]")
@click.option("--rows", multiple=True, type=int, default=(1, 2, 4, 8, 16, 32), show_default=True)
@click.option("--tokens", default=128, show_default=True, help="New tokens of a measurement.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--peers/--no-peers", default=True, show_default=True, help="PyTorch beside it.")
@click.option("-o", "--result", default="gpu", show_default=True, help="Name under results/.")
def main(
    device: str,
    size: str,
    checkpoint: Path | None,
    fixtures: Path | None,
    rows: tuple[int, ...],
    tokens: int,
    rounds: int,
    peers: bool,
    result: str,
) -> None:
    """Measure, and write what was measured after every part."""
    figures: dict[str, Any] = {"size": size, "tokens": tokens}
    command = f"python -m intertitle.benchmarks.gpu --device {device} --size {size}"

    def part(name: str, measure: Callable[[], Any]) -> None:
        click.echo(f"{name} …", err=True)
        started = time.perf_counter()
        try:
            figures[name] = measure()
        except Exception as error:  # one part that fails must not cost the others
            figures[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        click.echo(f"{name}: {figures[name]} ({time.perf_counter() - started:.0f} s)", err=True)
        write_result(result, figures, command)

    place: Place = CpuPlace() if device == "cpu" else GpuPlace(device)
    figures["place"] = place.describe()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checks = {"shipped": (SHIPPED / "base", SHIPPED / "synpo")}
        if fixtures is not None:
            checks |= {name: (fixtures / name, None) for name in ("av-qwen2", "clip-mistral", "auroracap")}
        for name, (base, adapter) in checks.items():
            for weights in place.weights:
                part(
                    f"parity {name} {weights}",
                    lambda base=base, adapter=adapter, weights=weights, name=name: parity(
                        place, base, adapter, weights, scratch / f"{name}-{weights}"
                    ),
                )
        source = checkpoint or scratch / "checkpoint"
        if not source.exists():
            click.echo("writing random weights …", err=True)
            write_checkpoint(source, size)
        part("bandwidth_bytes_per_second", place.bandwidth)
        for weights in place.weights:
            measure = _Captioning(place, source, weights, scratch / weights, max(rows), tokens, rounds, figures)
            part(f"{weights} build", measure.build)
            part(f"{weights} stages", measure.stages)
            part(f"{weights} decode", lambda measure=measure: measure.decode(rows))
            measure.close()
        if peers:
            config = open_checkpoint(source).config.decoder
            for compiled in (False, True):
                part(
                    f"pytorch {'compiled' if compiled else 'eager'}",
                    lambda compiled=compiled: torch_decoder_seconds(
                        config, place.torch_device, compiled, rows, prompt=256, tokens=tokens, rounds=rounds
                    ),
                )
    click.echo(write_result(result, figures, command))


class _Captioning:
    """One bundle of the large captioner, measured."""

    def __init__(
        self,
        place: Place,
        checkpoint: Path,
        weights: str,
        bundle: Path,
        rows: int,
        tokens: int,
        rounds: int,
        figures: dict[str, Any],
    ) -> None:
        self._place, self._checkpoint, self._weights, self._bundle = place, checkpoint, weights, bundle
        self._rows, self._tokens, self._rounds, self._figures = rows, tokens, rounds, figures
        self._captioner: Captioner | None = None

    def build(self) -> dict[str, Any]:
        started = time.perf_counter()
        compiled = compile_bundle(self._checkpoint, self._bundle, weights=self._weights, target=self._place.target)
        compile_seconds = time.perf_counter() - started
        engines = self._place.build(self._bundle, self._rows)
        self._captioner = self._place.open(self._bundle)
        return {
            "compile_seconds": round(compile_seconds, 1),
            "bundle_bytes": compiled.component_bytes,
            "engines": engines,
        }

    def stages(self) -> dict[str, Any]:
        """Median seconds of each stage of a clip of frames with sound."""
        captioner, rng = self._loaded(), np.random.default_rng(0)
        spec = captioner.manifest.preprocessing
        frames = rng.integers(0, 256, (spec.num_frames, 360, 640, 3), dtype=np.uint8)
        sound = rng.integers(-3000, 3000, 16000 * 5, dtype=np.int16)
        heard: dict[str, Any] = {"waveform": sound, "sample_rate": 16000} if spec.audio else {}
        how = Decoding(max_new_tokens=self._tokens)
        seen = [captioner.caption(frames=frames, decoding=how, **heard) for _ in range(self._rounds + 1)][1:]
        medians = {name: statistics.median(each.timings[name] for each in seen) for name in seen[0].timings}
        first = sum(seconds for name, seconds in medians.items() if name not in ("decode", "load"))
        return {
            "prompt_tokens": seen[0].prompt_tokens,
            "new_tokens": len(seen[0].token_ids),
            "seconds": {name: round(value, 5) for name, value in medians.items()},
            "time_to_first_token": round(first, 5),
            "memory_bytes": self._place.memory_used(),
        }

    def decode(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """Seconds of a step by rows, after prompts of 256 tokens; contrast is two rows, one a third as long."""
        captioner, prompt = self._loaded(), 256
        spec, rng = captioner.manifest.decoder, np.random.default_rng(0)
        embeds = rng.standard_normal((prompt, spec.hidden_size)).astype(np.float32) * 0.02
        files, name = captioner.manifest.files, captioner.manifest.components["decoder"]
        weight_bytes = sum(files[file].size for file in (name.graph, name.data) if file)
        seconds: dict[str, float] = {}
        for count in rows:
            inference = captioner.open_inference(prompt + self._tokens + 1, count)
            for row in range(count):
                inference.prefill(row, embeds)
            seconds[str(count)] = self._step_seconds(inference, np.zeros(count, np.int64))
            del inference
        pair = captioner.open_inference(prompt + self._tokens + 1, 2)
        pair.prefill(0, embeds)
        pair.prefill(1, embeds[: prompt // 3])
        contrast = self._contrast_seconds(pair)
        floor = weight_bytes / self._figures["bandwidth_bytes_per_second"]
        return {
            "weight_bytes": weight_bytes,
            "floor_seconds": floor,
            "step_seconds": seconds,
            "tokens_per_second": {count: round(int(count) / value, 2) for count, value in seconds.items()},
            "of_floor": round(floor / seconds["1"], 3),
            "contrast_over_greedy": round(contrast / self._greedy_seconds(captioner, embeds), 3),
            "memory_bytes": self._place.memory_used(),
        }

    def _step_seconds(self, inference: Any, ids: np.ndarray) -> float:
        for _ in range(3):
            inference.step(ids)
        taken = []
        for _ in range(self._tokens - 3):
            started = time.perf_counter()
            inference.step(ids)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def _greedy_seconds(self, captioner: Captioner, embeds: np.ndarray) -> float:
        inference = captioner.open_inference(len(embeds) + self._tokens + 1, 1)
        return self._search_seconds(inference, [inference.prefill(0, embeds)[0].copy()], None)

    def _contrast_seconds(self, inference: Any) -> float:
        embeds = np.zeros((1, self._loaded().manifest.decoder.hidden_size), np.float32)
        logits = [inference.prefill(row, embeds)[0].copy() for row in range(2)]
        return self._search_seconds(inference, logits, (0.5, None))

    def _search_seconds(
        self, inference: Any, logits: list[np.ndarray], contrast: tuple[float, float | None] | None
    ) -> float:
        """Seconds a token of the strategy's own loop, choosing included."""
        count = self._tokens - 2
        settings = Settings(max_new_tokens=count + 1, eos_token_ids=(), contrast=contrast)
        tokens = generate(inference, np.stack(logits), TokenSearch(settings))
        next(tokens)
        started = time.perf_counter()
        for _ in tokens:
            pass
        return (time.perf_counter() - started) / count

    def _loaded(self) -> Captioner:
        if self._captioner is None:
            raise RuntimeError("was not built")
        return self._captioner

    def close(self) -> None:
        """Free what it holds on the device."""
        self._captioner = None


if __name__ == "__main__":
    main()
