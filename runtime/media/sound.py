"""The sound of a file through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError

from ...errors import MediaError
from .container import open_input
from .sound_index import PROBED, SoundIndex, SoundPacket
from .source import Waveform

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

#: Samples before the wanted ones that the resampler is given: its filter reaches over 16 of the lower rate.
_RESAMPLER_RUN_IN = 4096


class _Changed(Exception):
    """The sound is of another kind before the wanted part than at its start: samples cannot be counted."""


class ContainerSoundReader:
    """A ``SoundReader`` over one sound stream of a file. The file is opened anew for each reading."""

    def __init__(self, path: Path, container: InputContainer, stream: AudioStream) -> None:
        self._path = path
        self._place = container.streams.audio.index(stream)
        self._layout = stream.codec_context.layout.name
        self.sample_rate = stream.codec_context.sample_rate
        self.num_channels = stream.codec_context.channels
        self.duration = _duration(container, stream)
        self.notes: list[str] = []
        self._index: SoundIndex | None = None
        self._first_kind: tuple[str, str, int] | None = None

    def read(self, rate: int | None = None, seconds: float | None = None, start: float = 0.0) -> Waveform:
        """See ``Media.read_audio``."""
        out_rate = rate or self.sample_rate
        limit = None if seconds is None else max(round(seconds * out_rate), 1)
        skip = round(start * out_rate)
        # The resampler's phases come round every `step` samples: begun there it gives what it gives in mid-stream.
        step = self.sample_rate // gcd(self.sample_rate, out_rate)
        first = max(skip * self.sample_rate // out_rate - _RESAMPLER_RUN_IN, 0) // step * step
        entry = self._entry(first) if first else 0
        first = first if entry else 0
        self.notes.clear()
        try:
            samples = self._collect(rate, entry, first, skip - first * out_rate // self.sample_rate, limit)
        except _Changed:
            self.notes.clear()
            samples = self._collect(rate, 0, 0, skip, limit)
        if samples.shape[1] == 0:
            if skip:
                raise MediaError(f"{self._path}: its sound ends before {start:g} s")
            raise MediaError(f"{self._path}: its sound track holds nothing that can be decoded")
        if rate is None:
            if not np.isfinite(samples).all():
                raise MediaError(f"{self._path}: its sound holds NaN or infinite samples")
            return Waveform(samples, self.sample_rate)
        return Waveform((samples[0] / np.float32(1 << 15)).astype(np.float32), rate)

    def _collect(self, rate: int | None, entry: int, first: int, skip: int, limit: int | None) -> np.ndarray:
        """``[channels, n]``: decoded from packet ``entry``, from sample ``first`` on, less the first ``skip``."""
        pieces: list[np.ndarray] = [np.zeros((1 if rate else self.num_channels, 0), np.int16 if rate else np.float32)]
        length = 0
        for piece in self._converted(rate, entry, first):
            kept = piece[:, skip:]
            skip -= piece.shape[1] - kept.shape[1]
            pieces.append(kept)
            length += kept.shape[1]
            if limit is not None and length >= limit:
                break
        return np.concatenate(pieces, axis=1)[:, :limit]

    def _entry(self, first: int) -> int:
        """The packet to begin with for the samples from ``first`` on."""
        if self._index is None:
            self._index = self._read_index()
        return self._index.entry(first, self.sample_rate) if self._index.starts else 0

    def _read_index(self) -> SoundIndex:
        """Read all packets, decoding the first few."""
        with open_input(self._path) as container:
            stream = self._stream(container)
            packets: list[SoundPacket] = []
            decoded: list[int] = []
            for packet in self._packets(container):
                packets.append(SoundPacket(packet.pos, packet.pts, packet.duration))
                if len(decoded) == len(packets) - 1 < PROBED:
                    try:
                        frames = _frames(packet)
                    except FFmpegError:
                        continue
                    self._first_kind = next((_kind(frame) for frame in frames), self._first_kind)
                    if all(frame.sample_rate == self.sample_rate for frame in frames):
                        decoded.append(sum(frame.samples for frame in frames))
            return SoundIndex(packets, decoded, (stream.time_base or 0) * Fraction(self.sample_rate))

    def _converted(self, rate: int | None, entry: int, first: int) -> Iterator[np.ndarray]:
        """Pieces ``[channels, n]``: float32 as stored, or int16 mono at ``rate``.

        By way of 16 bits, swresample mixes channels down without clipping: that is what the reference hears.
        """
        resampler, source = None, None
        for frame in self._from_sample(entry, first) if entry else self._decoded(0):
            kind = _kind(frame)
            if entry and resampler is None and kind != self._first_kind:
                raise _Changed
            if resampler is None or kind != source:
                yield from _arrays(resampler, None)
                resampler, source = self._resampler(rate), kind
            yield from _arrays(resampler, frame)
        yield from _arrays(resampler, None)

    def _resampler(self, rate: int | None) -> av.AudioResampler:
        if rate is None:
            return av.AudioResampler("fltp", self._layout, self.sample_rate)
        return av.AudioResampler("s16", "mono", rate)

    def _from_sample(self, entry: int, first: int) -> Iterator[AudioFrame]:
        """What ``_decoded(entry)`` gives, from exactly sample ``first`` of the whole sound on."""
        assert self._index is not None
        # The run-in may decode to less than its length, so samples are counted from the packet that holds the first.
        holder = self._index.holder(first)
        drop = first - self._index.starts[holder]
        for frame in self._decoded(entry, holder):
            if drop < frame.samples:
                yield _without_start(frame, drop) if drop else frame
            drop = max(drop - frame.samples, 0)

    def _decoded(self, entry: int, keep: int = 0) -> Iterator[AudioFrame]:
        """The frames of the packets from number ``keep`` on, decoding from number ``entry`` on."""
        damaged = 0
        with open_input(self._path) as container:
            for number, packet in enumerate(self._packets_from(container, entry), entry):
                try:
                    frames = _frames(packet)
                except FFmpegError:
                    damaged += number >= keep
                    continue
                if number >= keep:
                    yield from frames
        if damaged:
            self.notes.append(f"{damaged} damaged packets of sound were passed over")

    def _packets_from(self, container: InputContainer, entry: int) -> Iterator[Packet[AudioStream]]:
        """The packets from number ``entry`` on. Where a seek lands is checked; failing that, all are read through."""
        if not entry:
            yield from self._packets(container, flush=True)
            return
        assert self._index is not None
        pts = self._index.packets[entry].pts
        if pts is not None:
            try:
                container.seek(pts, stream=self._stream(container))
                packets = self._packets(container, flush=True)
                landed = next(packets, None)
            except FFmpegError:
                packets, landed = iter(()), None
            number = None if landed is None else self._index.find(landed.pos, landed.pts)
            if landed is not None and number is not None and number <= entry:
                yield from islice(chain((landed,), packets), entry - number, None)
                return
        with open_input(self._path) as anew:
            yield from islice(self._packets(anew, flush=True), entry, None)

    def _packets(self, container: InputContainer, flush: bool = False) -> Iterator[Packet[AudioStream]]:
        """All that hold something, and with ``flush`` the empty ones at the end that drain the decoder."""
        packets = container.demux(self._stream(container))
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:
                self.notes.append("the sound ends early: the file is damaged or cut off")
                return
            if packet is None:
                return
            if packet.size or flush:
                yield packet

    def _stream(self, container: InputContainer) -> AudioStream:
        return container.streams.audio[self._place]


def _frames(packet: Packet[AudioStream]) -> list[AudioFrame]:
    return [frame for frame in packet.decode() if isinstance(frame, av.AudioFrame) and frame.samples]


def _kind(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _without_start(frame: AudioFrame, count: int) -> AudioFrame:
    """``frame`` without its first ``count`` samples."""
    array: Any = frame.to_ndarray()
    column = count if frame.format.is_planar else count * frame.layout.nb_channels
    cut = av.AudioFrame.from_ndarray(np.ascontiguousarray(array[:, column:]), frame.format.name, frame.layout.name)
    cut.sample_rate = frame.sample_rate
    return cut


def _arrays(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> Iterator[np.ndarray]:
    """What comes out of ``resampler`` when ``frame`` goes in (None: the rest)."""
    if resampler is not None:
        # A resampler with nothing to do hands back what it is given, None included.
        yield from (part.to_ndarray() for part in resampler.resample(frame) if part is not None)


def _duration(container: InputContainer, stream: AudioStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0
