"""Does a bundle compute what its checkpoint computes? Stage by stage, so that the answer names a component.

Every stage of the bundle is fed the *reference's* input of that stage, so that an error shows where it arises and not
everywhere after. Only the greedy tokens run the bundle from end to end. A quantized decoder is held against the
reference with the same rounded weights (is the compiled graph right?); what the rounding itself does to the model is
measured beside it (``Drift``) and decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..runtime.bundle import Manifest
from ..runtime.captioner import Captioner
from ..runtime.clip import Clip
from ..runtime.decoding import Decoding, Token, generate, penalized, resolve
from ..runtime.encoder import EncodedClip, splice_blocks
from ..runtime.inference import FloatArray, Inference
from ..runtime.preprocess.fbank import kaldi_fbank
from ..runtime.preprocess.image import preprocess_frames
from ..runtime.text import build_prompt
from ..runtime.timing import Stages
from .reference import Reference

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"

#: Largest difference allowed, relative to the reference's largest magnitude.
#: pixels: the same integer arithmetic, then three float32 operations. fbank: a bfloat16 step at the top of its range.
#: The encoders are float32 in every bundle. Decoder: float32, or int8 activations against int4 weights
#: (MatMulNBits accuracy level 4: about 5e-3 a product, LEADS 13.7).
TOLERANCE = {"pixels": 1e-6, "fbank": 2**-7, "vision": 1e-4, "connector": 1e-4, "audio": 1e-4, "embeddings": 1e-6}
LOGITS_TOLERANCE = {"fp32": 1e-4, "int4": 5e-2}


@dataclass(frozen=True)
class StageResult:
    """One comparison. ``error`` is max |a - b| / max |b|; ``inf`` when shapes differ or a value is not finite."""

    stage: str
    error: float
    tolerance: float
    verdict: str


@dataclass(frozen=True)
class TokenResult:
    """Greedy tokens of both. ``margin``: how far apart, in the reference's logits (after the repetition penalty), the
    two candidates of the first difference are; a margin within the tolerance of the logits is a near-tie."""

    compared: int
    equal: int
    margin: float | None
    verdict: str


@dataclass(frozen=True)
class Drift:
    """What quantization does to the model: the bundle against the float32 reference on the same prompt.

    ``logits_error`` as in ``StageResult``; ``kl`` the divergence of the next-token distributions (nats);
    ``top1_agreement`` of the next token along the reference's own greedy caption; ``equal_tokens`` before the first
    different greedy token.
    """

    logits_error: float
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
    """The whole. ``first_divergent`` names the first stage, in the order of the data, that failed on any clip;
    ``notes`` says where the reference is not what the bundle was made from."""

    verdict: str
    first_divergent: str | None
    weights: str
    clips: list[ClipResult]
    notes: list[str] = field(default_factory=list)


def verify_bundle(
    bundle: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    media: Sequence[str | os.PathLike[str]],
    *,
    adapter: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 32,
    audio: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Open both sides and compare them.

    Raises ``BundleError``, ``CheckpointError``, ``MediaError`` or ``OptionError``.
    """
    captioner = Captioner.load(bundle)
    weights = captioner.manifest.weights
    block_size = captioner.manifest.components["decoder"].block_size or 0
    source = open_checkpoint(
        Path(checkpoint), None if adapter is None else Path(adapter), captioner.manifest.visual.keep
    )
    reference = Reference(source, weights, block_size)
    original = None if weights == "fp32" else Reference(source)
    report = verify(
        captioner,
        reference,
        media,
        original=original,
        max_new_tokens=max_new_tokens,
        audio=audio,
        progress=progress,
    )
    report.notes.extend(_provenance_notes(captioner.manifest, source))
    return report


def _provenance_notes(manifest: Manifest, source: CaptionerCheckpoint) -> Iterator[str]:
    made = manifest.provenance
    if made.checkpoint_sha256 != source.checkpoint.fingerprint():
        yield f"the reference is not the checkpoint that the bundle was compiled from ({made.checkpoint})"
    if made.adapter_sha256 is not None and source.adapter is None:
        yield f"the bundle has the adapter {made.adapter} merged, the reference none: give it with --adapter"
    elif made.adapter_sha256 != (source.adapter.fingerprint() if source.adapter else None):
        yield "the reference's adapter is not the one that was merged into the bundle"


def check_same_model(manifest: Manifest, reference: Reference) -> None:
    """``OptionError`` when bundle and checkpoint are of different families or shapes."""
    config = reference.config
    if manifest.family != config.family:
        raise OptionError(f"the bundle is a {manifest.family} captioner, the reference a {config.family} one")
    mine = (manifest.decoder.num_layers, manifest.decoder.hidden_size, manifest.decoder.vocab_size)
    theirs = (config.decoder.num_layers, config.decoder.hidden_size, config.decoder.vocab_size)
    if mine != theirs:
        raise OptionError(
            f"the bundle's decoder has (layers, width, vocabulary) {mine}, the reference's {theirs}: not the same model"
        )


def verify(
    captioner: Captioner,
    reference: Reference,
    media: Sequence[str | os.PathLike[str]],
    *,
    original: Reference | None = None,
    max_new_tokens: int = 32,
    audio: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare on every clip of ``media``.

    ``reference`` has the decoder weights that the bundle stores; ``original``, the float32 weights, is needed for
    ``Drift`` when they differ.
    """
    check_same_model(captioner.manifest, reference)
    report = progress or (lambda _: None)
    clips = []
    for source in media:
        clip = captioner.read(source, audio=audio)
        clips.append(_verify_clip(captioner, reference, original, clip, os.fspath(source), max_new_tokens, report))
    failed = next((stage.stage for stage in _in_order(clips) if stage.verdict == FAIL), None)
    verdicts = [stage.verdict for stage in _in_order(clips)] + [c.tokens.verdict for c in clips if c.tokens]
    if failed is None and FAIL in verdicts:
        failed = "greedy tokens"
    verdict = next((v for v in (FAIL, AMBIGUOUS) if v in verdicts), PASS)
    return Report(verdict, failed, captioner.manifest.weights, clips)


def _in_order(clips: list[ClipResult]) -> Iterator[StageResult]:
    order = ["pixels", "vision", "connector", "fbank", "audio", "embeddings", "prefill logits"]
    stages = [stage for clip in clips for stage in clip.stages]
    return iter(sorted(stages, key=lambda stage: order.index(stage.stage)))


def _verify_clip(
    captioner: Captioner,
    reference: Reference,
    original: Reference | None,
    clip: Clip,
    name: str,
    max_new_tokens: int,
    report: Callable[[str], None],
) -> ClipResult:
    result = ClipResult(name, clip.mode)
    encoder, stages = captioner.encoder, Stages()

    def hold(stage: str, mine: FloatArray, theirs: FloatArray, tolerance: float) -> None:
        error = relative_error(mine, theirs)
        result.stages.append(StageResult(stage, error, tolerance, PASS if error <= tolerance else FAIL))
        report(f"{name}: {stage} {error:.1e}")

    visual = audio = None
    if clip.frames is not None:
        assert clip.order is not None
        pixels = reference.pixels(clip.frames)
        hold(
            "pixels",
            preprocess_frames(clip.frames, captioner.manifest.preprocessing.image),
            pixels,
            TOLERANCE["pixels"],
        )
        features = reference.run("vision", pixels)
        hold("vision", encoder.features(pixels, stages), features, TOLERANCE["vision"])
        visual = reference.run("connector", features[clip.order])
        hold("connector", encoder.connect(features[clip.order], stages), visual, TOLERANCE["connector"])
    if clip.sound is not None:
        fbank = reference.fbank(clip.sound)
        hold("fbank", kaldi_fbank(clip.sound), fbank, TOLERANCE["fbank"])
        audio = reference.run("audio", fbank[np.newaxis])[0]
        hold("audio", encoder.audio_tokens(fbank, stages), audio, TOLERANCE["audio"])
    encoded = EncodedClip(clip.mode, splice_blocks(visual, audio))
    instruction = captioner.manifest.default_instruction
    prompt = encoder.prompt_embeds(encoded, instruction)
    theirs = _reference_prompt(captioner, reference, encoded, instruction)
    hold("embeddings", prompt, theirs, TOLERANCE["embeddings"])

    tolerance = LOGITS_TOLERANCE[captioner.manifest.weights]
    length = len(theirs) + max_new_tokens
    logits = captioner.open_inference(length).prefill(0, theirs)[0]
    their_logits = reference.open(1, length).prefill(0, theirs)[0]
    hold("prefill logits", logits, their_logits, tolerance)
    report(f"{name}: greedy tokens")
    decoding = Decoding(max_new_tokens=max_new_tokens)
    own_prompt = encoder.prompt_embeds(encoder.encode(clip, stages), instruction)
    mine_tokens = list(captioner.generate_tokens(own_prompt, decoding, stages))
    trace = _greedy(captioner, reference, theirs, decoding)
    result.tokens = _compare_tokens(mine_tokens, trace, tolerance)
    if original is not None:
        report(f"{name}: drift from the float32 weights")
        result.drift = _drift(captioner, original, theirs, decoding, mine_tokens)
    return result


def relative_error(mine: FloatArray, theirs: FloatArray) -> float:
    """max |mine - theirs| / max |theirs|; ``inf`` when shapes differ or a value is not finite."""
    if mine.shape != theirs.shape or not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(mine - theirs).max() / max(float(np.abs(theirs).max()), np.finfo(np.float32).tiny))


def _reference_prompt(captioner: Captioner, reference: Reference, encoded: EncodedClip, instruction: str) -> FloatArray:
    spec = captioner.manifest.prompts[encoded.mode]
    chunks = build_prompt(captioner.tokenizer, spec, instruction, len(encoded.blocks))
    pieces = [reference.embed(np.array(chunk, np.int64)) for chunk in chunks]
    for index, block in enumerate(encoded.blocks):
        pieces.insert(2 * index + 1, block)
    return np.concatenate(pieces)


@dataclass(frozen=True)
class _Greedy:
    """Greedy tokens and, for each, the scores ``[V]`` (after the repetition penalty) that it was the largest of."""

    tokens: list[int]
    scores: list[FloatArray]


class _Recorder:
    """An ``Inference`` that keeps the logits it hands out."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self.logits: list[FloatArray] = []

    def __getattr__(self, name: str):
        return getattr(self._inference, name)

    def step(self, token_ids) -> FloatArray:
        logits = self._inference.step(token_ids)
        self.logits.append(logits[0].copy())
        return logits


def _greedy(captioner: Captioner, reference: Reference, embeds: FloatArray, decoding: Decoding) -> _Greedy:
    settings = resolve(decoding, captioner.manifest.generation)
    recorder = _Recorder(reference.open(1, len(embeds) + settings.max_new_tokens))
    recorder.logits.append(recorder.prefill(0, embeds)[0])
    tokens = [token.id for token in generate(recorder, recorder.logits[0], settings)]  # type: ignore[arg-type]
    scores = [
        penalized(logits, tokens[:index], settings.repetition_penalty)
        for index, logits in enumerate(recorder.logits[: len(tokens)])
    ]
    return _Greedy(tokens, scores)


def _compare_tokens(mine: list[Token], theirs: _Greedy, tolerance: float) -> TokenResult:
    ids = [token.id for token in mine]
    compared = max(len(ids), len(theirs.tokens))
    equal = _common_prefix(ids, theirs.tokens)
    if equal == compared:
        return TokenResult(compared, equal, None, PASS)
    # Both continue from the same prefix at the first difference: neither list can have ended before it, since the end
    # of one is an end-of-sequence token that the other does not have there.
    scores = theirs.scores[equal]
    margin = float(scores[theirs.tokens[equal]] - scores[ids[equal]])
    near_tie = margin <= tolerance * float(np.abs(scores).max())
    return TokenResult(compared, equal, margin, AMBIGUOUS if near_tie else FAIL)


def _drift(
    captioner: Captioner, original: Reference, embeds: FloatArray, decoding: Decoding, mine: list[Token]
) -> Drift:
    trace = _greedy(captioner, original, embeds, decoding)
    continuation = original.embed(np.array(trace.tokens[:-1], np.int64))
    length = len(embeds) + len(trace.tokens)

    def along(inference: Inference) -> FloatArray:
        first = inference.prefill(0, embeds)
        if not len(continuation):
            return first
        return np.concatenate([first, inference.prefill(0, continuation, num_logits=len(continuation))])

    ours, theirs = along(captioner.open_inference(length)), along(original.open(1, length))
    log_ours, log_theirs = (_log_softmax(rows[0]) for rows in (ours, theirs))
    return Drift(
        logits_error=relative_error(ours[0], theirs[0]),
        kl=float((np.exp(log_theirs) * (log_theirs - log_ours)).sum()),
        top1_agreement=float((ours.argmax(1) == theirs.argmax(1)).mean()),
        equal_tokens=_common_prefix([token.id for token in mine], trace.tokens),
        compared=len(trace.tokens),
    )


def _log_softmax(logits: FloatArray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
