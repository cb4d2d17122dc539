"""The captioner: a bundle and a clip in, a caption out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeadlineError, OptionError
from .backends import Backend, Options, OrtBackend, open_backend
from .batching import READ_AHEAD, BatchItem, BatchResult, Pipeline, run_batch
from .bundle import Bundle
from .caption import Caption, CaptionStream
from .clip import Clip
from .decoding import Decoding, Scheduler, Token, TokenSearch, generate, log_likelihoods, resolve
from .encoder import Encoder
from .guard import Guard
from .inference import FloatArray, Inference
from .intake import Intake
from .prepared import MediaOptions, PreparedClip, Source, ViewingOptions, viewing_and_arrays, viewing_of
from .reading import TIME_LIMIT, Readers, start_readers
from .residency import Residency
from .runner import Runner
from .task import CaptionTask, Model
from .text import check_text, load_tokenizer
from .timing import Progress, Stages, deadline_at

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

_log = logging.getLogger(__name__)

#: Captions that ``caption_batch`` and ``candidates`` generate together unless told otherwise: beyond 8 rows the tokens
#: per second hardly grow on a CPU (benchmarks/results).
DEFAULT_ROWS = 8


class Captioner:
    """A bundle opened for captioning.

    Threads may share one: a call waits until those of other threads are done, and a stream or a batch lets others in
    between two pieces of text or two results. A forked child may go on with the captioner of its parent on the
    processor; on a GPU it gets a ``TargetError`` and loads one of its own. ``close`` it, or use it in a ``with`` block,
    to free sessions, cache and GPU memory at a given time; it then raises ``ClosedError``.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend | None = None, staged: bool = False, notes: Sequence[str] = ()
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.tokenizer = load_tokenizer(bundle.file("tokenizer.json"))
        backend = OrtBackend(bundle) if backend is None else backend
        self.encoder = Encoder(bundle, self.tokenizer, backend, staged)
        self._loaded = Residency(bundle, backend, self.encoder, staged)
        self.device_notes = tuple(notes)
        """Why better devices are not used, a line each."""
        self._device = backend.device
        self._guard = Guard(forks=backend.forks)
        self._model = Model(bundle, self.tokenizer, self.encoder)
        self._intake = Intake(self._model, self._loaded)

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
        """Open a bundle on a device: a name of ``contract.devices.DEVICES``; ``auto`` is the best that it was compiled
        for and that works here (``device`` and ``device_notes`` then say which, and why not a better one).

        ``threads``: processor threads of each session and of a video's decoder, one a core when ``None``; at most
        ``backends.MAX_THREADS``, or one a core, whatever is more. ``progress`` hears of the bytes that are hashed when
        a bundle is opened for the first time. ``staged``: one component at a time stays loaded.
        ``options``: by component, options of ONNX Runtime's CUDA provider, such as ``{"decoder": {"gpu_mem_limit":
        "4294967296"}}``, and ``{"vision": {"device": "cpu"}}`` to leave an encoder to the processor.
        Raises ``BundleError`` for a bundle that is incomplete, corrupt or tampered with, ``TargetError`` for a device
        that cannot run it.
        """
        started, report = time.perf_counter(), Stages(progress).report
        bundle = Bundle.open(path, progress=lambda done, total: report("checking the bundle", done, total))
        backend, notes = open_backend(bundle, device, threads, options)
        captioner = cls(bundle, backend, staged, notes)
        captioner._intake.threads = threads
        _log.info("opened %s on %s in %.2f s", bundle.path, captioner.device, time.perf_counter() - started)
        return captioner

    @property
    def device(self) -> str:
        """What the captioner runs on."""
        if self._loaded.backend is not None:
            self._device = self._loaded.backend.device
        return self._device

    @property
    def readers(self) -> Readers | None:
        """Processes that read the files of ``caption``, ``read`` and ``caption_batch``. ``None``: those of a batch are
        read in its own, others in this one."""
        return self._intake.readers

    @readers.setter
    def readers(self, readers: Readers | None) -> None:
        self._intake.readers = readers

    def __repr__(self) -> str:
        known = f"{self.manifest.name!r}, family={self.manifest.family!r}, device={self.device!r}"
        return f"Captioner({known}, weights={self.manifest.weights!r}{', closed' if self._guard.closed else ''})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the sessions, the cache and the memory of the device. Closing again does nothing.

        Waits for calls of other threads. A stream or a batch that is open raises ``ClosedError`` when it goes on.
        """
        with self._guard.close() as was_open:
            if was_open:
                # What ``device`` says from now on.
                self._device = self.device
                self._loaded.close()
                if self.readers is not None:
                    self.readers.close()
                _log.info("closed %s", self.bundle.path)

    def preload(self, progress: Progress | None = None) -> None:
        """Load all components now: the first caption is then as fast as the next.

        Otherwise each is loaded when it is first needed. A ``staged`` captioner loads one after the other and keeps the
        last one, the decoder, until a clip is encoded: the files are then in the system's cache. ``progress`` hears
        ``("load", 0, 0)`` for each.
        """
        with self._guard.use():
            stages = Stages(progress)
            self.encoder.load(stages)
            self._loaded.load_decoder(stages)

    def forget(self) -> None:
        """Forget the prompts that the cache holds: the next caption computes its whole prompt, as the first one did.

        For measuring (``Caption.prompt_tokens_reused`` is then 0 for a clip's first pass); captions do not change.
        """
        with self._guard.use():
            self._loaded.forget()

    def caption(
        self,
        source: Source | PreparedClip | None = None,
        *,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        deadline: float | None = None,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> Caption:
        """Caption a file, a folder of images, arrays, or what ``prepare`` gave; ``media`` as in ``MediaOptions``.

        ``prompt=None`` is the family's default instruction. ``progress`` hears of every stage: ``(name, done, total)``.
        Raises ``MediaError`` for a clip that cannot be read and ``OptionError`` for arguments that do not go together.

        ``deadline``: seconds from now. Once they have passed, the caption so far is returned, with the
        ``finish_reason`` ``deadline``; ``DeadlineError`` when there is no token yet. The time is looked at between the
        stages of reading and encoding and between decode steps, so a caption is late by one of these at most. A second
        pass that is cut short leaves the whole first caption in ``Caption.draft``.
        """
        with self._guard.use():
            stream = self.stream(
                source, prompt=prompt, decoding=decoding, deadline=deadline, progress=progress, **media
            )
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
        deadline: float | None = None,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> CaptionStream:
        """Like ``caption``, but text comes piece by piece, each piece complete UTF-8.

        The clip is read and encoded before the first piece. Where a later pass may replace the text (a retrospective
        one, or one that ``confidence`` decides on) it comes in one piece. Closing the stream keeps the caption so far.
        Other calls, also of this thread, work while it is open.
        """
        until = deadline_at(deadline)
        stages = Stages(progress, until)
        with self._guard.use():
            (task,) = self._intake.tasks(source, media, prompt, [decoding or Decoding()], stages)
        task.deadline = until
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
        deadline: float | None = None,
        rows: int = DEFAULT_ROWS,
        progress: Progress | None = None,
        **media: Unpack[MediaOptions],
    ) -> list[Caption]:
        """``count`` captions of one clip from one encoding and one prefill, the likeliest (by mean token
        log-likelihood) first.

        Sampled ones have seeds of their own, the first that of ``decoding``; a beam search gives its best. ``rows``:
        captions generated together. ``deadline`` as in ``caption``; those that have no token by then are left out.
        ``OptionError`` for a strategy that knows one caption only.
        """
        with self._guard.use():
            return self._candidates(source, count, prompt, decoding, deadline_at(deadline), rows, progress, media)

    def _candidates(
        self,
        source: Source | PreparedClip | None,
        count: int,
        prompt: str | None,
        decoding: Decoding | None,
        until: float | None,
        rows: int,
        progress: Progress | None,
        media: MediaOptions,
    ) -> list[Caption]:
        decoding = decoding or Decoding(strategy="sample")
        if count < 1 or rows < 1:
            raise OptionError(f"count and rows must be at least 1, not {count} and {rows}")
        if count > 1 and decoding.strategy == "greedy":
            raise OptionError("greedy decoding knows one caption only: several come of 'sample' or 'beam'")
        if decoding.strategy == "beam" and decoding.beams < count:
            raise OptionError(f"{count} captions need at least so many beams, not {decoding.beams}")
        stages = Stages(progress, until)
        if decoding.strategy == "beam":
            each, results = [decoding], count
        else:
            seeds = [decoding.seed, *np.random.SeedSequence(decoding.seed).generate_state(count - 1, np.uint64)]
            each, results = [replace(decoding, seed=int(seed)) for seed in seeds], 1
        tasks = self._intake.tasks(source, media, prompt, each, stages, results)
        together = min(rows, len(tasks)) * tasks[0].rows
        runner = Runner(self._loaded.idle_scheduler(together, max(task.max_length for task in tasks), stages, True))
        for task in tasks:
            task.deadline = until
            runner.add(task)
        while not runner.idle:
            runner.step()
        captions = [caption for task in tasks for caption in task.captions]
        if not captions:
            raise DeadlineError("the deadline passed before the first token")
        return sorted(captions, key=lambda caption: -caption.mean_logprob)

    def caption_batch(
        self,
        items: Iterable[Source | BatchItem],
        *,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        rows: int | None = None,
        memory: int | None = None,
        progress: Progress | None = None,
        isolate: bool = True,
        item_timeout: float = TIME_LIMIT,
        **viewing: Unpack[ViewingOptions],
    ) -> Iterator[BatchResult]:
        """Caption many clips, several at once: each result as soon as it is complete, with the place of its item.

        A caption is the same as alone, token by token, whatever else is under way. Items are taken as they are needed;
        one that cannot be captioned gives a result with an ``error`` and does not stop the others. ``viewing`` holds
        for all of them; the span of an item, where it has one, takes the place of its span. ``rows``: captions
        generated together (8, or as many as fit into ``memory``: bytes of cache; an engine may be built for fewer).
        ``OptionError`` when not even one fits. ``progress`` hears ``("captions", done, 0)``. Beside the cache, what is
        held at once are the tokens of the clips of the rows and ``batching.READ_AHEAD`` clips with their frames.
        ``isolate``: files are read in processes of their own, so that one that crashes a decoder, or takes more than
        ``item_timeout`` seconds to read, costs only its own caption.
        """
        how, view = decoding or Decoding(), viewing_of(viewing)
        if rows is not None and rows < 1:
            raise OptionError(f"rows must be at least 1, not {rows}")
        per_caption = resolve(how, self.manifest.generation).rows

        readers = (self.readers or start_readers(READ_AHEAD, item_timeout)) if isolate else None

        def read(item: BatchItem, stages: Stages) -> Clip:
            return self._intake.read_file(item.source, item.viewing(view), stages, readers)

        def stop() -> None:
            if readers is not None:
                (readers.interrupt if readers is self.readers else readers.close)()

        def task(item: BatchItem, clip: Clip, stages: Stages) -> CaptionTask:
            return self._intake.task_of(clip, view, prompt if item.prompt is None else item.prompt, how, stages)

        def open_scheduler(max_length: int) -> Scheduler:
            stages = Stages()
            together = rows or self._loaded.captions_at_once(DEFAULT_ROWS, per_caption, stages)
            count = min(together, self._loaded.captions_in(memory, max_length, per_caption, stages))
            return self._loaded.idle_scheduler(count * per_caption, max_length, stages, exact=True)

        wanted = (item if isinstance(item, BatchItem) else BatchItem(item) for item in items)
        results = run_batch(Pipeline(read, task, open_scheduler, stop, self._loaded.staged), wanted)
        try:
            for done, result in enumerate(self._guarded(results), 1):
                if progress is not None:
                    progress("captions", done, 0)
                yield result
        finally:
            stop()

    def score(
        self,
        source: Source | PreparedClip | None = None,
        text: str = "",
        *,
        prompt: str | None = None,
        **media: Unpack[MediaOptions],
    ) -> float:
        """Mean log-likelihood (natural log) per token of ``text``, its end-of-sequence token included, as a caption.

        This is LeanPO's reward without its factor (docs/facts.md 3).
        """
        check_text("text", text)
        with self._guard.use():
            return self._score(source, text, prompt, media)

    def _score(self, source: Source | PreparedClip | None, text: str, prompt: str | None, media: MediaOptions) -> float:
        encoded = self._intake.prepare(source, media, Stages()).encoded
        token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        token_ids.append(self.manifest.generation.eos_token_ids[0])
        instruction = self._model.instruction(prompt)
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
        with self._guard.use():
            return self._intake.prepare(source, media, Stages(progress), keep_features=True)

    def read(
        self,
        source: Source | None = None,
        *,
        stages: Stages | None = None,
        **media: Unpack[MediaOptions],
    ) -> Clip:
        """The frames and the sound that the captioner would look at and listen to."""
        return self._intake.read(source, *viewing_and_arrays(media), stages or Stages())

    def open_inference(self, max_length: int, rows: int = 1, stages: Stages | None = None) -> Inference:
        """A decoder with an empty cache for ``rows`` sequences of ``max_length`` tokens."""
        return self._loaded.open(max_length, rows, stages or Stages())

    def generate_tokens(self, embeds: FloatArray, max_new_tokens: int) -> Iterator[Token]:
        """Greedy tokens that follow a prompt given as embeddings ``[S, H]``."""
        settings = resolve(Decoding(max_new_tokens=max_new_tokens), self.manifest.generation)
        inference = self.open_inference(len(embeds) + max_new_tokens)
        return generate(inference, inference.prefill(0, embeds)[0], TokenSearch(settings))

    def _guarded(self, results: Iterator[BatchResult]) -> Iterator[BatchResult]:
        """The results, each made while this captioner is held."""
        try:
            while True:
                with self._guard.use():
                    result = next(results, None)
                if result is None:
                    return
                yield result
        finally:
            results.close()  # type: ignore[attr-defined]

    def _pieces(self, task: CaptionTask, stream: CaptionStream) -> Iterator[str]:
        """Pieces of text; sets ``stream.caption`` at the end."""
        with self._guard.use():
            runner = Runner(self._loaded.idle_scheduler(task.rows, task.max_length, task.stages))
            runner.add(task)
        shown = 0
        try:
            while not runner.idle:
                with self._guard.use():
                    runner.step()
                text = task.transcript.text
                if task.is_last and len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
        except GeneratorExit:
            # Without the lock: the scheduler is this stream's own as long as its task is there, and a stream that is
            # collected as garbage may be closed in any thread.
            runner.stop(task, "closed")
            stream.caption = next(iter(task.captions), None)
            raise
        finally:
            runner.cancel(task)
        if not task.captions:
            raise DeadlineError("the deadline passed before the first token")
        stream.caption = task.captions[0]
        if len(stream.caption.text) > shown:
            yield stream.caption.text[shown:]
