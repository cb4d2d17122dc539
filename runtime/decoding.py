"""Decoding strategies: from the logits of a prefilled prompt to tokens, over any ``Inference``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from .bundle import GenerationSpec
from .inference import FloatArray, Inference

FinishReason = Literal["stop", "length", "stop_string"]


@dataclass(frozen=True)
class Decoding:
    """How a caption is generated. ``None`` means the checkpoint's own setting.

    ``greedy`` takes the likeliest token after the repetition penalty; ``sample`` draws from the distribution cut to
    the ``top_k`` likeliest tokens, then to the smallest set that holds ``top_p`` of the mass, at ``temperature``.
    ``repetition_penalty`` (Keskar et al. 2019, CTRL) divides positive and multiplies negative logits of the tokens
    already generated. ``stop``: texts that end the caption and are not part of it. ``seed`` fixes sampling.
    """

    strategy: Literal["greedy", "sample"] = "greedy"
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "sample"):
            raise OptionError(f"unknown decoding strategy '{self.strategy}'; known: greedy, sample")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"{name} must be a positive number, not {value}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise OptionError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if isinstance(self.stop, str):
            raise OptionError("stop must be a tuple of texts, not one text")
        if not all(self.stop):
            raise OptionError("a stop text is empty: give at least one character, or leave it out")
        if not 0 <= self.seed < 2**64:
            raise OptionError(f"seed must be in [0, 2**64), not {self.seed}")


@dataclass(frozen=True)
class Settings:
    """A ``Decoding`` with every open value filled in from the checkpoint's generation settings."""

    strategy: Literal["greedy", "sample"]
    max_new_tokens: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    eos_token_ids: tuple[int, ...]
    seed: int


def resolve(decoding: Decoding, defaults: GenerationSpec) -> Settings:
    """Fill in what the caller left open. ``OptionError`` for sampling at a temperature of 0."""

    def pick(name: str) -> float:
        value = getattr(decoding, name)
        return getattr(defaults, name) if value is None else value

    if decoding.strategy == "sample" and not pick("temperature") > 0:
        raise OptionError("the checkpoint's temperature is 0, at which nothing can be sampled; give a temperature")
    return Settings(
        strategy=decoding.strategy,
        max_new_tokens=int(pick("max_new_tokens")),
        repetition_penalty=float(pick("repetition_penalty")),
        temperature=float(pick("temperature")),
        top_p=float(pick("top_p")),
        top_k=int(pick("top_k")),
        eos_token_ids=tuple(defaults.eos_token_ids),
        seed=decoding.seed,
    )


@dataclass(frozen=True)
class Token:
    """One generated token. ``logprob`` is its log-likelihood under the model's own distribution (natural log),
    before penalty, temperature and cuts."""

    id: int
    logprob: float
    is_eos: bool


def generate(inference: Inference, logits: FloatArray, settings: Settings) -> Iterator[Token]:
    """Tokens one by one until an end-of-sequence token (which is the last one given) or ``max_new_tokens``.

    ``logits`` ``[V]`` of the prompt's last position; row 0 of ``inference`` holds the prompt. Stop the iterator to
    cancel.
    """
    choose = _chooser(settings)
    seen: list[int] = []
    eos = frozenset(settings.eos_token_ids)
    normalize = LogNormalizer()
    while True:
        with penalty_applied(logits, seen, settings.repetition_penalty):
            token_id = choose(logits)
        yield Token(token_id, float(logits[token_id]) - normalize(logits), token_id in eos)
        if token_id in eos or len(seen) + 1 == settings.max_new_tokens:
            return
        seen.append(token_id)
        logits = inference.step(np.array([token_id]))[0]


def log_likelihoods(logits: FloatArray, token_ids: Sequence[int]) -> list[float]:
    """Log-likelihood of ``token_ids[i]`` under row i of ``logits`` ``[N, V]``."""
    normalize = LogNormalizer()
    return [float(row[token]) - normalize(row) for row, token in zip(logits, token_ids, strict=True)]


class LogNormalizer:
    """log sum exp of a row of logits, with one scratch buffer: at 152k entries an allocation costs as much."""

    def __init__(self) -> None:
        self._scratch: FloatArray = np.empty(0, np.float32)

    def __call__(self, logits: FloatArray) -> float:
        if len(self._scratch) != len(logits):
            self._scratch = np.empty(len(logits), np.float32)
        peak = logits.max()
        np.subtract(logits, peak, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        return float(peak) + float(np.log(self._scratch.sum()))


@contextmanager
def penalty_applied(logits: FloatArray, seen: Sequence[int], penalty: float) -> Iterator[None]:
    """The repetition penalty on the tokens ``seen`` of ``logits [V]``, in place, for the length of a ``with`` block.

    In place because a copy of 152k logits in every step costs as much as all the rest of choosing a token.
    """
    if penalty == 1.0 or not seen:
        yield
        return
    index = np.unique(seen)
    values = logits[index]
    logits[index] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    try:
        yield
    finally:
        logits[index] = values


def _chooser(settings: Settings):
    if settings.strategy == "greedy":
        return lambda scores: int(scores.argmax())
    random = np.random.default_rng(settings.seed)

    def sample(scores: FloatArray) -> int:
        index, probabilities = _cut(scores, settings.temperature, settings.top_k, settings.top_p)
        cumulative = probabilities.cumsum()
        drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
        return int(index[min(drawn, len(index) - 1)])

    return sample


def _cut(
    scores: FloatArray, temperature: float, top_k: int, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that sampling may draw, likeliest first, and their (unnormalized) probabilities.

    The order of transformers' warpers: temperature, top-k, top-p; the likeliest token always stays.
    """
    count = len(scores) if top_k == 0 else min(top_k, len(scores))
    index = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(count)
    index = index[np.argsort(-scores[index], kind="stable")]
    wide = scores[index].astype(np.float64) / temperature
    probabilities = np.exp(wide - wide[0])
    probabilities /= probabilities.sum()
    if top_p < 1:
        keep = int(np.searchsorted(probabilities.cumsum(), top_p)) + 1
        index, probabilities = index[:keep], probabilities[:keep]
    return index, probabilities
