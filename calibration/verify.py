"""Does a bundle compute what its checkpoint computes? The comparison goes stage by stage: the answer names a component.

Every stage of the bundle gets the *reference's* input of that stage, so an error shows in the stage where it arises and
not in all later ones. Only the greedy tokens run the bundle from end to end. A quantized decoder is compared with the
reference with the same rounded weights and runs with float32 matmuls: are graph and weights right? The effect of the
rounding of weights and activations is measured separately (``Drift``) and does not change the verdict. Both sides get
the same sampled frames and sound and use the bundle's tokenizer.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from .._version import __version__
from ..contract.formats import FORMATS
from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models.connectors import SpatialTemporalConnector
from ..models.vision import VisionTower
from ..runtime.bundle import Bundle, Manifest
from ..runtime.captioner import Captioner
from ..runtime.clip import Clip
from ..runtime.encoder import EncodedClip, splice_blocks
from ..runtime.inference import FloatArray, Inference
from ..runtime.preprocess.fbank import kaldi_fbank
from ..runtime.preprocess.image import preprocess_frames
from ..runtime.text import PromptSpec, build_prompt
from ..runtime.timing import Stages
from .comparison import (
    ClipResult,
    Drift,
    Report,
    compare_stage,
    compare_tokens,
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
    source = open_checkpoint(Path(checkpoint), None if adapter is None else Path(adapter), manifest.visual.keep)
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
    verdict, divergent = conclude(clips)
    return Report(verdict, divergent, captioner.manifest.weights, clips)


def check_same_model(manifest: Manifest, reference: Reference) -> None:
    """``OptionError`` if bundle and checkpoint have different families or shapes."""
    config = reference.config
    if manifest.family != config.family:
        raise OptionError(f"the bundle is a {manifest.family} captioner, the reference a {config.family} one")
    vision, connector = manifest.components["vision"], reference.checkpoint.module("connector")
    windows = (1, 0)
    if isinstance(connector, SpatialTemporalConnector):
        windows = (connector.time_kernel, connector.time_padding)
    shapes = {
        "decoder layers": (manifest.decoder.num_layers, config.decoder.num_layers),
        "decoder width": (manifest.decoder.hidden_size, config.decoder.hidden_size),
        "vocabulary": (manifest.decoder.vocab_size, config.decoder.vocab_size),
        "image size": (vision.inputs[0].shape[-1], config.vision.image_size),
        "tower width": (vision.outputs[0].shape[-1], config.vision.hidden_size),
        "number of frames": (manifest.preprocessing.num_frames, config.num_frames),
        "frames that the connector joins": ((manifest.visual.time_kernel, manifest.visual.time_padding), windows),
        "audio branch": ("audio" in manifest.components, config.audio is not None),
    }
    for what, (mine, theirs) in shapes.items():
        if mine != theirs:
            raise OptionError(f"not the same model: {what} {mine} in the bundle, {theirs} in the reference")


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
        # With float16 matmuls the activations are not rounded to int8.
        quantized = FORMATS[manifest.components["decoder"].weights].quantized
        rounds = quantized and manifest.cache_dtype == "float32"
        self._exact = ExactDecoder(captioner.bundle) if rounds else None
        self._stages = Stages()

    def run(self, name: str, clip: Clip) -> ClipResult:
        self._result = result = ClipResult(name, clip.mode)
        visual = None if clip.frames is None else self._visual(clip)
        audio = None if clip.sound is None else self._audio(clip.sound)
        prompt = self._prompt(EncodedClip(clip.mode, splice_blocks(visual, audio)))
        caption = self._reference.greedy(prompt, self._max_new_tokens)
        self._decoder(prompt, caption)
        tokens = self._tokens(clip, caption)
        if self._original is not None:
            result.drift = self._drift(self._original, prompt, caption, tokens)
        return result

    def _visual(self, clip: Clip) -> FloatArray:
        """Compare pixels, vision and connector; return the reference's visual tokens ``[blocks, tokens, H]``."""
        assert clip.frames is not None
        assert clip.order is not None
        pixels = self._reference.pixels(clip.frames)
        self._hold("pixels", preprocess_frames(clip.frames, self._captioner.manifest.preprocessing.image), pixels)
        features = self._reference.run("vision", pixels)
        self._hold("vision", self._encoder.features(pixels, self._stages), features)
        self._merging(pixels[:2])
        # The reference's connector runs as a whole: it does not skip equal frames and windows.
        tokens = self._reference.run("connector", features[clip.order])
        frames = self._frame_tokens(features)
        self._hold("connector", self._encoder.connect(frames, clip.order, self._stages), tokens)
        return tokens

    def _merging(self, pixels: FloatArray) -> None:
        """Compare the other ratios of merging of the tower on a few frames."""
        for ratio in self._captioner.manifest.visual.ratios[1:]:
            with torch.device("meta"):
                tower = VisionTower(replace(self._reference.config.vision, keep=ratio.keep))
            tower.load_state_dict(self._reference.module("vision").state_dict(), assign=True)
            mine = self._encoder.features(pixels, self._stages, ratio)
            self._hold(f"vision, ratio {ratio.keep:g}", mine, _forward(tower.eval(), pixels))

    def _frame_tokens(self, features: FloatArray) -> FloatArray:
        """Compare the part of the connector per frame; return the reference's output ``[N, P, C]``."""
        connector = self._reference.module("connector")
        part = connector.frame_part() if isinstance(connector, SpatialTemporalConnector) else None
        if part is None:
            return features
        tokens = _forward(part, features)
        self._hold("frame connector", self._encoder.frame_tokens(features, self._stages), tokens)
        return tokens

    def _audio(self, sound: FloatArray) -> FloatArray:
        """Compare filter bank and audio; return the reference's audio tokens ``[tokens, H]``."""
        fbank = self._reference.fbank(sound)
        self._hold("fbank", kaldi_fbank(sound), fbank)
        tokens = self._reference.run("audio", fbank[np.newaxis])[0]
        self._hold("audio", self._encoder.audio_tokens(fbank, self._stages), tokens)
        return tokens

    def _prompt(self, encoded: EncodedClip) -> FloatArray:
        """Compare the prompts, each from its own template and table; return the reference's ``[S, H]``."""
        config = self._reference.config
        spec = PromptSpec(**asdict(config.prompts[encoded.mode]))
        chunks = build_prompt(
            self._captioner.tokenizer, spec, config.default_instruction, num_blocks=len(encoded.blocks)
        )
        pieces = [self._reference.embed(np.array(chunk, np.int64)) for chunk in chunks]
        for index, block in enumerate(encoded.blocks):
            pieces.insert(2 * index + 1, block)
        prompt = np.concatenate(pieces)
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
        self._result.tokens = compare_tokens(mine, caption, penalty, near_tie(manifest))
        return mine

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


def _forward(module: torch.nn.Module, value: FloatArray) -> FloatArray:
    with torch.no_grad():
        return module(torch.from_numpy(value)).numpy()


def _along(inference: Inference, prompt: FloatArray, caption: GreedyCaption) -> FloatArray:
    """Logits ``[N, V]`` where a decoder predicts each token of a caption, one step at a time."""
    rows = [inference.prefill(0, prompt)[0]]
    rows += [inference.step(np.array([token]))[0].copy() for token in caption.tokens[:-1]]
    return np.stack(rows)
