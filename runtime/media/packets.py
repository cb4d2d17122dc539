"""The packets of a video stream, and which of them to decode for the frames that are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

#: Packets that a jump to a later keyframe must save to be worth it: refilling the decoder cost the time of 2 to 3
#: frames on two cores (640x360 and 1080p H.264), and costs more where more threads wait for work.
SEEK_COST = 8


class VideoPacket(NamedTuple):
    """What is kept of a packet. Times are in the stream's time base; ``shown``: it becomes a frame."""

    pts: int
    dts: int | None
    size: int
    keyframe: bool
    shown: bool
    duration: int


class PacketIndex:
    """The ``packets`` of a video stream, numbered in decoding order. Their pts must be distinct.

    ``keyframes`` are the numbers of those where decoding can begin, ``order[i]`` is the number of the packet that
    becomes frame i in presentation order. ``jump``: a step of the clock (dts) by more than so much, or back, is where
    recordings were joined; the next one goes on where the last one ended. ``None``: the clock is believed. ``paired``:
    a packet is a field, and two make a frame, which has the pts of the first.
    """

    def __init__(self, packets: Sequence[VideoPacket], jump: int | None = None, paired: bool = False) -> None:
        self.packets = packets
        self.paired = paired
        self.keyframes = [number for number, packet in enumerate(packets) if packet.keyframe]
        #: When each packet is shown, on one clock without jumps.
        self.clock = [packet.pts for packet in packets] if jump is None else _joined_clock(packets, jump)
        # A recording that begins inside a group of pictures shows nothing before its first keyframe.
        first = self.keyframes[0] if self.keyframes else 0
        shown = (number for number, packet in enumerate(packets) if packet.shown and number >= first)
        if paired:
            shown = (number for number in shown if number % 2 == 0)
        self.order = sorted(shown, key=self.clock.__getitem__)
        self._numbers = {packet.pts: number for number, packet in enumerate(packets)}

    @property
    def in_order(self) -> bool:
        """Whether packets come in the order of their pts, as without frames that refer to later ones."""
        return all(a < b for a, b in pairwise(self.clock))

    @property
    def times(self) -> list[int]:
        """When each frame is shown, from the first one on, in the stream's time base."""
        return [self.clock[number] - self.clock[self.order[0]] for number in self.order]

    @property
    def duration(self) -> int:
        """From the first frame to the end of the last, in the stream's time base."""
        if not self.order:
            return 0
        fields = 2 if self.paired else 1
        first, last = self.packets[self.order[0]], self.packets[self.order[-1]]
        shown = self.clock[self.order[-1]] - self.clock[self.order[0]]
        return shown + fields * (last.duration or first.duration)

    def last(self, number: int) -> int:
        """The last packet that is needed for the frame of packet ``number``."""
        return min(number + 1, len(self.packets) - 1) if self.paired else number

    def shown_at(self, pts: int) -> int:
        """The ``clock`` of a decoded frame."""
        number = self._numbers.get(pts)
        return pts if number is None else self.clock[number]

    def find(self, pts: int | None, size: int) -> int | None:
        """The number of the packet with this pts and size."""
        number = None if pts is None else self._numbers.get(pts)
        return number if number is not None and self.packets[number].size == size else None

    def entry(self, number: int) -> int:
        """The packet where decoding must begin for the frame of packet ``number``.

        That is the last keyframe before it both in decoding and in presentation order: the frames that an open group
        of pictures shows before its keyframe need the group before.
        """
        place = bisect_right(self.keyframes, number)
        while place and self.clock[self.keyframes[place - 1]] > self.clock[number]:
            place -= 1
        return self.keyframes[place - 1] if place else 0


def _joined_clock(packets: Sequence[VideoPacket], jump: int) -> list[int]:
    clock: list[int] = []
    shift, expected = 0, None
    for packet in packets:
        stamp = packet.pts if packet.dts is None else packet.dts
        if expected is not None and not (expected - packet.duration <= stamp + shift <= expected + jump):
            shift = expected - stamp
        expected = stamp + shift + packet.duration
        clock.append(packet.pts + shift)
    return clock


class Run(NamedTuple):
    """Packets ``start`` to ``stop`` inclusive, decoded in one go for the frames of those in ``wanted``."""

    start: int
    stop: int
    wanted: tuple[int, ...]


def plan_runs(wanted: Iterable[int], index: PacketIndex, seek_cost: int = SEEK_COST) -> list[Run]:
    """The runs to decode for the frames of the ``wanted`` packets, in decoding order.

    A new run begins where a jump to a later keyframe skips more than ``seek_cost`` packets.
    """
    runs: list[Run] = []
    for number in sorted(wanted):
        run = Run(index.entry(number), number, (number,))
        # The entry may lie before an earlier run's, too: that of a frame which is shown before its keyframe.
        while runs and run.start - runs[-1].stop <= seek_cost:
            last = runs.pop()
            run = Run(min(last.start, run.start), number, last.wanted + run.wanted)
        runs.append(run)
    return runs
