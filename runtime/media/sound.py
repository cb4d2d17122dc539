"""The sound of a file through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from ...errors import MediaError
from .container import has_jumps, is_measured, opened, read_packets, refuse_encrypted
from .sound_frames import MAX_CHANNELS, Converter, Cutter, Ranges, frames_of, kind_of
from .sound_index import PROBED, Piece, SoundIndex, SoundPacket, Stretch, find_stretches
from .source import Choice, Waveform

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

#: Samples before the wanted ones that the resampler is given: its filter reaches over 16 of the lower rate.
_RESAMPLER_RUN_IN = 4096
#: Seconds between a timestamp and the end of the samples before it that count as none (``min_hard_comp`` of FFmpeg's
#: resampler, with which ``aresample=async=1`` fills gaps). Encoders' delays are shorter.
_GAP = 0.1
#: Parts of a sound that lasts no longer than this are chosen when all of it was read.
_SHORT_SECONDS = 600
#: How far from the places that a duration suggests the parts of a longer one are still found without a second reading.
_SPARE_SECONDS = 4
_FULL_SCALE = np.float32(1 << 15)


class _Changed(Exception):
    """The sound is of another kind before the wanted part than at its start: samples cannot be counted."""


class ContainerSoundReader:
    """A ``SoundReader`` over one sound stream of a file. The file is opened anew for each reading.

    ``origin``: when the pictures begin, in seconds of the file's clock. ``None``: the sound begins at 0.
    """

    def __init__(self, path: Path, container: InputContainer, stream: AudioStream) -> None:
        self._path = path
        self._place = container.streams.audio.index(stream)
        self.origin: float | None = None
        self.notes: list[str] = []
        self._index: SoundIndex | None = None
        self._first_kind: tuple[str, str, int] | None = None
        self._first_time: float | None = None
        self._found: list[Stretch] | None = None
        self._jumps = has_jumps(container)
        self._stated = _duration(container, stream) if is_measured(container) else 0.0
        codec = stream.codec_context
        self._layout, self.sample_rate, self.num_channels = codec.layout.name, codec.sample_rate, codec.channels
        if not (self.sample_rate > 0 and 0 < self.num_channels <= MAX_CHANNELS):
            self._probe()

    @property
    def duration(self) -> float:
        """Seconds: as the file states it, or, where FFmpeg would guess from the bit rate, as its packets last."""
        if not self._stated:
            self._stated = self._indexed().seconds(self.sample_rate)
        return self._stated

    def read(
        self, rate: int | None = None, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> Waveform:
        """See ``Media.read_audio``."""
        self.notes.clear()
        samples = np.concatenate(list(self._pieces(rate, seconds, start, timed)), axis=1)
        if rate is not None:
            return Waveform(samples[0] / _FULL_SCALE, rate)
        if not np.isfinite(samples).all():
            raise MediaError(f"{self._path}: its sound holds NaN or infinite samples")
        return Waveform(samples, self.sample_rate)

    def read_parts(
        self, rate: int, choose: Choice, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> list[npt.NDArray[np.float32]]:
        """See ``Media.read_audio_parts``."""
        lasting = max(self.duration - start, 0.0)
        guess = choose(round(rate * (lasting if seconds is None else min(lasting, seconds))))
        # How much comes out is known when all of it has: durations are not exact, and some are wrong.
        spare = _SPARE_SECONDS * rate
        ranges = [(0, _SHORT_SECONDS * rate), *((max(first - spare, 0), last + spare) for first, last in guess)]
        while True:
            self.notes.clear()
            kept = Ranges(ranges)
            for piece in self._pieces(rate, seconds, start, timed):
                kept.add(piece[0])
            wanted = choose(kept.total)
            parts = [kept.part(first, last) for first, last in wanted]
            if all(len(part) == last - first for part, (first, last) in zip(parts, wanted, strict=True)):
                return [np.divide(part, _FULL_SCALE, dtype=np.float32) for part in parts]
            if ranges == wanted:
                raise MediaError(f"{self._path}: changed while its sound was being read")
            ranges = wanted

    def _pieces(self, rate: int | None, seconds: float | None, start: float, timed: bool) -> Iterator[np.ndarray]:
        """``[channels, n]`` one after the other: float32 as stored, int16 with a ``rate``."""
        stretches = self._stretches() if timed else []
        if len(stretches) > 1 or any(stretch.time for stretch in stretches):
            return self._placed(stretches, rate, seconds, start)
        limit = None if seconds is None else max(round(seconds * (rate or self.sample_rate)), 1)
        return self._slice(rate, limit, start)

    def _placed(
        self, stretches: list[Stretch], rate: int | None, seconds: float | None, start: float
    ) -> Iterator[np.ndarray]:
        """What is heard from ``start`` on, silence where the file has no sound."""
        out_rate = rate or self.sample_rate
        if start >= stretches[-1].end:
            raise MediaError(f"{self._path}: its sound ends before {start:g} s")
        length = None if seconds is None else max(round(seconds * out_rate), 1)
        given = 0
        for stretch in stretches:
            first = max(start, stretch.time)
            place = round((first - start) * out_rate)
            # What follows the last packet that was counted belongs to the last stretch.
            last = None if stretch is stretches[-1] else round((stretch.end - start) * out_rate)
            stop = min((each for each in (last, length) if each is not None), default=None)
            place = place if length is None else min(place, length)
            if place > given:
                yield self._silence(rate, place - given)
                given = place
            if stop is None or place < stop:
                limit = None if stop is None else stop - place
                for piece in self._slice(rate, limit, stretch.sample / self.sample_rate + first - stretch.time):
                    yield piece
                    given += piece.shape[1]

    def _silence(self, rate: int | None, count: int) -> np.ndarray:
        return np.zeros((1 if rate else self.num_channels, count), np.int16 if rate else np.float32)

    def _stretches(self) -> list[Stretch]:
        """Where there is sound, found once."""
        if self._found is None:
            pieces = self._indexed().pieces() or self._counted()
            late = 0.0
            if self.origin is not None and self._first_time is not None:
                late = self._first_time - self.origin
            late = late if abs(late) > _GAP else 0.0
            self._found = find_stretches(pieces, late, self.sample_rate, _GAP, self._jumps)
        return self._found

    def _counted(self) -> Iterator[Piece]:
        """The same by decoding all of it, where the packets do not tell."""
        for frame in self._decoded(0):
            count = frame.samples * self.sample_rate // frame.sample_rate
            yield Piece(None if frame.time is None else frame.time * self.sample_rate, count, count)

    def _slice(self, rate: int | None, limit: int | None, start: float) -> Iterator[np.ndarray]:
        """Up to ``limit`` samples of all that can be decoded, put end to end, from ``start`` seconds on."""
        self._check_kind()
        out_rate = rate or self.sample_rate
        skip = round(start * out_rate)
        # The resampler's phases come round every `step` samples: begun there it gives what it gives in mid-stream.
        step = self.sample_rate // gcd(self.sample_rate, out_rate)
        first = max(skip * self.sample_rate // out_rate - _RESAMPLER_RUN_IN, 0) // step * step
        entry = self._entry(first) if first else 0
        first = first if entry else 0
        noted = len(self.notes)
        empty = True
        try:
            for piece in self._cut(rate, entry, first, skip - first * out_rate // self.sample_rate, limit):
                empty = False
                yield piece
        except _Changed:
            del self.notes[noted:]
            for piece in self._cut(rate, 0, 0, skip, limit):
                empty = False
                yield piece
        if empty:
            if skip:
                raise MediaError(f"{self._path}: its sound ends before {start:g} s")
            raise MediaError(f"{self._path}: its sound track holds nothing that can be decoded")

    def _cut(self, rate: int | None, entry: int, first: int, skip: int, limit: int | None) -> Iterator[np.ndarray]:
        """Decoded from packet ``entry``, from sample ``first`` on, less the first ``skip``, no more than ``limit``."""
        for piece in self._converted(rate, entry, first):
            kept = piece[:, skip:]
            skip -= piece.shape[1] - kept.shape[1]
            kept = kept[:, :limit]
            if kept.shape[1]:
                yield kept
            if limit is not None:
                limit -= kept.shape[1]
                if limit == 0:
                    break

    def _entry(self, first: int) -> int:
        """The packet to begin with for the samples from ``first`` on."""
        index = self._indexed()
        return index.entry(first, self.sample_rate) if index.starts else 0

    def _indexed(self) -> SoundIndex:
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def _probe(self) -> None:
        """Take rate and channels from the first frame, where the file does not state them."""
        with opened(self._path) as container:
            for packet in self._packets(container):
                try:
                    frame = next(iter(frames_of(packet)), None)
                except FFmpegError:
                    continue
                if frame is not None:
                    self._layout, self.sample_rate = frame.layout.name, frame.sample_rate
                    self.num_channels = frame.layout.nb_channels
                    return

    def _check_kind(self) -> None:
        if self.sample_rate <= 0 or self.num_channels <= 0:
            raise MediaError(f"{self._path}: its sound track holds nothing that can be decoded")
        if self.num_channels > MAX_CHANNELS:
            raise MediaError(f"{self._path}: its sound has {self.num_channels} channels; up to {MAX_CHANNELS} are read")

    def _read_index(self) -> SoundIndex:
        """Read all packets, decoding the first few."""
        self._check_kind()
        with opened(self._path) as container:
            stream = self._stream(container)
            packets: list[SoundPacket] = []
            decoded: list[int] = []
            for packet in self._packets(container):
                packets.append(SoundPacket(packet.pos, packet.pts, packet.duration))
                if len(decoded) == len(packets) - 1 < PROBED:
                    try:
                        frames = frames_of(packet)
                    except FFmpegError:
                        continue
                    self._first_kind = next((kind_of(frame) for frame in frames), self._first_kind)
                    if self._first_time is None and frames:
                        self._first_time = frames[0].time
                    if all(frame.sample_rate == self.sample_rate for frame in frames):
                        decoded.append(sum(frame.samples for frame in frames))
            return SoundIndex(packets, decoded, (stream.time_base or 0) * Fraction(self.sample_rate))

    def _converted(self, rate: int | None, entry: int, first: int) -> Iterator[np.ndarray]:
        """Pieces ``[channels, n]``: see ``Converter``."""
        converter, source = None, None
        for frame in self._from_sample(entry, first) if entry else self._decoded(0):
            kind = kind_of(frame)
            if converter is None or kind != source:
                if converter is not None:
                    yield from converter.pieces(None)
                converter, source = Converter(rate, self._layout, self.sample_rate), kind
            try:
                yield from converter.pieces(frame)
            except ValueError as error:  # FFmpeg's EINVAL
                raise MediaError(
                    f"{self._path}: its sound has {frame.layout.nb_channels} channels ({frame.layout.name}), "
                    f"which cannot be mixed"
                ) from error
        if converter is not None:
            yield from converter.pieces(None)

    def _from_sample(self, entry: int, first: int) -> Iterator[AudioFrame]:
        """What ``_decoded(entry)`` gives, from exactly sample ``first`` of the whole sound on."""
        index = self._indexed()
        # The run-in may decode to less than its length, so samples are counted from the packet that holds the first.
        holder = index.holder(first)
        drop = first - index.starts[holder]
        cutter, kind = None, self._first_kind
        for frame in self._decoded(entry, holder):
            if drop < frame.samples:
                if cutter is None and kind_of(frame) != kind:
                    raise _Changed
                if cutter is None or kind_of(frame) != kind:
                    cutter, kind = Cutter(frame), kind_of(frame)
                yield from cutter.cut(frame, drop)
            drop = max(drop - frame.samples, 0)

    def _decoded(self, entry: int, keep: int = 0) -> Iterator[AudioFrame]:
        """The frames of the packets from number ``keep`` on, decoding from number ``entry`` on."""
        damaged = 0
        with opened(self._path) as container:
            for number, packet in enumerate(self._packets_from(container, entry), entry):
                try:
                    frames = frames_of(packet)
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
        index = self._indexed()
        pts = index.packets[entry].pts
        if pts is not None:
            try:
                container.seek(pts, stream=self._stream(container))
                packets = self._packets(container, flush=True)
                landed = next(packets, None)
            except FFmpegError:
                packets, landed = iter(()), None
            number = None if landed is None else index.find(landed.pos, landed.pts)
            if landed is not None and number is not None and number <= entry:
                yield from islice(chain((landed,), packets), entry - number, None)
                return
        with opened(self._path) as anew:
            yield from islice(self._packets(anew, flush=True), entry, None)

    def _packets(self, container: InputContainer, flush: bool = False) -> Iterator[Packet[AudioStream]]:
        """All that hold something, and with ``flush`` the empty ones at the end that drain the decoder."""
        early = "the sound ends early: the file is damaged or cut off"
        checked = False
        for packet in read_packets(container, self._stream(container), lambda: self.notes.append(early)):
            if not checked:
                refuse_encrypted(self._path, packet)
                checked = True
            if packet.size or flush:
                yield packet

    def _stream(self, container: InputContainer) -> AudioStream:
        if self._place >= len(container.streams.audio):
            raise MediaError(f"{self._path}: its sound disappeared while it was being read")
        return container.streams.audio[self._place]


def _duration(container: InputContainer, stream: AudioStream) -> float:
    # Damaged headers state less than nothing: then the packets tell.
    if stream.duration and stream.duration > 0 and stream.time_base:
        return float(stream.duration * stream.time_base)
    return max(container.duration or 0, 0) / av.time_base
