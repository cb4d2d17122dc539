"""Everything that wants a GPU, in one run and one JSON file: ``python -m intertitle.benchmarks.gpu``.

    python -m intertitle.benchmarks.gpu                                # an NVIDIA GPU with TensorRT for RTX
    python -m intertitle.benchmarks.gpu --device tensorrt              # ... with TensorRT (data centre, Jetson)
    python -m intertitle.benchmarks.gpu --device cuda                  # ... with ONNX Runtime's CUDA provider
    python -m intertitle.benchmarks.gpu --device cpu --size tiny       # dry run, no GPU

Parity of the sessions with PyTorch for fixtures and the shipped captioner; then at a released shape with random
weights, for each weight format: seconds by stage, time to first token, tokens a second greedy, in contrast and for
batches, with candidates from the device and without, memory, beside PyTorch (transformers' decoder of the same shape,
eager and compiled) and beside the floor that the weights' bytes over the measured bandwidth set. A part that fails is
noted with its reason and the others go on.

Compiling takes its time on the processor. ``--bundles`` has bundles that were compiled elsewhere, whole or hollow
(``benchmarks.hollow``), named by what they are of and their weights (``shipped-int4``, ``av-qwen2-fp16``, ``7b-int4``);
what is not among them is compiled.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import numpy.typing as npt

from ..commands import SHIPPED_ADAPTER, SHIPPED_BASE
from ..contract.devices import DEVICES
from ..export.compile import compile_bundle
from ..models import open_checkpoint
from ..models.random_checkpoint import SIZES, write_checkpoint
from ..runtime.caption import Caption
from ..runtime.captioner import Captioner
from ..runtime.decoding import Decoding, Settings, TokenSearch
from ..runtime.decoding.search import Turn, step
from ..runtime.inference import Choice, FloatArray, FullLogits, Inference
from .gpu_device import Place, open_place
from .harness import write_result
from .hollow import HOLLOW_FILE, fill
from .kernels import kernels_of
from .parity import parity
from .peers.torch_decoder import torch_decoder_seconds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    default="tensorrt-rtx",
    show_default=True,
    help="The device to measure.",
)
@click.option(
    "--size",
    type=click.Choice(sorted(SIZES)),
    default="7b",
    show_default=True,
    help="The shape of the random checkpoint.",
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint; it is made there if it is missing."
)
@click.option("--fixtures", type=click.Path(path_type=Path), help="Folder of fixture checkpoints.  [default: none]")
@click.option(
    "--bundles", type=click.Path(path_type=Path, exists=True), help="A folder of bundles that were compiled before."
)
@click.option(
    "--rows",
    multiple=True,
    type=int,
    default=(1, 2, 4, 8, 16, 32),
    show_default=True,
    help="Captions generated together; repeatable.",
)
@click.option("--tokens", default=128, show_default=True, help="New tokens of a measurement.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each measurement.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Also measure PyTorch.")
@click.option(
    "--compiled-rows",
    multiple=True,
    type=int,
    default=(1, 8),
    show_default=True,
    help="Rows at which torch.compile is measured.",
)
@click.option("-o", "--result", default="gpu", show_default=True, help="The name of the file in results/.")
def main(
    device: str,
    size: str,
    checkpoint: Path | None,
    fixtures: Path | None,
    bundles: Path | None,
    rows: tuple[int, ...],
    tokens: int,
    rounds: int,
    peers: bool,
    compiled_rows: tuple[int, ...],
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
            traceback.print_exc()
            figures[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        click.echo(f"{name}: {figures[name]} ({time.perf_counter() - started:.0f} s)", err=True)
        write_result(result, figures, command)

    place = open_place(device)
    figures["place"] = place.describe()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checks = {"shipped": (SHIPPED_BASE, SHIPPED_ADAPTER)}
        if fixtures is not None:
            checks |= {name: (fixtures / name, None) for name in ("av-qwen2", "clip-mistral", "auroracap")}
        made = _Bundles(place, bundles, scratch)
        for name, (base, adapter) in checks.items():
            for weights in place.weights:
                part(
                    f"parity {name} {weights}",
                    lambda base=base, adapter=adapter, weights=weights, name=name: parity(
                        place, base, adapter, made.get(name, weights, base, adapter)
                    ),
                )
        source = checkpoint or scratch / "checkpoint"
        if not source.exists() and not made.given(size, place.weights):
            click.echo("writing random weights …", err=True)
            write_checkpoint(source, size)
        part("bandwidth_bytes_per_second", place.bandwidth)
        for weights in place.weights:
            measure = _Captioning(place, max(rows), tokens, rounds, figures)
            part(
                f"{weights} build",
                lambda measure=measure, weights=weights: measure.build(lambda: made.get(size, weights, source)),
            )
            part(f"{weights} stages", measure.stages)
            part(f"{weights} decode", lambda measure=measure: measure.decode(rows))
            if place.torch_device == "cuda" and peers:
                part(f"{weights} kernels", measure.kernels)
            for name, settings in place.variants(weights).items():
                part(f"{weights} decode, {name}", lambda m=measure, settings=settings: m.decode_with(settings, rows))
            measure.close()
            made.drop(size, weights)
        if peers:
            config = open_checkpoint(source).config.decoder if source.exists() else SIZES[size].decoder
            for compiled in (False, True):
                part(
                    f"pytorch {'compiled' if compiled else 'eager'}",
                    lambda compiled=compiled: torch_decoder_seconds(
                        config,
                        place.torch_device,
                        compiled,
                        compiled_rows if compiled else rows,
                        prompt=256,
                        tokens=tokens,
                        rounds=rounds,
                    ),
                )
            part("summary", lambda: summary(figures))
    click.echo(write_result(result, figures, command))


class _Bundles:
    """Bundles that were given, or are compiled."""

    def __init__(self, place: Place, folder: Path | None, scratch: Path) -> None:
        self._place, self._folder, self._scratch = place, folder, scratch

    def given(self, name: str, formats: Sequence[str]) -> bool:
        """Whether those of all formats are."""
        return self._folder is not None and all((self._folder / f"{name}-{each}").exists() for each in formats)

    def get(self, name: str, weights: str, checkpoint: Path, adapter: Path | None = None) -> Path:
        """The bundle of a checkpoint."""
        path = self._scratch / f"{name}-{weights}"
        if not self.given(name, (weights,)):
            return compile_bundle(checkpoint, path, adapter=adapter, weights=weights, target=self._place.target).path
        assert self._folder is not None
        there = self._folder / path.name
        if not (there / HOLLOW_FILE).exists():
            return there
        fill(there, path)
        return path

    def drop(self, name: str, weights: str) -> None:
        """Free the disk of one that was made: two bundles and a checkpoint of 7 B would be too many."""
        shutil.rmtree(self._scratch / f"{name}-{weights}", ignore_errors=True)


class _Captioning:
    """One bundle of the large captioner, measured."""

    def __init__(self, place: Place, rows: int, tokens: int, rounds: int, figures: dict[str, Any]) -> None:
        self._place, self._rows, self._tokens, self._rounds, self._figures = place, rows, tokens, rounds, figures
        self._captioner: Captioner | None = None

    def build(self, bundle: Callable[[], Path]) -> dict[str, Any]:
        started = time.perf_counter()
        path = bundle()
        bundle_seconds = time.perf_counter() - started
        engines = self._place.build(path, self._rows)
        started = time.perf_counter()
        self._captioner = self._place.open(path)
        return {
            "bundle_seconds": round(bundle_seconds, 1),
            "bundle_bytes": {name: file.size for name, file in self._captioner.manifest.files.items()},
            "engines": engines,
            "open_seconds": round(time.perf_counter() - started, 1),
            "device": self._captioner.device,
        }

    def stages(self) -> dict[str, Any]:
        """Median seconds of each stage of a clip of frames with sound, nothing of its prompt in the cache."""
        captioner, rng = self._loaded(), np.random.default_rng(0)
        pipeline = captioner.manifest.pipeline
        frames = rng.integers(0, 256, (pipeline.sampling.count, 360, 640, 3), dtype=np.uint8)
        sound = rng.integers(-3000, 3000, 16000 * 5, dtype=np.int16)
        heard: dict[str, Any] = {"waveform": sound, "sample_rate": 16000} if pipeline.sound else {}
        how = Decoding(max_new_tokens=self._tokens)

        def caption() -> Caption:
            captioner.forget()
            return captioner.caption(frames=frames, decoding=how, **heard)

        seen = [caption() for _ in range(self._rounds + 1)][1:]
        medians = {name: statistics.median(each.timings[name] for each in seen) for name in seen[0].timings}
        first = sum(seconds for name, seconds in medians.items() if name not in ("decode", "load"))
        return {
            "prompt_tokens": seen[0].prompt_tokens,
            "prompt_tokens_reused": max(each.prompt_tokens_reused for each in seen),
            "new_tokens": len(seen[0].token_ids),
            "seconds": {name: round(value, 5) for name, value in medians.items()},
            "time_to_first_token": round(first, 5),
            "memory_bytes": self._place.memory_used(),
        }

    def decode(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """Seconds of a step by rows, after prompts of 256 tokens, its logits on the host; and seconds a token of the
        greedy and the contrastive loop, choosing included, with candidates from the device and with all logits."""
        captioner, manifest = self._loaded(), self._loaded().manifest
        embeds = self._prompt()
        files, component = manifest.files, manifest.components["decoder"]
        weight_bytes = sum(files[file].size for file in (component.graph, component.data) if file)
        seconds: dict[str, float] = {}
        loops: dict[str, dict[str, float]] = {"logits": {}, "shortlist": {}}
        for count in rows:
            # In a function of its own: one cache at a time.
            seconds[str(count)], taken = self._rows_seconds(captioner, embeds, count)
            for kind, value in taken.items():
                loops[kind][str(count)] = value
        pair = captioner.open_inference(len(embeds) + self._tokens + 1, 2)
        contrast = {
            kind: round(self._loop_seconds(chosen, embeds, [(0.5, None)]) / loops[kind]["1"], 3)
            for kind, chosen in self._inferences(pair).items()
            if "1" in loops[kind]
        }
        floor = weight_bytes / self._figures["bandwidth_bytes_per_second"]
        return {
            "weight_bytes": weight_bytes,
            "floor_seconds": floor,
            "step_seconds": seconds,
            "tokens_per_second": {count: round(int(count) / value, 2) for count, value in seconds.items()},
            "loop_seconds": loops,
            "of_floor": round(floor / seconds["1"], 3) if "1" in seconds else None,
            "contrast_over_greedy": contrast,
            "memory_bytes": self._place.memory_used(),
        }

    def kernels(self) -> list[dict[str, Any]]:
        """Of a step of one row, its candidates chosen where that is done."""
        embeds = self._prompt()
        inference = self._loaded().open_inference(len(embeds) + self._tokens + 1, 1)
        inference.prefill(0, embeds)
        ids, choices = np.zeros(1, np.int64), [Choice(0)]
        if inference.shortlist_size:
            return kernels_of(lambda: inference.step_shortlist(ids, choices))
        return kernels_of(lambda: inference.step(ids))

    def decode_with(self, settings: Mapping[str, str], rows: tuple[int, ...]) -> dict[str, Any]:
        """``decode`` under settings of the environment."""
        path = self._loaded().bundle.path
        self._captioner = None
        with mock.patch.dict(os.environ, settings):
            self._captioner = self._place.open(path)
            return self.decode(rows)

    def _prompt(self) -> FloatArray:
        """``[256, H]``."""
        hidden = self._loaded().manifest.decoder.hidden_size
        return np.random.default_rng(0).standard_normal((256, hidden)).astype(np.float32) * 0.02

    def _rows_seconds(self, captioner: Captioner, embeds: FloatArray, rows: int) -> tuple[float, dict[str, float]]:
        """Seconds of a step, and of the greedy loop by where candidates come from."""
        inference = captioner.open_inference(len(embeds) + self._tokens + 1, rows)
        for row in range(rows):
            inference.prefill(row, embeds)
        step_seconds = self._step_seconds(inference, np.zeros(rows, np.int64))
        kinds = self._inferences(inference)
        return step_seconds, {kind: self._loop_seconds(each, embeds, [None] * rows) for kind, each in kinds.items()}

    @staticmethod
    def _inferences(inference: Inference) -> dict[str, Inference]:
        """The cache as it is, where it gives shortlists, and without them."""
        return {"logits": _AllLogits(inference), **({"shortlist": inference} if inference.shortlist_size else {})}

    def _step_seconds(self, inference: Inference, ids: npt.NDArray[np.int64]) -> float:
        for _ in range(3):
            inference.step(ids)
        taken = []
        for _ in range(self._tokens - 3):
            started = time.perf_counter()
            inference.step(ids)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def _loop_seconds(
        self, inference: Inference, embeds: FloatArray, captions: list[tuple[float, float | None] | None]
    ) -> float:
        """Seconds a step of so many greedy captions together, each with its contrast: the decoder and the choice."""
        searches: list[tuple[TokenSearch, list[int]]] = []
        turns: list[Turn] = []
        for contrast in captions:
            search = TokenSearch(Settings(max_new_tokens=1 << 30, eos_token_ids=(), contrast=contrast))
            free = sum(len(held) for _, held in searches)
            searches.append((search, list(range(free, free + search.rows))))
            first = []
            # A contrasted prompt is a third as long.
            for row, prompt in zip(searches[-1][1], (embeds, embeds[: len(embeds) // 3]), strict=False):
                inference.truncate(row, 0)
                first.append(inference.prefill(row, prompt)[0].copy())
            turns.append(search.start(first))
        taken = []
        for _ in range(self._tokens):
            started = time.perf_counter()
            turns = step(inference, np.concatenate([turn.next_ids for turn in turns]), searches)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[3:])

    def _loaded(self) -> Captioner:
        if self._captioner is None:
            raise RuntimeError("was not built")
        return self._captioner

    def close(self) -> None:
        """Free what it holds on the device."""
        self._captioner = None


class _AllLogits(FullLogits):
    """An ``Inference`` whose shortlists are not used."""

    def __init__(self, inference: Inference) -> None:
        self.rows, self.max_length = inference.rows, inference.max_length
        self.prefill, self.step = inference.prefill, inference.step
        self.rearrange, self.truncate = inference.rearrange, inference.truncate


def summary(figures: Mapping[str, Any]) -> dict[str, float]:
    """The ratios that are asked about: a step of one row against PyTorch's, and of the floor."""
    found: dict[str, float] = {}
    for weights in ("fp16", "int4"):
        mine = figures.get(f"{weights} decode", {})
        if "step_seconds" not in mine or "1" not in mine["step_seconds"]:
            continue
        for kind in ("eager", "compiled"):
            theirs = figures.get(f"pytorch {kind}", {}).get("step_seconds", {})
            if "1" in theirs:
                found[f"{weights} over pytorch {kind}"] = round(theirs["1"] / mine["step_seconds"]["1"], 2)
        found[f"{weights} of the floor"] = mine["of_floor"]
    return found


if __name__ == "__main__":
    main()
