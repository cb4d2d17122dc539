"""The captioner: a bundle and a clip in, a caption out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..errors import OptionError, TargetError
from .bundle import Bundle
from .clip import Clip, array_clip, read_clip
from .decoding import Decoding, FinishReason, Token, generate, log_likelihoods, resolve
from .encoder import EncodedClip, Encoder
from .inference import FloatArray, Inference
from .ort import OrtDecoder
from .text import IncrementalDecoder, StopStrings
from .timing import Progress, Stages

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Caption:
    """A caption and how it came about.

    ``token_ids`` and ``token_logprobs`` (natural log, under the model's own distribution) include the end-of-sequence
    token if one was generated. ``finish_reason``: ``stop`` (end of sequence), ``length`` or ``stop_string``.
    ``timings``: seconds per stage. ``notes``: what was substituted for something the clip lacks. ``prompt_tokens``:
    text, visual and audio tokens before the first generated one.
    """

    text: str
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: FinishReason
    mode: str
    prompt_tokens: int
    timings: dict[str, float]
    notes: list[str]
    seconds: float | None
    """Length of the clip; ``None`` for images and arrays of frames."""

    @property
    def mean_logprob(self) -> float:
        """Mean token log-likelihood: the confidence that LeanPO uses as its reward (FACTS 3)."""
        return float(np.mean(self.token_logprobs))


class CaptionStream:
    """Pieces of text as they are generated; ``caption`` is there once the iteration has ended.

    Closing the stream (or leaving its ``with`` block) stops the generation.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.caption: Caption | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> CaptionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


class Captioner:
    """A bundle opened for captioning. Not safe for use from several threads at once."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.tokenizer = Tokenizer.from_file(os.fspath(bundle.file("tokenizer.json")))
        self.encoder = Encoder(bundle, self.tokenizer, threads)
        self._threads = threads
        self._decoder: OrtDecoder | None = None

    @classmethod
    def load(
        cls, path: Source, device: str = "auto", threads: int | None = None, progress: Progress | None = None
    ) -> Captioner:
        """Open a bundle on a device (``auto`` or ``cpu`` today).

        ``threads``: processor threads of each session, one a core when ``None``. ``progress`` hears of the bytes that
        are hashed when a bundle is opened for the first time.
        Raises ``BundleError`` for a bundle that is incomplete, corrupt or tampered with, ``TargetError`` for a device
        that cannot run it.
        """
        report = Stages(progress).report
        bundle = Bundle.open(path, progress=lambda done, total: report("checking the bundle", done, total))
        if device not in ("auto", "cpu"):
            raise TargetError(f"device '{device}' is not supported yet; this version runs on: cpu")
        return cls(bundle, threads)

    @property
    def per_frame(self) -> bool:
        """Whether the prompt has a block for each frame (AuroraCap) instead of one for the clip."""
        return self.manifest.visual.per_frame

    def caption(
        self,
        source: Source | None = None,
        *,
        prompt: str | None = None,
        audio: bool = True,
        frames: npt.ArrayLike | None = None,
        waveform: npt.ArrayLike | None = None,
        sample_rate: int | None = None,
        decoding: Decoding | None = None,
        progress: Progress | None = None,
    ) -> Caption:
        """Caption a file, a folder of images, or arrays.

        ``frames`` uint8 ``[T, H, W, 3]`` RGB; ``waveform`` float (in [-1, 1]) or int16, mono or with channels, at
        ``sample_rate`` Hz. ``prompt=None`` is the family's default instruction. ``progress`` hears of every stage:
        ``(name, done, total)``. Raises ``MediaError`` for a clip that cannot be read and ``OptionError`` for arguments
        that do not go together.
        """
        stream = self.stream(
            source,
            prompt=prompt,
            audio=audio,
            frames=frames,
            waveform=waveform,
            sample_rate=sample_rate,
            decoding=decoding,
            progress=progress,
        )
        for _ in stream:
            pass
        assert stream.caption is not None
        return stream.caption

    def stream(
        self,
        source: Source | None = None,
        *,
        prompt: str | None = None,
        audio: bool = True,
        frames: npt.ArrayLike | None = None,
        waveform: npt.ArrayLike | None = None,
        sample_rate: int | None = None,
        decoding: Decoding | None = None,
        progress: Progress | None = None,
    ) -> CaptionStream:
        """Like ``caption``, but text comes piece by piece, each piece complete UTF-8.

        The clip is read and encoded before the first piece.
        """
        stages = Stages(progress)
        clip = self.read(source, audio=audio, frames=frames, waveform=waveform, sample_rate=sample_rate, stages=stages)
        encoded = self.encoder.encode(clip, stages)
        stream = CaptionStream(iter(()))
        stream._pieces = self._generate(encoded, prompt, decoding or Decoding(), stages, clip, stream)
        return stream

    def score(
        self,
        source: Source | None = None,
        text: str = "",
        *,
        prompt: str | None = None,
        audio: bool = True,
        frames: npt.ArrayLike | None = None,
        waveform: npt.ArrayLike | None = None,
        sample_rate: int | None = None,
    ) -> float:
        """Mean log-likelihood (natural log) per token of ``text``, its end-of-sequence token included, as a caption.

        This is LeanPO's reward without its factor (FACTS 3).
        """
        stages = Stages()
        clip = self.read(source, audio=audio, frames=frames, waveform=waveform, sample_rate=sample_rate, stages=stages)
        encoded = self.encoder.encode(clip, stages)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        token_ids.append(self.manifest.generation.eos_token_ids[0])
        embeds = self.encoder.prompt_embeds(encoded, self._instruction(prompt))
        inference = self.open_inference(len(embeds) + len(token_ids) - 1)
        first = inference.prefill(0, embeds)
        values = log_likelihoods(first, token_ids[:1])
        if len(token_ids) > 1:
            following = self.bundle.embed(np.array(token_ids[:-1], np.int64))
            values += log_likelihoods(inference.prefill(0, following, num_logits=len(following)), token_ids[1:])
        return float(np.mean(values))

    def read(
        self,
        source: Source | None = None,
        *,
        audio: bool = True,
        frames: npt.ArrayLike | None = None,
        waveform: npt.ArrayLike | None = None,
        sample_rate: int | None = None,
        stages: Stages | None = None,
    ) -> Clip:
        """The frames and the sound that the captioner would look at and listen to."""
        arrays = frames is not None or waveform is not None
        if (source is None) != arrays:
            raise OptionError("give either a file or arrays (frames=, waveform=), not both and not neither")
        spec = self.manifest.preprocessing
        if source is not None:
            return read_clip(source, spec, self.per_frame, audio, stages or Stages())
        return array_clip(frames, waveform if audio else None, sample_rate, spec, self.per_frame)

    def open_inference(self, max_length: int, stages: Stages | None = None) -> Inference:
        """A decoder with an empty cache for one sequence of ``max_length`` tokens."""
        if self._decoder is None:
            with (stages or Stages()).measure("load"):
                graph = self.bundle.file(self.manifest.components["decoder"].graph)
                self._decoder = OrtDecoder(graph, self.manifest.decoder, self.bundle.embed, self._threads)
        return self._decoder.open(rows=1, max_length=max_length)

    def generate_tokens(self, embeds: FloatArray, decoding: Decoding, stages: Stages) -> Iterator[Token]:
        """Tokens that follow a prompt given as embeddings ``[S, H]``. Time spent by the consumer is not counted."""
        settings = resolve(decoding, self.manifest.generation)
        context = self.manifest.decoder.context_length
        room = context - len(embeds)
        if room < 1:
            raise OptionError(f"the prompt takes {len(embeds)} tokens, the decoder's context is {context}")
        if decoding.max_new_tokens is None:
            # The checkpoint's own limit is a wish that the context may cut short; the caller's is an order.
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        inference = self.open_inference(len(embeds) + settings.max_new_tokens, stages)
        with stages.measure("prefill"):
            logits = inference.prefill(0, embeds, progress=lambda n: stages.report("prefill", n, len(embeds)))[0]
        tokens, generated = generate(inference, logits, settings), 0
        while True:
            with stages.measure("decode"):
                token = next(tokens, None)
            if token is None:
                return
            generated += 1
            stages.report("decode", generated, settings.max_new_tokens)
            yield token

    def _instruction(self, prompt: str | None) -> str:
        return self.manifest.default_instruction if prompt is None else prompt

    def _generate(
        self,
        encoded: EncodedClip,
        prompt: str | None,
        decoding: Decoding,
        stages: Stages,
        clip: Clip,
        stream: CaptionStream,
    ) -> Iterator[str]:
        """Pieces of text; sets ``stream.caption`` at the end."""
        embeds = self.encoder.prompt_embeds(encoded, self._instruction(prompt))
        text, detokenizer, stops = "", IncrementalDecoder(self.tokenizer), StopStrings(decoding.stop)
        tokens: list[Token] = []
        reason: FinishReason = "length"
        for token in self.generate_tokens(embeds, decoding, stages):
            tokens.append(token)
            if token.is_eos:
                reason = "stop"
                break
            piece, stopped = stops.push(detokenizer.push(token.id))
            text += piece
            if piece:
                yield piece
            if stopped:
                reason = "stop_string"
                break
        if reason != "stop_string":
            piece, stopped = stops.push(detokenizer.finish())
            piece += stops.finish()
            text += piece
            reason = "stop_string" if stopped else reason
            if piece:
                yield piece
        stream.caption = Caption(
            text=text,
            token_ids=[token.id for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            finish_reason=reason,
            mode=encoded.mode,
            prompt_tokens=len(embeds),
            timings=stages.seconds,
            notes=list(clip.notes),
            seconds=clip.seconds,
        )
