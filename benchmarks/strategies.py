"""What a decoding strategy costs per token, against greedy, in one run: ``python -m intertitle.benchmarks.strategies``.

Every strategy runs as the captioner runs it: requests on the scheduler, scores, log-likelihoods, arg-max or sampling.
Prompts are random embeddings of a given length (the contrasted one a third as long), weights are random at a
Qwen2-0.5B decoder shape, and no token ends a caption, so that each strategy makes the same number of tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.decoding import BeamSearch, Request, Scheduler, Search, Segment, Settings, TokenSearch
from ..runtime.ort import OrtDecoder
from .harness import alternate, paired_ratio, write_result
from .random_bundle import random_bundle


def seconds_per_token(decoder: OrtDecoder, prompts: list[np.ndarray], make: Callable[[], Search], tokens: int) -> float:
    """Decoding time of one caption, prefill aside, over the tokens that its longest stream takes in."""
    search = make()
    scheduler = Scheduler(decoder.open(search.rows, len(prompts[0]) + tokens + 1))
    segments = [[Segment(prompt)] for prompt in prompts[: search.streams]]
    ticket = scheduler.admit(Request(segments, search, lambda token: False))
    started = time.perf_counter()
    steps = 0
    while not ticket.done:
        scheduler.step()
        steps += 1
    return (time.perf_counter() - started) / steps


def n_best_seconds(decoder: OrtDecoder, prompt: np.ndarray, count: int, tokens: int) -> float:
    """Seconds a token of ``count`` sampled captions from one prefill, generated together."""
    scheduler = Scheduler(decoder.open(count, len(prompt) + tokens + 1))
    tickets = []
    for seed in range(count):
        how = Settings(strategy="sample", max_new_tokens=tokens + 1, top_k=32, eos_token_ids=(), seed=seed)
        tickets.append(scheduler.admit(Request([[Segment(prompt)]], TokenSearch(how), lambda token: False)))
    started = time.perf_counter()
    while not scheduler.idle:
        scheduler.step()
    return (time.perf_counter() - started) / (tokens * count)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure this bundle.  [default: random, 0.5b, int4]")
@click.option("--prompt-tokens", default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=48, show_default=True, help="New tokens of each measurement.")
@click.option("--rounds", default=6, show_default=True, help="Rounds of each measurement.")
@click.option("-o", "--result", default="strategies-0.5b", show_default=True, help="The name of the file in results/.")
def main(bundle: Path | None, prompt_tokens: int, tokens: int, rounds: int, result: str) -> None:
    """Measure each strategy's time per token beside that of greedy decoding."""
    with tempfile.TemporaryDirectory() as scratch:
        opened = Bundle.open(bundle or random_bundle(Path(scratch), "0.5b"))
        spec = opened.manifest.decoder
        decoder = OrtDecoder(opened.file(opened.manifest.components["decoder"].graph), spec, opened.embed)
        random = np.random.default_rng(0)
        lengths = (prompt_tokens, max(prompt_tokens // 3, 1))
        prompts = [random.standard_normal((n, spec.hidden_size)).astype(np.float32) * 0.02 for n in lengths]

        def token_search(**changes) -> Callable[[], Search]:
            how = {"max_new_tokens": tokens + 1, "repetition_penalty": 1.05, "eos_token_ids": ()}
            return lambda: TokenSearch(Settings(**{**how, **changes}))

        def beam(count: int) -> Callable[[], Search]:
            how = Settings(strategy="beam", num_beams=count, max_new_tokens=tokens + 1, eos_token_ids=())
            return lambda: BeamSearch(how)

        strategies = {
            "greedy": token_search(),
            "sample": token_search(strategy="sample", temperature=0.7, top_k=20, top_p=0.8),
            "contrast_temporal": token_search(contrast=(0.5, None)),
            "contrast_noise": token_search(contrast=(1.0, 0.1)),
            "contrast_temporal_sampled": token_search(
                strategy="sample", temperature=0.5, top_k=32, top_p=0.9, contrast=(0.5, None)
            ),
            "beam_4": beam(4),
        }
        contestants: dict[str, Callable[[], float]] = {
            name: lambda make=make: seconds_per_token(decoder, prompts, make, tokens)
            for name, make in strategies.items()
        }
        contestants["n_best_8"] = lambda: n_best_seconds(decoder, prompts[0], 8, tokens)
        seconds = alternate(contestants, rounds)
        figures = {
            "shape": f"{opened.manifest.name}, {opened.manifest.weights}",
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "rounds": rounds,
            "milliseconds_per_token": {n: round(statistics.median(v) * 1000, 3) for n, v in seconds.items()},
            "over_greedy": {n: paired_ratio(v, seconds["greedy"]) for n, v in seconds.items() if n != "greedy"},
            "seconds_per_token": seconds,
        }
    path = write_result(result, figures, "python -m intertitle.benchmarks.strategies")
    for name, ratio in figures["over_greedy"].items():  # type: ignore[union-attr]
        click.echo(f"{name}: {ratio['median']:.2f} of greedy ({ratio['min']:.2f} to {ratio['max']:.2f})")
    click.echo(path)


if __name__ == "__main__":
    main()
