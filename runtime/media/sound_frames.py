"""Decoded frames of sound as arrays. Everything here works on packed samples, which lie in one plane.

PyAV walks a frame's list of planes to its end. FFmpeg's list has room for 8 and no end mark when it is full, so frames
of 8 or more channels that hold a plane for each must never be asked for their planes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import av
import numpy as np

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.packet import Packet

#: 22.2 has 24 channels and sixth-order ambisonics 49; more are taken for damage.
MAX_CHANNELS = 64
_SAFE_PLANES = 7


def frames_of(packet: Packet[Any]) -> list[AudioFrame]:
    """The frames of ``packet`` that hold samples, with a rate and a number of channels that can be."""
    return [
        frame
        for frame in packet.decode()
        if isinstance(frame, av.AudioFrame)
        and frame.samples
        and frame.sample_rate > 0
        and 0 < frame.layout.nb_channels <= MAX_CHANNELS
    ]


def kind_of(frame: AudioFrame) -> tuple[str, str, int]:
    """Frames of one kind go through one resampler."""
    return frame.format.name, frame.layout.name, frame.sample_rate


class Converter:
    """Frames of one kind to pieces ``[channels, n]``: float32 as stored, or int16 mono at ``rate``.

    By way of 16 bits, swresample mixes channels down without clipping: that is what the reference hears.
    """

    def __init__(self, rate: int | None, layout: str, sample_rate: int) -> None:
        if rate is None:
            self._resampler = av.AudioResampler("flt", layout, sample_rate)
        else:
            self._resampler = av.AudioResampler("s16", "mono", rate)

    def pieces(self, frame: AudioFrame | None) -> Iterator[np.ndarray]:
        """What comes out when ``frame`` goes in (``None``: the rest)."""
        for part in self._resampler.resample(frame):
            # A resampler with nothing to do hands back what it is given, None included.
            if part is not None:
                yield _packed_array(part)


class Cutter:
    """Frames of one kind, the first without its beginning. All come in one layout of samples."""

    def __init__(self, frame: AudioFrame) -> None:
        wide = frame.format.is_planar and frame.layout.nb_channels > _SAFE_PLANES
        self._packer = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate) if wide else None

    def cut(self, frame: AudioFrame, count: int) -> Iterator[AudioFrame]:
        """``frame`` without its first ``count`` samples."""
        for part in [frame] if self._packer is None else self._packer.resample(frame):
            yield _without_start(part, count) if count else part


def _without_start(frame: AudioFrame, count: int) -> AudioFrame:
    column = count if frame.format.is_planar else count * frame.layout.nb_channels
    array: Any = frame.to_ndarray()[:, column:]
    cut = av.AudioFrame.from_ndarray(np.ascontiguousarray(array), frame.format.name, frame.layout.name)
    cut.sample_rate = frame.sample_rate
    return cut


def _packed_array(frame: AudioFrame) -> np.ndarray:
    """``[channels, n]`` of packed samples."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


class Ranges:
    """Of samples that go past, those in ``ranges`` (first, last), which may overlap. ``total`` counts all."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.total = 0
        self._ranges: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1] = self._ranges[-1][0], max(last, self._ranges[-1][1])
            else:
                self._ranges.append((first, last))
        self._kept: list[list[np.ndarray]] = [[np.zeros(0, np.int16)] for _ in self._ranges]

    def add(self, samples: np.ndarray) -> None:
        """The next ``samples [n]`` int16."""
        for (first, last), kept in zip(self._ranges, self._kept, strict=True):
            found = samples[max(first - self.total, 0) : max(last - self.total, 0)]
            if len(found):
                # A copy: a slice would hold all of the samples.
                kept.append(found if len(found) == len(samples) else found.copy())
        self.total += len(samples)

    def part(self, first: int, last: int) -> np.ndarray:
        """Samples ``first:last``, fewer where they were not kept."""
        for number, (begin, end) in enumerate(self._ranges):
            if begin <= first and last <= end:
                self._kept[number] = [np.concatenate(self._kept[number])]
                return self._kept[number][0][first - begin : last - begin]
        return np.zeros(0, np.int16)
