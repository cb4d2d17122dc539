"""Where in a sound each packet of a file begins, in samples: the places from which a part of it can be decoded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

#: Packets at the start whose samples are counted by decoding them: encoders' delays are cut off there (at most 3,840
#: samples of Opus in packets of 960, RFC 7845; 2,112 of AAC).
PROBED = 8
#: Packets, and seconds, that are decoded and thrown away before the wanted ones. MP3 reaches back through 9 packets
#: for bits (ISO 11172-3, main_data_begin), Opus needs 80 ms to converge (RFC 7845, 4.6), the others one packet.
RUN_IN_PACKETS, RUN_IN_SECONDS = 12, 0.5
#: Seconds; a larger step of the clock is a jump of the clock (FFmpeg's ``dts_delta_threshold``).
_JUMP = 10.0
#: Seconds; so long a silence is a damaged timestamp.
_LONGEST_GAP = 86_400.0


class SoundPacket(NamedTuple):
    """``pos``: byte in the file, ``pts`` and ``duration`` in the stream's time base; ``None`` where not known."""

    pos: int | None
    pts: int | None
    duration: int | None


class Stretch(NamedTuple):
    """Samples without a gap: from sample ``sample`` of all that is decoded, heard from ``time`` to ``end`` seconds."""

    time: float
    sample: int
    end: float


class SoundIndex:
    """``starts[n]``: how many samples all packets before the n-th decode to; empty where that cannot be told.

    ``decoded``: what the first packets (``PROBED``) did decode to. ``tick``: samples in a unit of the time base.
    """

    def __init__(self, packets: Sequence[SoundPacket], decoded: Sequence[int], tick: Fraction) -> None:
        self.packets, self._tick, self._decoded = packets, tick, decoded
        self._numbers = {(packet.pos, packet.pts): n for n, packet in enumerate(packets) if packet.pos is not None}
        lengths = _lengths(packets, decoded, tick)
        self._lengths = lengths
        self.starts = [] if lengths is None else list(accumulate(lengths, initial=0))[:-1]

    def seconds(self, rate: int) -> float:
        """How long all packets last together; 0.0 where that cannot be told."""
        if self._lengths is not None:
            return sum(self._lengths) / rate
        durations = [packet.duration or 0 for packet in self.packets]
        return max(float(sum(durations) * self._tick), sum(self._decoded)) / rate

    def pieces(self) -> list[Piece] | None:
        """What ``find_stretches`` takes; None where the samples of a packet cannot be told."""
        if self._lengths is None:
            return None
        size = self._lengths[PROBED - 1]
        stamps = [None if packet.pts is None else packet.pts * self._tick for packet in self.packets]
        # Of the first packets the encoder's delay is cut off: the timestamps after them still count it.
        lasting = [max(length, size) for length in self._lengths[:PROBED]] + self._lengths[PROBED:]
        return [Piece(*piece) for piece in zip(stamps, lasting, self._lengths, strict=True)]

    def entry(self, sample: int, rate: int) -> int:
        """The packet to begin decoding with for ``sample`` and what follows, the run-in included; 0: the first."""
        wanted = self.holder(sample)
        early = bisect_right(self.starts, sample - int(RUN_IN_SECONDS * rate)) - 1
        number = min(wanted - RUN_IN_PACKETS, early)
        return number if number >= PROBED else 0

    def holder(self, sample: int) -> int:
        """The packet that holds a sample of the whole sound."""
        return bisect_right(self.starts, sample) - 1

    def find(self, pos: int | None, pts: int | None) -> int | None:
        """The number of the packet at this place with this time."""
        return None if pos is None else self._numbers.get((pos, pts))


class Piece(NamedTuple):
    """Samples that belong together: when they are heard (in samples), how long they last, how many are decoded."""

    stamp: float | Fraction | None
    lasting: int
    decoded: int


def find_stretches(pieces: Iterable[Piece], late: float, rate: int, gap: float, jumps: bool) -> list[Stretch]:
    """The sound between its gaps, on the clock of the pictures. ``late``: when its first sample is heard, in seconds.

    A piece whose stamp lies more than ``gap`` seconds behind the end of the piece before begins a stretch. In formats
    whose clock ``jumps``, a step of more than 10 s (FFmpeg's ``dts_delta_threshold``) is no gap.
    """
    found: list[Stretch] = []
    origin: float | Fraction | None = None
    first, time, count, clock = 0, late, 0, 0
    for stamp, lasting, decoded in pieces:
        if stamp is not None:
            # Where the clock is put back or jumps, what follows is heard without a break.
            origin = stamp if origin is None else origin
            off = float(stamp - origin) - clock
            if abs(off) > gap * rate:
                if off > 0 and count > first and off <= (_JUMP if jumps else _LONGEST_GAP) * rate:
                    end = time + (count - first) / rate
                    found.append(Stretch(time, first, end))
                    first, time = count, end + off / rate
                origin = stamp - clock
        clock += lasting
        count += decoded
    return [*found, Stretch(time, first, time + (count - first) / rate)]


def _lengths(packets: Sequence[SoundPacket], decoded: Sequence[int], tick: Fraction) -> list[int] | None:
    """Samples of each packet: as decoded, or its duration where that is a whole number of samples. Where the time base
    is too coarse (Matroska counts milliseconds), all must last as long as the decoded ones, give or take a tick."""
    if len(packets) <= PROBED or len(decoded) < PROBED:
        return None
    size = decoded[PROBED - 1]
    lengths = list(decoded[:PROBED])
    durations = [None if packet.duration is None else packet.duration * tick for packet in packets]
    # Durations are believed where the last ones that were decoded bear them out.
    believed = tick <= 1 and durations[PROBED - 2 : PROBED] == list(decoded[PROBED - 2 : PROBED])
    # The last packet may be cut short, and nothing begins after it.
    for length in durations[PROBED:-1]:
        if length is None or length <= 0:
            return None
        if believed and length.denominator == 1:
            lengths.append(int(length))
        elif decoded[PROBED - 2] == size and abs(length - size) <= tick:
            lengths.append(size)
        else:
            return None
    return [*lengths, size]
