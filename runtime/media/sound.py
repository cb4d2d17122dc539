"""The sound of a file through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError

from ...errors import MediaError
from .container import open_input
from .source import Waveform

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer


class ContainerSoundReader:
    """A ``SoundReader`` over one sound stream of a file. The file is opened anew for each reading."""

    def __init__(self, path: Path, container: InputContainer, stream: AudioStream) -> None:
        self._path = path
        self._number = stream.index
        self._layout = stream.codec_context.layout.name
        self.sample_rate = stream.codec_context.sample_rate
        self.num_channels = stream.codec_context.channels
        self.duration = _duration(container, stream)
        self.notes: list[str] = []

    def read(self, rate: int | None = None, seconds: float | None = None) -> Waveform:
        """See ``Media.read_audio``."""
        limit = None if seconds is None else round(seconds * (rate or self.sample_rate))
        pieces: list[np.ndarray] = []
        length = 0
        self.notes.clear()
        for piece in self._converted(rate):
            pieces.append(piece)
            length += piece.shape[1]
            if limit is not None and length >= limit:
                break
        if length == 0:
            raise MediaError(f"{self._path}: its sound track holds nothing that can be decoded")
        samples = np.concatenate(pieces, axis=1)[:, :limit]
        if rate is None:
            if not np.isfinite(samples).all():
                raise MediaError(f"{self._path}: its sound holds NaN or infinite samples")
            return Waveform(samples, self.sample_rate)
        return Waveform((samples[0] / np.float32(1 << 15)).astype(np.float32), rate)

    def _converted(self, rate: int | None) -> Iterator[np.ndarray]:
        """Pieces ``[channels, n]``: float32 as stored, or int16 mono at ``rate``.

        By way of 16 bits, swresample mixes channels down without clipping: that is what the reference hears.
        """
        resampler, source = None, None
        for frame in self._decoded():
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is None or kind != source:
                yield from _arrays(resampler, None)
                resampler, source = self._resampler(rate), kind
            yield from _arrays(resampler, frame)
        yield from _arrays(resampler, None)

    def _resampler(self, rate: int | None) -> av.AudioResampler:
        if rate is None:
            return av.AudioResampler("fltp", self._layout, self.sample_rate)
        return av.AudioResampler("s16", "mono", rate)

    def _decoded(self) -> Iterator[AudioFrame]:
        damaged = 0
        with open_input(self._path) as container:
            packets = container.demux(container.streams[self._number])
            while True:
                try:
                    packet = next(packets, None)
                except FFmpegError:
                    self.notes.append("the sound ends early: the file is damaged or cut off")
                    break
                if packet is None:
                    break
                try:
                    frames = packet.decode()
                except FFmpegError:
                    damaged += 1
                    continue
                yield from (frame for frame in frames if isinstance(frame, av.AudioFrame) and frame.samples)
        if damaged:
            self.notes.append(f"{damaged} damaged packets of sound were passed over")


def _arrays(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> Iterator[np.ndarray]:
    """What comes out of ``resampler`` when ``frame`` goes in (None: the rest)."""
    if resampler is not None:
        # A resampler with nothing to do hands back what it is given, None included.
        yield from (part.to_ndarray() for part in resampler.resample(frame) if part is not None)


def _duration(container: InputContainer, stream: AudioStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0
