"""Compare outputs of bundle and reference: errors, near-ties, drift, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..contract.formats import FORMATS
from ..contract.manifest import Manifest
from ..contract.pipeline import Pipeline
from ..contract.targets import get_target
from ..runtime.inference import FloatArray
from .reference import GreedyCaption, repetition_penalty

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"

#: What is compared beside the stages of the pipeline, in front of them and behind, and what each one tests.
_BEFORE = {"pixels": "preprocessing", "fbank": "preprocessing"}
_BEHIND = {"embeddings": "embedding", "prefill logits": "decoder", "decode logits": "decoder"}

#: The largest allowed difference, relative to the reference's largest magnitude.
#: pixels: the same integer arithmetic, then three float32 operations. fbank: a bfloat16 step at the top of its range.
#: embeddings: one table on both sides.
TOLERANCE = {"pixels": 1e-6, "fbank": 2**-7, "embeddings": 1e-6}

#: The tolerance of a component that is float32 on both sides (an int4 decoder is compared with float32 matmuls).
FLOAT32 = 1e-4


def compared_parts(pipeline: Pipeline) -> dict[str, str]:
    """The stages of a report in the order of the data, and the component that each one tests.

    The stages of the pipeline have their own names, which are those of their components.
    """
    return _BEFORE | {stage.name: stage.name for stage in pipeline.stages} | _BEHIND


def tolerance(stage: str, manifest: Manifest) -> float:
    """The allowed difference of a stage's output from the reference's: that of its component's matmuls or weights."""
    kind = _kind(stage)
    component = manifest.components.get(_BEHIND.get(kind, kind))
    if component is None:
        return TOLERANCE[kind]
    matmuls = get_target(manifest.target).unquantized(component.weights)
    return FORMATS[matmuls].tolerance or FORMATS[component.weights].tolerance or FLOAT32


def near_tie(manifest: Manifest) -> float:
    """The difference of two logits below which they count as a tie. It includes the effect of the encoders."""
    return max(
        FORMATS[component.weights].near_tie for name, component in manifest.components.items() if name != "selection"
    )


@dataclass(frozen=True)
class StageResult:
    """One comparison. After a comma, the name of a stage says which of its graphs it tests (``vision, 50%``).

    ``relative_error`` is max |a - b| / max |b|, where b is the reference's output. It is ``None`` if the shapes differ
    or a value is not finite; ``problem`` then says which.
    """

    stage: str
    relative_error: float | None
    tolerance: float
    verdict: str
    problem: str | None = None

    @property
    def error(self) -> float:
        """``relative_error`` as a number; ``inf`` for ``None``."""
        return float("inf") if self.relative_error is None else self.relative_error


@dataclass(frozen=True)
class TokenResult:
    """The greedy tokens of bundle and reference.

    ``margin``: at the first difference, how far the two tokens are apart in the reference's logits (after the
    repetition penalty). A small margin is a near-tie (``near_tie``). ``None`` if no token differs: the captions are
    equal, or one ends where the other continues.
    """

    compared: int
    equal: int
    margin: float | None
    verdict: str


@dataclass(frozen=True)
class Drift:
    """The effect of quantization: the bundle against the float32 weights on the same prompt.

    Both get the greedy caption of the float32 weights. Over the positions that predict its tokens:

    - ``logits_error``: as in ``StageResult``.
    - ``kl``: the mean divergence of the next-token distributions, KL(float32 || bundle), in nats.
    - ``top1_agreement``: the share of positions at which both have the same likeliest token.

    ``equal_tokens`` of ``compared``: the length of the common beginning of both greedy captions. ``activations_error``
    is the part of the kernel: the error against the same rounded weights with float32 activations, along their caption.
    """

    logits_error: float
    activations_error: float
    kl: float
    top1_agreement: float
    equal_tokens: int
    compared: int


@dataclass
class ClipResult:
    """All comparisons on one clip in one mode."""

    clip: str
    mode: str
    stages: list[StageResult] = field(default_factory=list)
    tokens: TokenResult | None = None
    drift: Drift | None = None


@dataclass
class Report:
    """The whole report, as plain values that are valid JSON.

    ``first_divergent``: the component of the first stage, in the order of the data, that failed on any clip. It is
    ``"greedy tokens"`` if every stage passed but the captions differ. ``notes`` says where the reference is not the one
    that the bundle was compiled from. ``environment``: hashes of what was compared, ``weights``, the ``accuracy_level``
    of the int4 matmuls (4 means int8 activations), and versions.
    """

    verdict: str
    first_divergent: str | None
    weights: str
    clips: list[ClipResult]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str | int | None] = field(default_factory=dict)


def conclude(clips: Sequence[ClipResult], parts: Mapping[str, str]) -> tuple[str, str | None]:
    """The verdict over all clips and the first divergent component. ``parts``: see ``compared_parts``."""
    failed = {_kind(stage.stage) for clip in clips for stage in clip.stages if stage.verdict == FAIL}
    tokens = {clip.tokens.verdict for clip in clips if clip.tokens is not None}
    for stage, component in parts.items():
        if stage in failed:
            return FAIL, component
    if FAIL in tokens:
        return FAIL, "greedy tokens"
    return (AMBIGUOUS if AMBIGUOUS in tokens else PASS), None


def compare_stage(stage: str, mine: FloatArray, theirs: FloatArray, allowed: float = FLOAT32) -> StageResult:
    """Compare a stage's output with the reference's. ``allowed``: the tolerance."""
    problem = _incomparable(mine, theirs)
    error = relative_error(mine, theirs) if problem is None else None
    verdict = PASS if error is not None and error <= allowed else FAIL
    return StageResult(stage, error, allowed, verdict, problem)


def _kind(stage: str) -> str:
    return stage.partition(",")[0]


def _incomparable(mine: FloatArray, theirs: FloatArray) -> str | None:
    """Why two arrays cannot be compared, or ``None``."""
    if mine.shape != theirs.shape:
        return f"the shape is {list(mine.shape)}, the reference's {list(theirs.shape)}"
    for name, values in (("bundle", mine), ("reference", theirs)):
        if not np.isfinite(values).all():
            return f"the {name}'s output is not finite"
    return None


def relative_error(mine: FloatArray, theirs: FloatArray) -> float:
    """max |mine - theirs| / max |theirs| of two finite arrays of the same shape."""
    return float(np.abs(mine - theirs).max() / max(float(np.abs(theirs).max()), np.finfo(np.float32).tiny))


def compare_tokens(mine: Sequence[int], theirs: GreedyCaption, penalty: float, tie: float) -> TokenResult:
    """Compare greedy tokens with the reference's. ``penalty``: the repetition penalty; ``tie``: see ``near_tie``."""
    compared = max(len(mine), len(theirs.tokens))
    equal = _common_prefix(mine, theirs.tokens)
    if equal == compared:
        return TokenResult(compared, equal, None, PASS)
    if equal == min(len(mine), len(theirs.tokens)):
        # One caption ends where the other continues. This is a difference of the end, not of a token.
        return TokenResult(compared, equal, None, FAIL)
    scores = repetition_penalty(theirs.logits[equal], theirs.tokens[:equal], penalty)
    margin = float(scores[theirs.tokens[equal]] - scores[mine[equal]])
    tied = margin <= tie * float(np.abs(scores).max())
    return TokenResult(compared, equal, margin, AMBIGUOUS if tied else FAIL)


def measure_drift(
    logits: FloatArray, tokens: Sequence[int], original: GreedyCaption, activations_error: float
) -> Drift:
    """The ``Drift`` of a quantized decoder.

    ``logits [N, V]``: its logits along the caption ``original`` of the float32 weights. ``tokens``: its own greedy
    tokens.
    """
    ours, theirs = (_log_softmax(rows) for rows in (logits, original.logits))
    return Drift(
        logits_error=relative_error(logits, original.logits),
        activations_error=activations_error,
        kl=float((np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()),
        top1_agreement=float((logits.argmax(axis=1) == original.logits.argmax(axis=1)).mean()),
        equal_tokens=_common_prefix(tokens, original.tokens),
        compared=len(original.tokens),
    )


def _log_softmax(logits: FloatArray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
