"""The pictures of a video file through PyAV: exactly the frames asked for, decoding as little as possible.

The packets are first read without decoding them (4 us each): that gives the true number of frames, their order and the
places where decoding can begin. A frame is known by its presentation timestamp (pts) from then on, so what comes back
is what decoding the whole file and counting would give, wherever decoding began.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from ...errors import MediaError
from .container import close_input, has_jumps, open_input, read_packets, refuse_encrypted, video_stream
from .packets import PacketIndex, Run, VideoPacket, plan_runs
from .rgb import RgbConverter
from .source import MAX_PIXELS, FrameArray

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Threads = Literal["AUTO", "SLICE"]

#: Frames a second that are taken for real. Raw DV, whose time base is 1/60000, states that as its rate.
_FASTEST = 1000
#: ``field_order`` of FFmpeg: 0 unknown, 1 progressive, from 2 on interlaced.
_INTERLACED = 2
#: Packets that are decoded to see whether two of them make a frame.
_PROBED = 12
#: Seconds; a larger step of the clock is where recordings were joined (FFmpeg's ``dts_delta_threshold``).
_JUMP = 10


class ContainerFrameReader:
    """A ``FrameReader`` over the best video stream of a file. Takes the opened ``container`` over.

    ``threads``: of the decoder, one a core when ``None``. ``MediaError`` for a stream without a frame.
    """

    def __init__(self, path: Path, container: InputContainer, threads: int | None = None) -> None:
        # 0 leaves the number to FFmpeg.
        self._threads = threads or 0
        self._path = path
        self._container = container
        self._stream = self._select_stream()
        self._coded_size = self._stream.codec_context.width, self._stream.codec_context.height
        self._size: tuple[int, int] | None = None
        self.notes: list[str] = []
        self._converter = RgbConverter(self.notes)
        self.times: npt.NDArray[np.float64] | None = None
        #: When the first frame is shown on the file's clock, in seconds; None where that is not known.
        self.origin: float | None = None
        announced = len(getattr(self._stream, "index_entries", ()))  # since PyAV 17
        self._index = self._read_index()
        self.num_frames = len(self._index.order) if self._index else sum(1 for _ in self._decode_all("AUTO"))
        if self.num_frames == 0:
            raise MediaError(f"{path}: the video has no frames")
        rates = (self._stream.average_rate, self._stream.guessed_rate)
        if self._index is None:
            self.fps = next((float(rate) for rate in rates if rate and rate <= _FASTEST), 0.0)
            self.duration = self.num_frames / self.fps if self.fps else 0.0
            return
        base = self._stream.time_base or Fraction(0)
        self.duration = float(self._index.duration * base)
        self.times = np.array(self._index.times, np.float64) * float(base)
        self.origin = float(self._index.packets[self._index.order[0]].pts * base)
        # What the container states is exact for a constant rate, and wrong where FFmpeg guesses it from the beginning.
        measured = self.num_frames / self.duration if self.duration else 0.0
        close = (float(rate) for rate in rates if rate and 0.8 < measured / float(rate) < 1.25)
        self.fps = next(close, measured)
        held = len(self._index.packets)
        if held < announced:
            self.notes.append(f"the file is cut off: it holds {held} of its {announced} frames")

    @property
    def size(self) -> tuple[int, int]:
        # The rotation is known only once a frame is decoded.
        if self._size is None:
            for _, frame in self.read([0]):
                self._size = frame.shape[1], frame.shape[0]
        assert self._size is not None
        return self._size

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, FrameArray]]:
        """See ``FrameReader.read``."""
        missing = set(indices)
        if self._index is not None:
            places = {self._index.order[index]: index for index in indices}
            for run in plan_runs(places, self._index):
                for number, frame in self._decode_run(self._index, run):
                    missing.discard(places[number])
                    yield places[number], self._to_rgb(frame)
        if missing:
            yield from self._read_through(sorted(missing))

    def walk(self) -> Iterator[tuple[float, VideoFrame]]:
        """Every frame that can be decoded, in presentation order, with its time in seconds (see ``times``)."""
        index, last = self._index, 0.0
        base = float(self._stream.time_base or 0)
        start = index.clock[index.order[0]] if index else 0
        for count, frame in enumerate(self._decode_all("AUTO")):
            if index is None or frame.pts is None:
                time = count / self.fps if self.fps else 0.0
            else:
                time = (index.shown_at(frame.pts) - start) * base
            # A damaged file may show frames again that were shown before.
            last = max(last, time)
            yield last, frame

    def close(self) -> None:
        close_input(self._container)

    def _select_stream(self, threads: Threads = "AUTO") -> VideoStream:
        stream = video_stream(self._container)
        if stream is None:
            raise MediaError(f"{self._path}: the video disappeared while it was being read")
        stream.thread_type = threads
        stream.codec_context.thread_count = self._threads
        # The size may change midway: the decoder refuses what `check_size` would.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream

    def _reopen(self, threads: Threads = "AUTO") -> None:
        close_input(self._container)
        self._container = open_input(self._path)
        self._stream = self._select_stream(threads)

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        """The packets that hold something."""
        return (packet for packet in read_packets(self._container, self._stream) if packet.size)

    def _read_index(self) -> PacketIndex | None:
        """None for a stream without true presentation times, whose frames can only be counted by decoding."""
        decoder = self._stream.codec_context
        packets: list[VideoPacket] = []
        cut = False
        for packet in self._packets():
            if not packets:
                refuse_encrypted(self._path, packet)
            if packet.pts is None:
                return None
            # The show_frame bit (RFC 6386, 9.1): VP8 keeps frames that are only referred to in packets of their own.
            shown = not packet.is_discard and (decoder.name != "vp8" or bool(memoryview(packet)[0] & 0x10))
            packets.append(
                VideoPacket(packet.pts, packet.dts, packet.size, packet.is_keyframe, shown, packet.duration or 0)
            )
            cut = packet.is_corrupt
        if packets and cut:
            packets.pop()
        if len({packet.pts for packet in packets}) < len(packets):
            return None
        fields = self._count_fields(packets)
        if fields is None:
            return None
        base = self._stream.time_base
        jump = int(_JUMP / base) if base and has_jumps(self._container) else None
        index = PacketIndex(packets, jump, paired=fields == 2)
        # AVI (and what is copied from it) writes down only the order of decoding: frames that are shown out of that
        # order have lost their times. MP4 always has them.
        doubtful = decoder.has_b_frames and index.in_order and "mp4" not in self._container.format.name
        return None if doubtful else index

    def _count_fields(self, packets: list[VideoPacket]) -> int | None:
        """Packets that make a frame: 2 where each holds a field (PAFF H.264, MPEG-2), else 1.

        None where only some do: such frames can only be counted by decoding.
        """
        if len(packets) < 2 or not self._may_hold_fields():
            return 1
        self._reopen()
        frames = sent = 0
        for packet in islice(self._packets(), _PROBED):
            with suppress(FFmpegError):
                frames += len(_decode(self._stream, packet))
            sent += 1
        with suppress(FFmpegError):
            frames += len(_decode(self._stream, None))
        decoder = self._stream.codec_context
        if frames >= sent - 1 or decoder.name not in ("h264", "mpeg2video", "hevc"):
            return 1
        paired = frames == sent // 2 and len({packet.duration for packet in packets[:-1]}) == 1
        return 2 if paired and len(packets) % 2 == 0 else None

    def _may_hold_fields(self) -> bool:
        decoder = self._stream.codec_context
        order = getattr(decoder, "field_order", 0)
        if order or decoder.name != "h264":
            return order >= _INTERLACED
        # MP4 keeps no order of fields, and PyAV 15 tells none. The rate is then that of packets; H.264 states that of
        # frames.
        packets = max(self._stream.average_rate or 0, self._stream.base_rate or 0)
        return bool(decoder.framerate and packets >= 1.5 * decoder.framerate)

    def _packets_from(self, index: PacketIndex, start: int) -> Iterator[Packet[VideoStream]]:
        """The packets from number ``start`` on. Where a seek lands is checked; failing that, all are read through."""
        first: Packet[VideoStream] | None = None
        packets = iter(())
        at = index.packets[start]
        try:
            self._container.seek(at.pts if at.dts is None else at.dts, stream=self._stream)
            packets = self._packets()
            first = next(packets, None)
        except FFmpegError:
            pass
        landed = None if first is None else index.find(first.pts, first.size)
        if first is None or landed is None or landed > start:
            self._reopen()
            packets = self._packets()
        else:
            packets = chain((first,), packets)
        for packet in packets:
            if index.find(packet.pts, packet.size) == start:
                return chain((packet,), packets)
        return iter(())

    def _decode_run(self, index: PacketIndex, run: Run) -> Iterator[tuple[int, VideoFrame]]:
        """The wanted packets of a run with their frames, until damage shows.

        What stands in for lost data depends on all that was decoded before, so from there only a full decode can tell.
        """
        wanted = {index.packets[number].pts: number for number in run.wanted}
        begin, end = index.clock[run.start], index.packets[index.last(run.stop)].pts
        needed = wanted if not index.paired else {index.packets[index.last(number)].pts for number in run.wanted}
        try:
            packets = self._packets_from(index, run.start)
            for frame in self._decode_until(packets, end, {*wanted, *needed}):
                # Frames shown before the keyframe are not this run's; they may well lack what they refer to.
                if frame.is_corrupt and (frame.pts is None or index.shown_at(frame.pts) >= begin):
                    return
                if frame.pts in wanted:
                    yield wanted.pop(frame.pts), frame
        except FFmpegError:
            return

    def _decode_until(
        self, packets: Iterator[Packet[VideoStream]], end: int, wanted: Collection[int]
    ) -> Iterator[VideoFrame]:
        """The frames of ``packets`` up to the one with pts ``end``; of H.264 those with a pts in ``wanted`` at least.

        No frame needs an H.264 frame that is marked as not referenced, so these are decoded only where wanted.
        """
        decoder = self._stream.codec_context
        can_skip = decoder.name == "h264"
        for packet in packets:
            if can_skip:
                decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from _decode(self._stream, packet)
            if packet.pts == end:
                break
        yield from _decode(self._stream, None)

    def _decode_all(self, threads: Threads) -> Iterator[VideoFrame]:
        """Every frame of the file in presentation order; damaged packets are passed over."""
        self._reopen(threads)
        for packet in chain(self._packets(), (None,)):
            try:
                frames = _decode(self._stream, packet)
            except FFmpegError:
                continue
            yield from frames

    def _read_through(self, missing: list[int]) -> Iterator[tuple[int, FrameArray]]:
        """The frames at ``missing`` (ascending) by decoding the file from its start, stand-ins where there are none.

        Frames are told by their pts, or counted where the stream has none.
        """
        index, before, replaced = self._index, None, []
        # A damaged packet takes the frames down that other threads are decoding, so of such a file none are.
        for count, frame in enumerate(self._decode_all("SLICE" if index else "AUTO")):
            at = count if index is None or frame.pts is None else index.shown_at(frame.pts)
            while missing and self._due(missing[0], index, frame) <= at:
                exact = self._due(missing[0], index, frame) == at
                if not exact:
                    replaced.append(missing[0])
                yield missing.pop(0), self._to_rgb(frame if exact or before is None else before)
            before = frame
            if not missing:
                break
        if missing and before is None:
            raise MediaError(f"{self._path}: no frame of the video can be decoded")
        for number in missing:
            assert before is not None
            yield number, self._to_rgb(before)
        replaced += missing
        if replaced:
            some = ", ".join(map(str, replaced[:8])) + (", ..." if len(replaced) > 8 else "")
            self.notes.append(f"frames that cannot be decoded ({some}) were replaced by the nearest earlier one")

    @staticmethod
    def _due(number: int, index: PacketIndex | None, frame: VideoFrame) -> int:
        return number if index is None or frame.pts is None else index.clock[index.order[number]]

    def _to_rgb(self, frame: VideoFrame) -> FrameArray:
        """uint8 ``[H, W, 3]``, turned as the display matrix says, in the size that the file announces.

        The colours are those of ffmpeg's scale filter (``RgbConverter``); for frames of even height and 8 bits that are
        not interlaced, these are also what decord gives.
        """
        width, height = self._coded_size
        rescaled = f"frames change size midway: all were scaled to {width}x{height}"
        if (frame.width, frame.height) != self._coded_size and rescaled not in self.notes:
            self.notes.append(rescaled)
        image = self._converter.convert(frame, width, height).to_ndarray()
        return _oriented(image.astype(np.uint8, copy=False), frame)


def _decode(stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    """The frames that are ready after ``packet`` (None: all that are left)."""
    try:
        return stream.codec_context.decode(packet)
    except FFmpegError as error:
        if isinstance(error, MemoryError):
            # Else this would pass for damage of the file.
            raise MemoryError from error
        raise


def _oriented(image: FrameArray, frame: VideoFrame) -> FrameArray:
    """``image`` turned and mirrored by the frame's display matrix, as players and ffmpeg do (multiples of 90 degrees).

    The matrix takes a source pixel to ``x' = a x + c y``, ``y' = b x + d y`` (libavutil/display.h).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("5i", bytes(matrix)[:20])
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if turned:
        image = image.transpose(1, 0, 2)
    flip_y, flip_x = (b < 0, c < 0) if turned else (d < 0, a < 0)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
