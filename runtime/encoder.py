"""From a clip to the decoder's input: towers, connector, and the splicing of their tokens into the prompt.

Shapes: U distinct frames of a clip, T places that the model looks at, P tokens of a frame, D tower width, C connector
width, H decoder width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..errors import ClosedError, OptionError
from .backends import Backend, OrtBackend
from .bundle import Bundle, MergingRatio
from .clip import Clip
from .compression import merge_tokens
from .contrast import Contrast, diffuse, sparse_places
from .inference import FloatArray
from .preprocess.fbank import kaldi_fbank
from .preprocess.image import preprocess_frames
from .text import build_prompt
from .timing import Stages
from .viewing import Share, TokenBudget

_log = logging.getLogger(__name__)

#: Patch tokens that one run of tower or connector takes in; more would cost memory and save no time on a CPU.
_RUN_TOKENS = 1024

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedClip:
    """The tokens of a clip, ready for any number of prompts.

    ``blocks``: float32 ``[tokens, H]`` each, one for every place that the prompt template leaves for the clip.
    ``notes``: what was done other than asked, in words. ``visual_tokens``: the budget it was encoded with.
    ``features``: per distinct frame ``[U, P, C]``, where they were kept for a contrast.
    """

    mode: str
    blocks: list[FloatArray]
    notes: list[str] = field(default_factory=list)
    visual_tokens: TokenBudget | None = None
    features: FloatArray | None = None


class Encoder:
    """The encoders of a bundle. Sessions open at first use, so that a silent clip never loads the audio tower.

    ``staged``: one component at a time stays loaded.
    """

    def __init__(
        self, bundle: Bundle, tokenizer: Tokenizer, backend: Backend | None = None, staged: bool = False
    ) -> None:
        self._bundle, self._tokenizer = bundle, tokenizer
        self._backend: Backend | None = OrtBackend(bundle) if backend is None else backend
        self._visual, self._staged = bundle.manifest.visual, staged
        self._components: dict[str, tuple[str, Callable[[FloatArray], FloatArray]]] = {}

    def encode(
        self,
        clip: Clip,
        stages: Stages,
        *,
        visual_tokens: TokenBudget | None = None,
        keep_features: bool = False,
    ) -> EncodedClip:
        """Run the encoders that the clip's mode needs, once for each distinct frame.

        ``visual_tokens``: how many visual tokens the decoder gets; ``None`` is what the model was made for. A tower
        that merges tokens takes a compiled ratio, for other families ``compression`` merges what leaves the connector.
        ``keep_features``: keep the features of the frames for ``contrast``. ``OptionError`` for a budget that no
        compiled ratio keeps.
        """
        visual = audio = features = None
        notes: list[str] = []
        if clip.frames is not None:
            assert clip.order is not None
            ratio, notes = self._merging(visual_tokens, len(clip.order))
            features = self.frame_tokens(self.features(self._pixels(clip.frames, stages), stages, ratio), stages)
            visual = self._compress(self.connect(features, clip.order, stages), visual_tokens, stages)
        if clip.sound is not None:
            with stages.measure("fbank"):
                fbank = kaldi_fbank(clip.sound)
            audio = self.audio_tokens(fbank, stages)
        blocks = splice_blocks(visual, audio)
        return EncodedClip(clip.mode, blocks, notes, visual_tokens, features if keep_features else None)

    def block_lengths(self, clip: Clip, visual_tokens: TokenBudget | None = None) -> list[int]:
        """Tokens of each block that ``encode`` would give for a clip, without running an encoder."""
        lengths: list[int] = []
        if clip.frames is not None:
            assert clip.order is not None
            visual, places = self._visual, len(clip.order)
            ratio, _ = self._merging(visual_tokens, places)
            blocks, tokens = visual.blocks, (visual if ratio is None else ratio).tokens_per_block
            if visual.per_frame:
                blocks = places
            elif not visual.pooled:
                kernel, padding = visual.time_kernel, visual.time_padding
                whole = np.arange(self._bundle.manifest.preprocessing.num_frames)
                slots, usual = (len(time_windows(order, kernel, padding)) for order in (clip.order, whole))
                tokens = tokens * slots // usual
            lengths = [self._merged_length(visual_tokens, blocks, tokens)] * blocks
        if clip.sound is not None:
            spec = self._bundle.manifest.preprocessing.audio
            assert spec is not None
            lengths = [*lengths[:-1], sum(lengths[-1:]) + spec.num_tokens]
        return lengths

    def contrast(self, clip: Clip, encoded: EncodedClip, contrast: Contrast, stages: Stages) -> EncodedClip:
        """The contrasted view of a clip that ``encode`` gave ``encoded`` for, its sound taken over.

        Temporal views use the features that ``encoded`` kept. The budget of visual tokens is the same, a number of
        them being that number's share for the places that are left. ``OptionError`` for a clip without pictures.
        """
        if clip.order is None:
            raise OptionError("a contrast changes the pictures, and this clip has none")
        setting, notes, order = encoded.visual_tokens, [], clip.order
        ratio, _ = self._merging(setting, len(order))
        if contrast.kind == "noise":
            assert clip.frames is not None
            with stages.measure("noise"):
                pixels = diffuse(self._pixels(clip.frames, stages), contrast.noise_step, contrast.seed)
            features = self.frame_tokens(self.features(pixels, stages, ratio), stages)
        else:
            least = self._visual.time_kernel - 2 * self._visual.time_padding
            order = clip.order[sparse_places(len(clip.order), least)]
            if len(order) == len(clip.order):
                notes.append("too few frames for a contrast in time: it is with the clip itself")
            if setting is not None:
                setting = setting.scaled(len(order), len(clip.order))
            features = encoded.features
            if features is None:
                assert clip.frames is not None
                distinct, order = np.unique(order, return_inverse=True)
                pixels = self._pixels(clip.frames[distinct], stages)
                features = self.frame_tokens(self.features(pixels, stages, ratio), stages)
        visual = self._compress(self.connect(features, order, stages), setting, stages)
        audio = None
        if clip.sound is not None:
            spec = self._bundle.manifest.preprocessing.audio
            assert spec is not None
            audio = encoded.blocks[-1][-spec.num_tokens :]
        return EncodedClip(encoded.mode, splice_blocks(visual, audio), notes, encoded.visual_tokens)

    def features(self, pixels: FloatArray, stages: Stages, ratio: MergingRatio | None = None) -> FloatArray:
        """Tower features ``[N, P, D]`` of ``pixels [N, 3, S, S]``, a few frames at a time.

        ``ratio``: which of the compiled ratios of merging, the default one when ``None``.
        """
        tower = self._component("vision", stages, None if ratio is None else ratio.graph)
        with stages.measure("vision"):
            parts = [tower(pixels[:1])]
            batch = max(1, _RUN_TOKENS // parts[0].shape[1])
            for start in range(1, len(pixels), batch):
                stages.report("vision", start, len(pixels))
                parts.append(tower(pixels[start : start + batch]))
            return np.concatenate(parts)

    def frame_tokens(self, features: FloatArray, stages: Stages) -> FloatArray:
        """What the connector does to each frame alone: ``[N, P, C]`` of tower features ``[N, P, D]``."""
        if "frame_connector" not in self._bundle.manifest.components:
            return features
        framewise = self._component("frame_connector", stages)
        with stages.measure("connector"):
            batch = max(1, _RUN_TOKENS // features.shape[1])
            parts = []
            for start in range(0, len(features), batch):
                stages.report("connector", start, len(features))
                parts.append(framewise(features[start : start + batch]))
            return np.concatenate(parts)

    def connect(self, frames: FloatArray, order: Order, stages: Stages) -> FloatArray:
        """Visual tokens ``[blocks, tokens, H]`` of a clip that shows ``frames [U, P, C]`` in the order ``[T]``.

        What is alike is computed once: a frame where each is a block, else a window of frames.
        """
        connector, visual = self._component("connector", stages), self._visual
        with stages.measure("connector"):
            if visual.pooled:
                return connector(frames[order])
            rows = order[:, np.newaxis]
            if not visual.per_frame:
                rows = time_windows(order, visual.time_kernel, visual.time_padding)
            distinct, places = np.unique(rows, axis=0, return_inverse=True)
            batch, parts = max(1, _RUN_TOKENS // (distinct.shape[1] * frames.shape[1])), []
            for start in range(0, len(distinct), batch):
                stages.report("connector", start, len(distinct))
                some = distinct[start : start + batch]
                windows = frames[some]
                windows[some < 0] = 0
                parts.append(connector(windows[:, 0] if visual.per_frame else windows))
            tokens = np.concatenate(parts)[places.reshape(-1)]
            return tokens if visual.per_frame else tokens.reshape(1, -1, tokens.shape[-1])

    def audio_tokens(self, fbank: FloatArray, stages: Stages) -> FloatArray:
        """``[tokens, H]`` of a filter bank ``[frames, mel]``."""
        branch = self._component("audio", stages)
        with stages.measure("audio"):
            return branch(fbank[np.newaxis])[0]

    def prompt_pieces(self, encoded: EncodedClip, instruction: str) -> list[FloatArray | list[int]]:
        """The prompt in order: the template's text as lists of token ids, the clip's blocks ``[tokens, H]`` between."""
        spec = self._bundle.manifest.prompts[encoded.mode]
        chunks = build_prompt(self._tokenizer, spec, instruction, len(encoded.blocks))
        pieces: list[FloatArray | list[int]] = []
        for index, chunk in enumerate(chunks):
            pieces.append(chunk)
            if index < len(encoded.blocks):
                pieces.append(encoded.blocks[index])
        return pieces

    def prompt_embeds(self, encoded: EncodedClip, instruction: str) -> FloatArray:
        """The decoder's input ``[S, H]``: the pieces of the prompt, text through the embedding table."""
        pieces = self.prompt_pieces(encoded, instruction)
        return np.concatenate([self._bundle.embed(piece) if isinstance(piece, list) else piece for piece in pieces])

    def _pixels(self, frames: npt.NDArray[np.uint8], stages: Stages) -> FloatArray:
        with stages.measure("preprocess"):
            return preprocess_frames(frames, self._bundle.manifest.preprocessing.image)

    def _compress(self, tokens: FloatArray, setting: TokenBudget | None, stages: Stages) -> FloatArray:
        """``tokens [blocks, tokens, H]`` merged to the setting, where the tower has not merged them."""
        blocks, available = tokens.shape[:2]
        count = self._merged_length(setting, blocks, available)
        if count == available:
            return tokens
        with stages.measure("compress"):
            return np.stack([merge_tokens(block, count)[0] for block in tokens])

    def _merged_length(self, setting: TokenBudget | None, blocks: int, available: int) -> int:
        """Tokens of each block after ``_compress``."""
        if setting is None or self._visual.ratios:
            return available
        return max(1, setting.of(blocks * available) // blocks)

    def _merging(self, setting: TokenBudget | None, num_frames: int) -> tuple[MergingRatio | None, list[str]]:
        """The compiled ratio of merging that a setting comes to, and what to say about it; None without merging."""
        ratios = self._visual.ratios
        if not ratios or setting is None:
            return (ratios[0] if ratios else None), []
        spare = {ratio: setting.spare(ratio.keep, ratio.tokens_per_block * num_frames) for ratio in ratios}
        fitting = [ratio for ratio in ratios if spare[ratio] >= 0]
        exact = next((ratio for ratio in fitting if spare[ratio] == 0), None)
        if exact is not None:
            return exact, []
        if not fitting:
            there = ", ".join(f"{Share(r.keep)} ({r.tokens_per_block * num_frames} tokens)" for r in ratios)
            raise OptionError(
                f"no compiled ratio of merging gives as few visual tokens as {setting}; there are {there}"
            )
        ratio = max(fitting, key=lambda ratio: ratio.keep)
        count = ratio.tokens_per_block * num_frames
        note = f"visual tokens {setting}: merged at the next lower compiled ratio, {Share(ratio.keep)} ({count} tokens)"
        # Of a clip that has no more tokens than the limit nothing was taken away.
        return ratio, [] if ratio.keep == 1 else [note]

    def release(self) -> None:
        """Unload the components; they are loaded again when they are needed."""
        if self._components:
            _log.debug("released: %s", ", ".join(self._components))
        self._components.clear()

    def load(self, stages: Stages) -> None:
        """Load all components now, in their default form; a staged encoder keeps the last one only."""
        ratios = self._visual.ratios
        for name in self._bundle.manifest.components:
            if name not in ("decoder", "selection"):
                self._component(name, stages, ratios[0].graph if ratios and name == "vision" else None)

    def close(self) -> None:
        """Unload the components and let go of the device. What is needed afterwards cannot be loaded."""
        self.release()
        self._backend = None

    def _component(self, name: str, stages: Stages, graph: str | None = None) -> Callable[[FloatArray], FloatArray]:
        """The session of a component, or of another graph of it: the last one is kept, each holds all the weights."""
        graph = self._bundle.manifest.components[name].graph if graph is None else graph
        held = self._components.get(name)
        if held is None or held[0] != graph:
            del held
            self._components.pop(name, None)
            if self._staged:
                self.release()
            if self._backend is None:
                raise ClosedError("the captioner was closed: load it again")
            started = time.perf_counter()
            with stages.measure("load"):
                held = self._components[name] = (graph, self._backend.component(name, graph))
            _log.debug("loaded %s in %.2f s", graph, time.perf_counter() - started)
        return held[1]


def time_windows(order: Order, kernel: int, padding: int) -> Order:
    """The windows of a convolution over time whose stride is its kernel, as frame numbers ``[slots, kernel]``.

    -1 is an empty frame: ``padding`` of them in front of ``order [T]`` and behind it. What fills no window is dropped.
    """
    empty = np.full(padding, -1, np.int64)
    padded = np.concatenate((empty, order, empty))
    return padded[: len(padded) // kernel * kernel].reshape(-1, kernel)


def splice_blocks(visual: FloatArray | None, audio: FloatArray | None) -> list[FloatArray]:
    """Blocks of the prompt: each row of ``visual [blocks, tokens, H]``; sound follows the last one without a
    separator (VideoLLaMA2 ``prepare_inputs_labels_for_multimodal``), or stands alone."""
    blocks = [] if visual is None else list(visual)
    if audio is not None:
        blocks = [*blocks[:-1], np.concatenate([*blocks[-1:], audio])]
    return blocks
