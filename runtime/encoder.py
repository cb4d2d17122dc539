"""From a clip to the decoder's input: towers, connector, and the splicing of their tokens into the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .bundle import Bundle
from .clip import Clip
from .inference import FloatArray
from .ort import OrtComponent
from .preprocess.fbank import kaldi_fbank
from .preprocess.image import preprocess_frames
from .text import build_prompt
from .timing import Stages

#: Patch tokens that one run of the vision tower takes in; more would cost memory and save no time on a CPU.
_VISION_TOKENS = 1024


@dataclass(frozen=True)
class EncodedClip:
    """The tokens of a clip, ready for any number of prompts.

    ``blocks``: float32 ``[tokens, H]`` each, one for every place that the prompt template leaves for the clip.
    """

    mode: str
    blocks: list[FloatArray]


class Encoder:
    """The encoders of a bundle. Sessions open at first use, so that a silent clip never loads the audio tower."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, threads: int | None = None) -> None:
        self._bundle, self._tokenizer, self._threads = bundle, tokenizer, threads
        self._components: dict[str, OrtComponent] = {}

    def encode(self, clip: Clip, stages: Stages) -> EncodedClip:
        """Run the encoders that the clip's mode needs."""
        visual = audio = None
        if clip.frames is not None:
            visual = self.visual_tokens(clip, stages)
        if clip.sound is not None:
            with stages.measure("fbank"):
                fbank = kaldi_fbank(clip.sound)
            audio = self.audio_tokens(fbank, stages)
        return EncodedClip(clip.mode, splice_blocks(visual, audio))

    def visual_tokens(self, clip: Clip, stages: Stages) -> FloatArray:
        """``[blocks, tokens, H]`` of the clip's frames."""
        assert clip.frames is not None
        assert clip.order is not None
        with stages.measure("preprocess"):
            pixels = preprocess_frames(clip.frames, self._bundle.manifest.preprocessing.image)
        return self.connect(self.features(pixels, stages)[clip.order], stages)

    def features(self, pixels: FloatArray, stages: Stages) -> FloatArray:
        """Tower features ``[N, P, D]`` of ``pixels [N, 3, S, S]``, a few frames at a time."""
        tower = self._component("vision", stages)
        with stages.measure("vision"):
            parts = [tower(pixels[:1])]
            batch = max(1, _VISION_TOKENS // parts[0].shape[1])
            for start in range(1, len(pixels), batch):
                stages.report("vision", start, len(pixels))
                parts.append(tower(pixels[start : start + batch]))
            return np.concatenate(parts)

    def connect(self, features: FloatArray, stages: Stages) -> FloatArray:
        """Visual tokens ``[blocks, tokens, H]`` of the tower features ``[T, P, D]`` of one clip."""
        connector = self._component("connector", stages)
        with stages.measure("connector"):
            return connector(features)

    def audio_tokens(self, fbank: FloatArray, stages: Stages) -> FloatArray:
        """``[tokens, H]`` of a filter bank ``[frames, mel]``."""
        branch = self._component("audio", stages)
        with stages.measure("audio"):
            return branch(fbank[np.newaxis])[0]

    def prompt_embeds(self, clip: EncodedClip, instruction: str) -> FloatArray:
        """The decoder's input ``[S, H]``: the template's text with the clip's blocks in their places."""
        spec = self._bundle.manifest.prompts[clip.mode]
        chunks = build_prompt(self._tokenizer, spec, instruction, len(clip.blocks))
        pieces = []
        for index, chunk in enumerate(chunks):
            pieces.append(self._bundle.embed(np.array(chunk, np.int64)))
            if index < len(clip.blocks):
                pieces.append(clip.blocks[index])
        return np.concatenate(pieces)

    def _component(self, name: str, stages: Stages) -> OrtComponent:
        if name not in self._components:
            with stages.measure("load"):
                graph = self._bundle.file(self._bundle.manifest.components[name].graph)
                self._components[name] = OrtComponent(graph, self._threads)
        return self._components[name]


def splice_blocks(visual: FloatArray | None, audio: FloatArray | None) -> list[FloatArray]:
    """Blocks of the prompt: each row of ``visual [blocks, tokens, H]``; sound follows the last one without a
    separator (VideoLLaMA2 ``prepare_inputs_labels_for_multimodal``), or stands alone."""
    blocks = [] if visual is None else list(visual)
    if audio is not None:
        blocks = [*blocks[:-1], np.concatenate([*blocks[-1:], audio])]
    return blocks
