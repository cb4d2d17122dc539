"""The captioner: a bundle and a clip in, a caption out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from .backends import Backend, Decoder, Options, OrtBackend, open_backend
from .batching import BatchItem, BatchResult, Pipeline, run_batch
from .bundle import Bundle
from .caption import Caption, CaptionStream
from .clip import Clip, array_clip, read_clip
from .decoding import Decoding, Scheduler, Token, TokenSearch, generate, log_likelihoods, resolve
from .encoder import EncodedClip, Encoder
from .inference import FloatArray, Inference
from .runner import Runner
from .task import CaptionTask, Model
from .text import load_tokenizer
from .timing import Progress, Stages

if TYPE_CHECKING:
    from typing_extensions import Unpack

Source = str | os.PathLike[str]

#: Captions that ``caption_batch`` and ``candidates`` generate together unless told otherwise: beyond 8 rows the tokens
#: per second hardly grow on a CPU (benchmarks/results).
DEFAULT_ROWS = 8
#: Rows are made a multiple of so many tokens long, so that the next clip, a little longer, finds them long enough, and
#: that there are few sizes: on a GPU cuDNN plans its attention for each.
_LENGTH_STEP = 256


class MediaOptions(TypedDict, total=False):
    """What of a source is looked at and listened to, and in how many tokens.

    ``audio=False`` leaves the sound out. ``frames`` uint8 ``[T, H, W, 3]`` RGB; ``waveform`` float (in [-1, 1]) or
    int16, mono or with channels, at ``sample_rate`` Hz: in place of a file. ``start`` and ``end``: a span in seconds.
    ``duplicates``: drop sampled frames that differ by no more grey levels than this from the last one kept.
    ``visual_tokens``: a ratio (float up to 1) or a number (int) of visual tokens to keep of the clip.
    """

    audio: bool
    frames: npt.ArrayLike | None
    waveform: npt.ArrayLike | None
    sample_rate: int | None
    start: float | None
    end: float | None
    duplicates: float | None
    visual_tokens: int | float | None


@dataclass(frozen=True, eq=False)
class PreparedClip:
    """A clip that was read and encoded, for any number of captions with different instructions."""

    clip: Clip
    encoded: EncodedClip


class Captioner:
    """A bundle opened for captioning. Not safe for use from several threads at once."""

    def __init__(
        self, bundle: Bundle, backend: Backend | None = None, staged: bool = False, notes: Sequence[str] = ()
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.tokenizer = load_tokenizer(bundle.file("tokenizer.json"))
        self._backend = OrtBackend(bundle) if backend is None else backend
        self.encoder = Encoder(bundle, self.tokenizer, self._backend, staged)
        self._staged, self.device_notes = staged, tuple(notes)
        """Why better devices are not used, a line each."""
        self._model = Model(bundle, self.tokenizer, self.encoder)
        self._decoder: Decoder | None = None
        self._scheduler: Scheduler | None = None

    @classmethod
    def load(
        cls,
        path: Source,
        device: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
        *,
        staged: bool = False,
        options: Options | None = None,
    ) -> Captioner:
        """Open a bundle on a device: ``cpu``, ``cuda``, ``tensorrt-rtx`` or ``tensorrt``; ``auto`` is the best that it
        was compiled for and that works here (``device`` and ``device_notes`` then say which, and why not a better one).

        ``threads``: processor threads of each session, one a core when ``None``. ``progress`` hears of the bytes that
        are hashed when a bundle is opened for the first time. ``staged``: one component at a time stays loaded.
        ``options``: by component, options of ONNX Runtime's CUDA provider, such as ``{"decoder": {"gpu_mem_limit":
        "4294967296"}}``, and ``{"vision": {"device": "cpu"}}`` to leave an encoder to the processor.
        Raises ``BundleError`` for a bundle that is incomplete, corrupt or tampered with, ``TargetError`` for a device
        that cannot run it.
        """
        report = Stages(progress).report
        bundle = Bundle.open(path, progress=lambda done, total: report("checking the bundle", done, total))
        backend, notes = open_backend(bundle, device, threads, options)
        return cls(bundle, backend, staged, notes)

    @property
    def device(self) -> str:
        """What the captioner runs on."""
        return self._backend.device

    @property
    def per_frame(self) -> bool:
        """Whether the prompt has a block for each frame (AuroraCap) instead of one for the clip."""
        return self.manifest.visual.per_frame

    def caption(
        self,
        source: Source | PreparedClip | None = None,
        *,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> Caption:
        """Caption a file, a folder of images, arrays, or what ``prepare`` gave; ``media`` as in ``MediaOptions``.

        ``prompt=None`` is the family's default instruction. ``progress`` hears of every stage: ``(name, done, total)``.
        Raises ``MediaError`` for a clip that cannot be read and ``OptionError`` for arguments that do not go together.
        """
        stream = self.stream(source, prompt=prompt, decoding=decoding, progress=progress, **media)
        for _ in stream:
            pass
        assert stream.caption is not None
        return stream.caption

    def stream(
        self,
        source: Source | PreparedClip | None = None,
        *,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> CaptionStream:
        """Like ``caption``, but text comes piece by piece, each piece complete UTF-8.

        The clip is read and encoded before the first piece. Where a later pass may replace the text (a retrospective
        one, or one that ``confidence`` decides on) it comes in one piece.
        """
        stages = Stages(progress)
        task = self._task(source, prompt, decoding or Decoding(), stages, media)
        stream = CaptionStream(iter(()))
        stream._pieces = self._pieces(task, stream)
        return stream

    def candidates(
        self,
        source: Source | PreparedClip | None = None,
        count: int = 2,
        *,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        rows: int = DEFAULT_ROWS,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> list[Caption]:
        """``count`` captions of one clip from one encoding and one prefill, the likeliest (by mean token
        log-likelihood) first.

        Sampled ones have seeds of their own, the first that of ``decoding``; a beam search gives its best. ``rows``:
        captions generated together. ``OptionError`` for a strategy that knows one caption only.
        """
        decoding = decoding or Decoding(strategy="sample")
        if count < 1 or rows < 1:
            raise OptionError(f"count and rows must be at least 1, not {count} and {rows}")
        if count > 1 and decoding.strategy == "greedy":
            raise OptionError("greedy decoding knows one caption only: several come of 'sample' or 'beam'")
        if decoding.strategy == "beam" and decoding.num_beams < count:
            raise OptionError(f"{count} captions need at least so many beams, not {decoding.num_beams}")
        stages = Stages(progress)
        encoded, clip = self._encoded(source, stages, media, _contrasts(decoding))
        if decoding.strategy == "beam":
            tasks = [CaptionTask(self._model, encoded, prompt, decoding, stages, clip, num_results=count)]
        else:
            seeds = [decoding.seed, *np.random.SeedSequence(decoding.seed).generate_state(count - 1, np.uint64)]
            tasks = [
                CaptionTask(self._model, encoded, prompt, replace(decoding, seed=int(seed)), stages, clip)
                for seed in seeds
            ]
        together = min(rows, len(tasks)) * tasks[0].rows
        runner = Runner(self._idle_scheduler(together, max(task.max_length for task in tasks), stages, True))
        for task in tasks:
            runner.add(task)
        while not runner.idle:
            runner.step()
        captions = [caption for task in tasks for caption in task.captions]
        return sorted(captions, key=lambda caption: -caption.mean_logprob)

    def caption_batch(
        self,
        items: Iterable[Source | BatchItem],
        *,
        prompt: str | None = None,
        audio: bool = True,
        decoding: Decoding | None = None,
        visual_tokens: int | float | None = None,
        duplicates: float | None = None,
        rows: int | None = None,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[BatchResult]:
        """Caption many clips, several at once: each result as soon as it is complete, with the place of its item.

        A caption is the same as alone, token by token, whatever else is under way. Items are taken as they are needed;
        one that cannot be captioned gives a result with an ``error`` and does not stop the others. ``rows``: captions
        generated together (8, or as many as fit into ``memory``: bytes of cache). ``OptionError`` when not even one
        fits. ``progress`` hears ``("captions", done, 0)``. Beside the cache, what is held at once are the clips of
        the rows and ``batching.READ_AHEAD`` more.
        """
        how = decoding or Decoding()
        if rows is not None and rows < 1:
            raise OptionError(f"rows must be at least 1, not {rows}")
        per_caption = resolve(how, self.manifest.generation).rows

        def read(item: BatchItem, stages: Stages) -> Clip:
            return read_clip(
                item.source,
                self.manifest.preprocessing,
                self.per_frame,
                audio,
                stages,
                start=item.start,
                end=item.end,
                duplicates=duplicates,
            )

        def task(item: BatchItem, clip: Clip, stages: Stages) -> CaptionTask:
            encoded = self.encoder.encode(clip, stages, visual_tokens=visual_tokens, keep_features=_contrasts(how))
            asked = prompt if item.prompt is None else item.prompt
            return CaptionTask(self._model, encoded, asked, how, stages, clip)

        def open_scheduler(max_length: int) -> Scheduler:
            count = self._rows_in(memory, _rounded(max_length, self.manifest.decoder.context_length), per_caption)
            return self._idle_scheduler(
                min(rows or DEFAULT_ROWS, count) * per_caption, max_length, Stages(), exact=True
            )

        wanted = (item if isinstance(item, BatchItem) else BatchItem(item) for item in items)
        for done, result in enumerate(run_batch(Pipeline(read, task, open_scheduler), wanted), 1):
            if progress is not None:
                progress("captions", done, 0)
            yield result

    def score(
        self,
        source: Source | PreparedClip | None = None,
        text: str = "",
        *,
        prompt: str | None = None,
        **media: Unpack[MediaOptions],
    ) -> float:
        """Mean log-likelihood (natural log) per token of ``text``, its end-of-sequence token included, as a caption.

        This is LeanPO's reward without its factor (FACTS 3).
        """
        encoded, _ = self._encoded(source, Stages(), media)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        token_ids.append(self.manifest.generation.eos_token_ids[0])
        instruction = self.manifest.default_instruction if prompt is None else prompt
        embeds = self.encoder.prompt_embeds(encoded, instruction)
        inference = self.open_inference(len(embeds) + len(token_ids) - 1)
        first = inference.prefill(0, embeds)
        values = log_likelihoods(first, token_ids[:1])
        if len(token_ids) > 1:
            following = self.bundle.embed(np.array(token_ids[:-1], np.int64))
            values += log_likelihoods(inference.prefill(0, following, num_logits=len(following)), token_ids[1:])
        return float(np.mean(values))

    def prepare(
        self, source: Source | None = None, *, progress: Progress | None = None, **media: Unpack[MediaOptions]
    ) -> PreparedClip:
        """Read and encode a clip once, for any number of ``caption`` calls with different instructions.

        What their prompts have in common, the clip above all, is also prefilled once while nothing else is captioned.
        """
        encoded, clip = self._encoded(source, Stages(progress), media, keep_features=True)
        return PreparedClip(clip, encoded)

    def read(
        self,
        source: Source | None = None,
        *,
        audio: bool = True,
        frames: npt.ArrayLike | None = None,
        waveform: npt.ArrayLike | None = None,
        sample_rate: int | None = None,
        start: float | None = None,
        end: float | None = None,
        duplicates: float | None = None,
        stages: Stages | None = None,
    ) -> Clip:
        """The frames and the sound that the captioner would look at and listen to."""
        arrays = frames is not None or waveform is not None
        if (source is None) != arrays:
            raise OptionError("give either a file or arrays (frames=, waveform=), not both and not neither")
        spec = self.manifest.preprocessing
        if source is not None:
            stages = stages or Stages()
            return read_clip(source, spec, self.per_frame, audio, stages, start=start, end=end, duplicates=duplicates)
        if start is not None or end is not None:
            raise OptionError("start= and end= are for files, not for arrays")
        heard = waveform if audio else None
        return array_clip(frames, heard, sample_rate, spec, self.per_frame, duplicates=duplicates)

    def open_inference(self, max_length: int, rows: int = 1, stages: Stages | None = None) -> Inference:
        """A decoder with an empty cache for ``rows`` sequences of ``max_length`` tokens."""
        return self._load_decoder(stages or Stages()).open(rows=rows, max_length=max_length)

    def generate_tokens(self, embeds: FloatArray, max_new_tokens: int) -> Iterator[Token]:
        """Greedy tokens that follow a prompt given as embeddings ``[S, H]``."""
        settings = resolve(Decoding(max_new_tokens=max_new_tokens), self.manifest.generation)
        inference = self.open_inference(len(embeds) + max_new_tokens)
        return generate(inference, inference.prefill(0, embeds)[0], TokenSearch(settings))

    def _task(
        self,
        source: Source | PreparedClip | None,
        prompt: str | None,
        decoding: Decoding,
        stages: Stages,
        media: MediaOptions,
    ) -> CaptionTask:
        encoded, clip = self._encoded(source, stages, media, _contrasts(decoding))
        return CaptionTask(self._model, encoded, prompt, decoding, stages, clip)

    def _encoded(
        self, source: Source | PreparedClip | None, stages: Stages, media: MediaOptions, keep_features: bool = False
    ) -> tuple[EncodedClip, Clip]:
        if isinstance(source, PreparedClip):
            if media:
                raise OptionError(f"the clip is prepared already: {', '.join(media)} cannot change it")
            return source.encoded, source.clip
        visual_tokens = media.get("visual_tokens")
        options: dict[str, Any] = {name: value for name, value in media.items() if name != "visual_tokens"}
        clip = self.read(source, **options, stages=stages)
        if self._staged:
            self._scheduler = self._decoder = None
        encoded = self.encoder.encode(clip, stages, visual_tokens=visual_tokens, keep_features=keep_features)
        return encoded, clip

    def _pieces(self, task: CaptionTask, stream: CaptionStream) -> Iterator[str]:
        """Pieces of text; sets ``stream.caption`` at the end."""
        runner = Runner(self._idle_scheduler(task.rows, task.max_length, task.stages))
        runner.add(task)
        shown = 0
        try:
            while not runner.idle:
                runner.step()
                text = task.transcript.text
                if task.is_last and len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
        finally:
            runner.cancel(task)
        stream.caption = task.captions[0]
        if len(stream.caption.text) > shown:
            yield stream.caption.text[shown:]

    def _idle_scheduler(self, rows: int, max_length: int, stages: Stages, exact: bool = False) -> Scheduler:
        """The captioner's scheduler, if it has the rows and nobody uses it, else a new one in its place.

        What its rows hold is reused by prompts that begin alike. ``exact``: no more and no longer rows than asked for,
        which bounds the memory and what is generated together.
        """
        length = _rounded(max_length, self._load_decoder(stages).longest)
        kept = self._scheduler
        if kept is not None and kept.idle:
            size = kept.inference.rows, kept.inference.max_length
            if size == (rows, length) or (not exact and size[0] >= rows and size[1] >= max_length):
                return kept
        kept = self._scheduler = None  # free its cache before the next is made
        self._scheduler = Scheduler(self.open_inference(length, rows, stages))
        return self._scheduler

    def _load_decoder(self, stages: Stages) -> Decoder:
        if self._decoder is None:
            if self._staged:
                self.encoder.release()
            with stages.measure("load"):
                self._decoder = self._backend.decoder()
        return self._decoder

    def _rows_in(self, memory: int | None, max_length: int, per_caption: int) -> int:
        """Captions whose cache fits into ``memory`` bytes."""
        if memory is None:
            return sys.maxsize
        row = self.manifest.cache_bytes * max_length
        count = memory // (row * per_caption)
        if count < 1:
            raise OptionError(
                f"a caption takes {row * per_caption / 2**20:,.0f} MiB of cache, the limit is {memory / 2**20:,.0f} MiB"
            )
        return count


def _contrasts(decoding: Decoding) -> bool:
    """Whether per-frame features are worth keeping: another stream will be made of them."""
    return decoding.contrast == "temporal"


def _rounded(max_length: int, longest: int) -> int:
    return min(-(-max_length // _LENGTH_STEP) * _LENGTH_STEP, max(longest, max_length))
