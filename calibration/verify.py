"""Does a bundle compute what its checkpoint computes? The comparison goes stage by stage: the answer names a component.

Every stage of the bundle gets the *reference's* input of that stage, so an error shows in the stage where it arises and
not in all later ones. Only the greedy tokens run the bundle from end to end. A quantized decoder is compared with the
reference with the same rounded weights and runs with float32 matmuls: are graph and weights right? The effect of the
rounding of weights and activations is measured separately (``Drift``) and does not change the verdict. Both sides get
the same sampled frames and sound and use the bundle's tokenizer.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..contract.formats import FORMATS
from ..contract.manifest import Manifest
from ..contract.pipeline import PIXELS, SOUND, Pipeline, Stage, stages_of
from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models.config import CaptionerConfig
from ..models.stages import measured, meta_values
from ..runtime.bundle import Bundle
from ..runtime.captioner import Captioner
from ..runtime.clip import Clip
from ..runtime.encoder import EncodedClip, Units
from ..runtime.inference import FloatArray, Inference
from ..runtime.preprocess.fbank import sound_features
from ..runtime.preprocess.image import preprocess_frames
from ..runtime.prompt import Slot, build_prompt, choose_pieces, joined, unit_slots
from ..runtime.timing import Stages
from ..runtime.viewing import Share
from .comparison import (
    ClipResult,
    Drift,
    Report,
    compare_stage,
    compare_tokens,
    compared_parts,
    conclude,
    measure_drift,
    near_tie,
    relative_error,
    tolerance,
)
from .exact_decoder import ExactDecoder, accuracy_level
from .recipe import roundings
from .reference import GreedyCaption, Reference

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "numpy")


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

    The reference needs four bytes per parameter; for a quantized bundle, its decoder needs eight. Raises
    ``BundleError``, ``CheckpointError``, ``MediaError`` or ``OptionError``.
    """
    captioner = Captioner.load(bundle)
    manifest = captioner.manifest
    source = open_checkpoint(Path(checkpoint), None if adapter is None else Path(adapter), _keep(manifest))
    decoder, rounded = manifest.components["decoder"], roundings(manifest, source)
    original = Reference(source)
    report = verify(
        captioner,
        Reference(source, rounded) if rounded else original,
        media,
        original=original if FORMATS[decoder.weights].quantized else None,
        max_new_tokens=max_new_tokens,
        audio=audio,
        progress=progress,
    )
    report.environment = environment(captioner.bundle, source)
    report.notes.extend(_provenance_notes(manifest, report.environment))
    return report


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

    ``reference`` has the weights that the bundle stores (``roundings``). ``original`` has the float32 weights;
    ``Drift`` needs it if the decoder's weights differ.
    """
    check_same_model(captioner.manifest, reference)
    check = _Check(captioner, reference, original, max_new_tokens, progress or (lambda _: None))
    clips = [check.run(os.fspath(source), captioner.read(source, audio=audio)) for source in media]
    verdict, divergent = conclude(clips, compared_parts(captioner.manifest.pipeline))
    return Report(verdict, divergent, captioner.manifest.weights, clips)


def check_same_model(manifest: Manifest, reference: Reference) -> None:
    """``OptionError`` if bundle and checkpoint have different families, sizes or pipelines.

    Texts of prompts and numbers of the preprocessing may differ: the report tells it.
    """
    config = reference.config
    if manifest.family != config.family:
        raise OptionError(f"the bundle is a {manifest.family} captioner, the reference a {config.family} one")
    for what, mine, theirs in _facts(manifest, config):
        if mine != theirs:
            raise OptionError(f"not the same model: {what} {mine} in the bundle, {theirs} in the reference")


def _facts(manifest: Manifest, config: CaptionerConfig) -> Iterator[tuple[str, object, object]]:
    """What must be equal, and what it is in the bundle and in the reference. The stages come in order."""
    ours = manifest.pipeline
    theirs = measured(config, tuple(variant.keep for variant in ours.merging.variants) if ours.merging else ())
    yield "decoder layers", manifest.decoder.num_layers, config.decoder.num_layers
    yield "decoder width", manifest.decoder.hidden_size, config.decoder.hidden_size
    yield "vocabulary", manifest.decoder.vocab_size, config.decoder.vocab_size
    yield "image size", ours.image.output_size, theirs.image.output_size
    yield "sampling", _words(ours.sampling), _words(theirs.sampling)
    yield "sound", _words(ours.sound), _words(theirs.sound)
    yield "stages", _names(ours), _names(theirs)
    values = meta_values(config)
    for mine, other in zip(ours.stages, theirs.stages, strict=True):
        width = manifest.components[mine.name].outputs[0].shape[-1]
        yield f"stage '{mine.name}':", _shape(ours, mine, width), _shape(theirs, other, values[mine.name].shape[-1])
    mine_in, theirs_in = (
        {mode: stages_of((*layout.pieces, *layout.untimed)) for mode, layout in pipeline.prompts.items()}
        for pipeline in (ours, theirs)
    )
    yield "stages in the prompts:", mine_in, theirs_in


def _names(pipeline: Pipeline) -> str:
    return ", ".join(stage.name for stage in pipeline.stages)


def _shape(pipeline: Pipeline, stage: Stage, width: int | str) -> str:
    """How a stage is called and what it gives, in words."""
    takes = ", ".join(value.source for value in stage.inputs)
    tokens = " or ".join(map(str, pipeline.token_counts(stage.name)))
    return f"{_words(stage.unit)}, of {takes} to {tokens} tokens of width {width}"


def _words(record: object) -> str:
    """A record with its fields by name, for a message; ``none`` for ``None``."""
    fields = msgspec.to_builtins(record) if record is not None else {}
    return ", ".join(f"{name} {value}" for name, value in fields.items()) or "none"


def _keep(manifest: Manifest) -> float | None:
    """The share of tokens that the bundle keeps unless told otherwise; ``None`` where it merges none."""
    merging = manifest.pipeline.merging
    return None if merging is None else merging.variants[0].keep


def environment(bundle: Bundle, source: CaptionerCheckpoint) -> dict[str, str | int | None]:
    """What was compared (hashes), how, and with which versions. This hashes the checkpoint."""
    decoder = bundle.manifest.components["decoder"]
    adapter = source.adapter
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "bundle_sha256": bundle.sha256,
        "checkpoint_sha256": source.checkpoint.fingerprint(),
        "adapter_sha256": None if adapter is None else adapter.fingerprint(),
        "weights": decoder.weights,
        "block_size": decoder.block_size,
        "accuracy_level": accuracy_level(bundle),
        "intertitle": __version__,
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _provenance_notes(manifest: Manifest, compared: dict[str, str | int | None]) -> Iterator[str]:
    """Where the reference is not the one that the bundle was compiled from. ``compared``: see ``environment``."""
    made, adapter = manifest.provenance, compared["adapter_sha256"]
    if made.checkpoint_sha256 != compared["checkpoint_sha256"]:
        yield f"the reference is not the checkpoint that the bundle was compiled from ({made.checkpoint})"
    if made.adapter_sha256 == adapter:
        return
    if adapter is None:
        yield f"the bundle has the adapter {made.adapter} merged, the reference none: give it with --adapter"
    elif made.adapter_sha256 is None:
        yield "the reference has an adapter merged, the bundle none: leave --adapter out"
    else:
        yield f"the reference's adapter is not the one that was merged into the bundle ({made.adapter})"


class _Check:
    """The stages, clip by clip."""

    _result: ClipResult

    def __init__(
        self,
        captioner: Captioner,
        reference: Reference,
        original: Reference | None,
        max_new_tokens: int,
        report: Callable[[str], None],
    ) -> None:
        self._captioner, self._encoder = captioner, captioner.encoder
        self._reference, self._original = reference, original
        self._max_new_tokens, self._report = max_new_tokens, report
        manifest = captioner.manifest
        self._pipeline = manifest.pipeline
        # With float16 matmuls the activations are not rounded to int8.
        quantized = FORMATS[manifest.components["decoder"].weights].quantized
        rounds = quantized and manifest.cache_dtype == "float32"
        self._exact = ExactDecoder(captioner.bundle) if rounds else None
        self._stages = Stages()

    def run(self, name: str, clip: Clip) -> ClipResult:
        self._result = result = ClipResult(name, clip.mode)
        prompt = self._prompt(clip, self._blocks(clip))
        caption = self._reference.greedy(prompt, self._max_new_tokens)
        self._decoder(prompt, caption)
        tokens = self._tokens(clip, caption)
        if self._original is not None:
            result.drift = self._drift(self._original, prompt, caption, tokens)
        return result

    def _blocks(self, clip: Clip) -> dict[str, list[FloatArray]]:
        """Compare the preprocessing and the stages; return the reference's blocks ``[tokens, H]`` of the prompt."""
        theirs, given = self._preprocessed(clip)
        pieces = choose_pieces(self._reference.config.prompts[clip.mode], clip.timing)
        for stage in self._pipeline.needed(*stages_of(pieces)):
            tokens = self._reference.run(stage.name, theirs)
            mine = self._encoder.run_stage(stage, [given[value.source] for value in stage.inputs], self._stages)
            self._hold(stage.name, mine.expand(), tokens)
            self._variants(stage, theirs)
            # The next stages of the bundle get the reference's tokens, with the units that it took for equal.
            theirs[stage.name], given[stage.name] = tokens, _alike(tokens, mine.order)
        apart = unit_slots(pieces)
        return {
            name: list(theirs[name]) if name in apart else [theirs[name].reshape(-1, theirs[name].shape[-1])]
            for name in stages_of(pieces)
        }

    def _preprocessed(self, clip: Clip) -> tuple[dict[str, FloatArray], dict[str, Units]]:
        """Compare pixels and filter bank; return the reference's, for every place of the clip and as distinct units."""
        theirs: dict[str, FloatArray] = {}
        given: dict[str, Units] = {}
        if clip.frames is not None:
            assert clip.order is not None
            pixels = self._reference.pixels(clip.frames)
            self._hold("pixels", preprocess_frames(clip.frames, self._pipeline.image), pixels)
            given[PIXELS] = Units(pixels, clip.order)
            theirs[PIXELS] = given[PIXELS].expand()
        if clip.sound is not None:
            assert self._pipeline.sound is not None
            fbank = self._reference.fbank(clip.sound)
            self._hold("fbank", sound_features(clip.sound, self._pipeline.sound), fbank)
            theirs[SOUND] = fbank[np.newaxis]
            given[SOUND] = Units.all_distinct(theirs[SOUND])
        return theirs, given

    def _variants(self, stage: Stage, theirs: dict[str, FloatArray]) -> None:
        """Compare the other forms of a stage that merges tokens, on a few units."""
        for variant in stage.variants[1:]:
            some = {value.source: theirs[value.source][:2] for value in stage.inputs}
            inputs = [Units.all_distinct(values) for values in some.values()]
            mine = self._encoder.run_stage(stage, inputs, self._stages, variant).expand()
            wanted = self._reference.run(stage.name, some, variant.keep)
            self._hold(f"{stage.name}, {Share(variant.keep)}", mine, wanted)

    def _prompt(self, clip: Clip, blocks: dict[str, list[FloatArray]]) -> FloatArray:
        """Compare the prompts, each from its own layout and table; return the reference's ``[S, H]``."""
        config, tokenizer = self._reference.config, self._captioner.tokenizer
        places = 0 if clip.order is None else len(clip.order)
        pieces = choose_pieces(config.prompts[clip.mode], clip.timing)
        units = {name: len(found) for name, found in blocks.items()}
        built = build_prompt(tokenizer, pieces, config.default_instruction, units, clip.timing, places)
        prompt = joined(
            [blocks[part.stage][part.unit or 0] if isinstance(part, Slot) else part for part in built],
            self._reference.embed,
        )
        pieces = choose_pieces(self._pipeline.prompts[clip.mode], clip.timing)
        encoded = EncodedClip(clip.mode, blocks, pieces, places, clip.timing)
        own = self._encoder.prompt_embeds(encoded, self._captioner.manifest.default_instruction)
        self._hold("embeddings", own, prompt)
        return prompt

    def _decoder(self, prompt: FloatArray, caption: GreedyCaption) -> None:
        """Compare the logits of the reference's prompt and then of its greedy tokens, step by step."""
        if self._exact is None:
            logits = self._shipped(prompt, caption)
        else:
            logits = _along(self._exact.open(1, len(prompt) + len(caption.tokens)), prompt, caption)
        self._hold("prefill logits", logits[:1], caption.logits[:1])
        if len(logits) > 1:
            self._hold("decode logits", logits[1:], caption.logits[1:])

    def _tokens(self, clip: Clip, caption: GreedyCaption) -> list[int]:
        """Run the bundle from end to end, compare and return its greedy tokens."""
        self._say("greedy tokens")
        manifest = self._captioner.manifest
        prompt = self._encoder.prompt_embeds(self._encoder.encode(clip, self._stages), manifest.default_instruction)
        mine = [token.id for token in self._captioner.generate_tokens(prompt, self._max_new_tokens)]
        penalty = self._reference.config.generation.repetition_penalty
        self._result.tokens = compare_tokens(mine, caption, penalty, self._tie())
        return mine

    def _tie(self) -> float:
        """The difference of two logits below which they count as a tie.

        Rounded activations swap an expert where a router likes two of them nearly as much, and the logits that follow
        may be any. Then no difference of tokens is an error: ``decode logits`` are held with float32 matmuls.
        """
        swaps = self._exact is not None and self._reference.config.decoder.num_experts > 0
        return math.inf if swaps else near_tie(self._captioner.manifest)

    def _drift(
        self, original: Reference, prompt: FloatArray, caption: GreedyCaption, tokens: list[int]
    ) -> Drift | None:
        """The drift; ``None`` if a logit is not finite."""
        self._say("drift from the float32 weights")
        rounded, exact = self._shipped(prompt, caption), original.greedy(prompt, self._max_new_tokens)
        logits = self._shipped(prompt, exact)
        if not (np.isfinite(rounded).all() and np.isfinite(logits).all()):
            return None
        return measure_drift(logits, tokens, exact, relative_error(rounded, caption.logits))

    def _shipped(self, prompt: FloatArray, caption: GreedyCaption) -> FloatArray:
        """Logits ``[N, V]`` along a caption, from the decoder as it is in the bundle."""
        return _along(self._captioner.open_inference(len(prompt) + len(caption.tokens)), prompt, caption)

    def _hold(self, stage: str, mine: FloatArray, theirs: FloatArray) -> None:
        """Compare one stage's output with the reference's and keep the result."""
        result = compare_stage(stage, mine, theirs, tolerance(stage, self._captioner.manifest))
        self._result.stages.append(result)
        self._say(f"{stage} {result.problem or format(result.error, '.1e')}")

    def _say(self, text: str) -> None:
        self._report(f"{self._result.clip}: {text}")


def _alike(values: FloatArray, order: npt.NDArray[np.int64]) -> Units:
    """Units ``[units, ...]`` of which those that have one number in ``order`` are taken for equal."""
    if len(order) != len(values):
        return Units.all_distinct(values)
    _, first, places = np.unique(order, return_index=True, return_inverse=True)
    return Units(values[first], places.reshape(-1))


def _along(inference: Inference, prompt: FloatArray, caption: GreedyCaption) -> FloatArray:
    """Logits ``[N, V]`` where a decoder predicts each token of a caption, one step at a time."""
    rows = [inference.prefill(0, prompt)[0]]
    rows += [inference.step(np.array([token]))[0].copy() for token in caption.tokens[:-1]]
    return np.stack(rows)
