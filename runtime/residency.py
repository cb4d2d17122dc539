"""What a captioner holds in memory: its decoder, the cache of keys and values, and when they make room."""

from __future__ import annotations

import logging
import sys
import time

from ..errors import OptionError
from .backends import Backend, Decoder
from .bundle import Bundle
from .decoding import Scheduler
from .encoder import Encoder
from .inference import Inference
from .timing import Stages

_log = logging.getLogger(__name__)


class Residency:
    """The decoder of a captioner and the scheduler with its cache, made when they are first needed.

    ``staged``: encoders and decoder are never loaded together. The decoder's loading unloads the encoders;
    ``make_room`` unloads the decoder before an encoder is needed.
    """

    def __init__(self, bundle: Bundle, backend: Backend, encoder: Encoder, staged: bool = False) -> None:
        self._manifest, self._encoder, self.staged = bundle.manifest, encoder, staged
        self.backend: Backend | None = backend
        self.decoder: Decoder | None = None
        self.scheduler: Scheduler | None = None

    def load_decoder(self, stages: Stages) -> Decoder:
        """The decoder, loaded if it is not there."""
        if self.decoder is None:
            if self.staged:
                self._encoder.release()
            assert self.backend is not None
            started = time.perf_counter()
            with stages.measure("load"):
                self.decoder = self.backend.decoder()
            _log.debug("loaded the decoder in %.2f s", time.perf_counter() - started)
        return self.decoder

    def make_room(self) -> None:
        """Where components are staged, unload the decoder: an encoder comes next. A stream that is open keeps it."""
        if self.staged:
            self.scheduler = self.decoder = None

    def open(self, max_length: int, rows: int, stages: Stages) -> Inference:
        """A decoder with an empty cache for ``rows`` sequences of ``max_length`` tokens."""
        return self.load_decoder(stages).open(rows=rows, max_length=max_length)

    def idle_scheduler(self, rows: int, max_length: int, stages: Stages, exact: bool = False) -> Scheduler:
        """The captioner's scheduler, if it has the rows and nobody uses it, else a new one in its place.

        What its rows hold is reused by prompts that begin alike. ``exact``: no more rows than asked for, and no longer
        ones than the decoder makes for it, which bounds the memory and what is generated together.
        """
        length = self.load_decoder(stages).row_length(max_length)
        kept = self.scheduler
        if kept is not None and kept.idle:
            size = kept.inference.rows, kept.inference.max_length
            if size == (rows, length) or (not exact and size[0] >= rows and size[1] >= max_length):
                return kept
        kept = self.scheduler = None  # free its cache before the next is made
        self.scheduler = Scheduler(self.open(length, rows, stages))
        return self.scheduler

    def captions_at_once(self, wanted: int, rows: int, stages: Stages) -> int:
        """How many captions of ``rows`` rows each the decoder takes at once, at most ``wanted`` and at least one."""
        most = self.load_decoder(stages).most_rows
        return wanted if most is None else max(1, min(wanted, most // rows))

    def captions_in(self, memory: int | None, max_length: int, rows: int, stages: Stages) -> int:
        """How many captions of ``rows`` rows each have their cache in ``memory`` bytes. ``OptionError`` for none."""
        if memory is None:
            return sys.maxsize
        length = self.load_decoder(stages).row_length(max_length)
        needed = self._manifest.cache_bytes * length * rows
        if memory < needed:
            raise OptionError(
                f"a caption takes {needed / 2**20:,.0f} MiB of cache, the limit is {memory / 2**20:,.0f} MiB"
            )
        return memory // needed

    def forget(self) -> None:
        """Forget the prompts that the cache holds."""
        if self.scheduler is not None:
            self.scheduler.forget()

    def close(self) -> None:
        """Free all of it. What is needed afterwards cannot be loaded."""
        self._encoder.close()
        self.scheduler = self.decoder = self.backend = None
