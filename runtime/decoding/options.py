"""How a caption is to be generated: what the caller asks, and what comes of it with the checkpoint's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...contract.records import Generation
from ...errors import OptionError
from ..text import check_text

Strategy = Literal["greedy", "sample", "beam"]
ContrastKind = Literal["temporal", "noise"]

DEFAULT_BEAMS = 4

#: What a retrospective pass asks. Its places are filled with the caller's instruction and the first caption.
RETROSPECTIVE_TEMPLATE = (
    "{instruction}\nHere is a first answer:\n{caption}\nCompare it with what you see and hear. "
    "Remove what is wrong, add what is missing, and answer again with the corrected text only."
)

#: ``(alpha, beta)`` of each contrast: SynPO's ``generate_cd`` has no cutoff (docs/facts.md 2.3); VCD's evaluation
#: scripts use alpha 1 and beta 0.1 (docs/facts.md 4).
CONTRAST_DEFAULTS: dict[ContrastKind, tuple[float, float | None]] = {"temporal": (0.5, None), "noise": (1.0, 0.1)}


@dataclass(frozen=True)
class Decoding:
    """How a caption is generated.

    ``None`` means the checkpoint's own setting for ``max_new_tokens``, ``temperature``, ``top_p``, ``top_k`` and
    ``repetition_penalty``; elsewhere it is the default of the option in docs/cli.md.

    ``strategy``: ``greedy`` takes the likeliest token after the repetition penalty; ``sample`` draws from the
    distribution at ``temperature``, cut to the ``top_k`` likeliest tokens (0: all), then to the smallest set that holds
    ``top_p`` of the mass, then to tokens at least ``min_p`` times as likely as the likeliest (0: all); ``beam`` keeps
    the ``num_beams`` best continuations (``None``: 4) and takes the best by log-likelihood over length to the
    ``length_penalty``.
    ``repetition_penalty`` (Keskar et al. 2019, CTRL) divides positive and multiplies negative logits of the tokens
    already generated; ``no_repeat_ngram`` n forbids a second occurrence of any n tokens (0: off). ``stop``: texts that
    end the caption and are not part of it. ``prefix``: text that the caption begins with. ``seed`` fixes sampling and
    noise.

    ``contrast`` subtracts what the model says without the evidence: scores are ``(1 + alpha) * full - alpha * other``,
    where the other stream sees every third frame (``temporal``, SynPO) or frames under diffusion noise (``noise``, VCD,
    ``noise_step`` of 1000). ``contrast_beta`` keeps only tokens at least beta times as likely as the likeliest of the
    full stream. ``retrospective`` generates a second time with the first caption in the prompt (SynPO).
    ``confidence``: contrast and retrospection only for captions whose mean token log-likelihood falls below it.
    """

    strategy: Strategy = "greedy"
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    num_beams: int | None = None
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    prefix: str = ""
    seed: int = 0
    contrast: ContrastKind | None = None
    contrast_alpha: float | None = None
    contrast_beta: float | None = None
    noise_step: int = 500
    retrospective: bool = False
    retrospective_template: str = RETROSPECTIVE_TEMPLATE
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "sample", "beam"):
            raise OptionError(f"unknown decoding strategy '{self.strategy}'; known: greedy, sample, beam")
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
        if not 0 <= self.min_p <= 1:
            raise OptionError(f"min_p must be in [0, 1], not {self.min_p}")
        if self.no_repeat_ngram < 0:
            raise OptionError(f"no_repeat_ngram must be 0 (off) or more, not {self.no_repeat_ngram}")
        if self.num_beams is not None:
            if not 1 <= self.num_beams <= 64:
                raise OptionError(f"num_beams must be in [1, 64], not {self.num_beams}")
            if self.strategy != "beam":
                raise OptionError(f"num_beams is for the strategy beam, and the strategy is {self.strategy}")
        if not abs(self.length_penalty) < float("inf"):
            raise OptionError(f"length_penalty must be a finite number, not {self.length_penalty}")
        if isinstance(self.stop, str):
            raise OptionError("stop must be a tuple of texts, not one text")
        if not all(self.stop):
            raise OptionError("a stop text is empty: give at least one character, or leave it out")
        for stop in self.stop:
            check_text("stop", stop)
        check_text("prefix", self.prefix)
        check_text("retrospective_template", self.retrospective_template)
        if not 0 <= self.seed < 2**64:
            raise OptionError(f"seed must be in [0, 2**64), not {self.seed}")
        self._check_contrast()

    @property
    def beams(self) -> int:
        """Beams of a beam search."""
        return DEFAULT_BEAMS if self.num_beams is None else self.num_beams

    def _check_contrast(self) -> None:
        if self.contrast not in (None, "temporal", "noise"):
            raise OptionError(f"unknown contrast '{self.contrast}'; known: temporal, noise")
        if self.contrast is not None and self.strategy == "beam":
            raise OptionError("contrast goes with greedy or sampled decoding, not with beams")
        if self.contrast is None and (self.contrast_alpha is not None or self.contrast_beta is not None):
            raise OptionError("contrast_alpha and contrast_beta need a contrast: temporal or noise")
        if self.contrast_alpha is not None and not 0 <= self.contrast_alpha < float("inf"):
            raise OptionError(f"contrast_alpha must be 0 or more, not {self.contrast_alpha}")
        if self.contrast_beta is not None and not 0 <= self.contrast_beta <= 1:
            raise OptionError(f"contrast_beta must be in [0, 1], not {self.contrast_beta}")
        if not 0 <= self.noise_step < 1000:
            raise OptionError(f"noise_step must be in [0, 1000), not {self.noise_step}")
        if self.confidence is not None:
            if not self.confidence <= 0:
                raise OptionError(f"confidence is a mean log-likelihood, so 0 or less, not {self.confidence}")
            if self.contrast is None and not self.retrospective:
                raise OptionError("confidence decides on a contrast or a second pass: ask for one of them")
        if self.retrospective and "{caption}" not in self.retrospective_template:
            raise OptionError("the retrospective template has no place for the first caption: {caption}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A ``Decoding`` of one pass with every open value filled in from the checkpoint's generation settings.

    ``contrast``: alpha and beta of the two streams' combination, ``None`` for a single stream.
    """

    strategy: Strategy = "greedy"
    max_new_tokens: int
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_token_ids: tuple[int, ...]
    seed: int = 0
    contrast: tuple[float, float | None] | None = None

    @property
    def streams(self) -> int:
        """Prompts that one caption needs: the full one, and the contrasted one."""
        return 1 if self.contrast is None else 2

    @property
    def rows(self) -> int:
        """Rows of the cache that one caption takes while it is generated."""
        return self.num_beams if self.strategy == "beam" else self.streams


def resolve(decoding: Decoding, defaults: Generation, contrast: bool | None = None) -> Settings:
    """Fill in what the caller left open.

    ``contrast``: whether this pass has one, as the ``decoding`` says when ``None``. ``OptionError`` for sampling at a
    temperature of 0.
    """

    def pick(name: str) -> float:
        value = getattr(decoding, name)
        return getattr(defaults, name) if value is None else value

    if decoding.strategy == "sample" and not pick("temperature") > 0:
        raise OptionError("the checkpoint's temperature is 0, at which nothing can be sampled; give a temperature")
    weights = None
    if decoding.contrast is not None and contrast is not False:
        alpha, beta = CONTRAST_DEFAULTS[decoding.contrast]
        weights = (
            alpha if decoding.contrast_alpha is None else decoding.contrast_alpha,
            beta if decoding.contrast_beta is None else decoding.contrast_beta,
        )
    return Settings(
        strategy=decoding.strategy,
        max_new_tokens=int(pick("max_new_tokens")),
        repetition_penalty=float(pick("repetition_penalty")),
        no_repeat_ngram=decoding.no_repeat_ngram,
        temperature=float(pick("temperature")),
        top_p=float(pick("top_p")),
        top_k=int(pick("top_k")),
        min_p=decoding.min_p,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        eos_token_ids=tuple(defaults.eos_token_ids),
        seed=decoding.seed,
        contrast=weights,
    )
