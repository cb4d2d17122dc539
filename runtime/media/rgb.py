"""Decoded frames as RGB, by the conversion that ffmpeg's scale filter makes without options."""

from __future__ import annotations

import errno
from fractions import Fraction
from typing import TYPE_CHECKING

from av.filter import Graph
from av.video.reformatter import Colorspace, Interpolation

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

#: The note of a file whose colour matrix swscale does not know.
_UNKNOWN_MATRIX = "its colours are in a matrix that is not known here: they were taken for BT.601"


class RgbConverter:
    """Converts and scales frames. ``notes`` grows by a line for a colour matrix that is not known.

    Where swscale knows no such matrix (YCgCo, ICtCp, SMPTE 2085, BT.2020 with constant luminance), the colours are
    taken for BT.601, as the ffmpeg command line does.
    """

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._graph: Graph | None = None
        self._graph_of: tuple[object, ...] = ()

    def convert(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """An ``rgb24`` frame of ``width`` x ``height`` by ffmpeg's scale filter, to the bit what ffmpeg 5.1 gives.

        So it is with PyAV 15, 18 and 19, for 8 and 10 bits, interlaced or not, BT.601 and BT.709. PyAV's reformatter is
        no faster and off by 0.9 to 1.8 grey levels in the mean for interlaced frames, 1.0 to 1.4 for 10 bits and, in
        PyAV 15, 8.5 for BT.709 (testsrc2 at 320x240 and 640x480).
        """
        try:
            return self._filtered(frame, width, height)
        except OSError as error:
            self._take_for_601(frame, error)
        return self._filtered(frame, width, height)

    def small(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """A ``bgr24`` frame of ``width`` x ``height``, each pixel the mean of those it stands for."""
        try:
            return frame.reformat(width, height, "bgr24", interpolation=Interpolation.AREA)
        except OSError as error:
            self._take_for_601(frame, error)
        return frame.reformat(width, height, "bgr24", interpolation=Interpolation.AREA)

    def _filtered(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, width, height)
        if self._graph is None or self._graph_of != kind:
            graph = Graph()
            # Else it starts a thread for each core; decoding has its own. PyAV 15 does not offer this.
            if hasattr(graph, "threads"):
                graph.threads = 1
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
            )
            steps = [source, graph.add("scale", f"{width}:{height}"), graph.add("format", "rgb24")]
            graph.link_nodes(*steps, graph.add("buffersink")).configure()
            self._graph, self._graph_of = graph, kind
        try:
            self._graph.vpush(frame)
            return self._graph.vpull()
        except OSError:
            self._graph = None
            raise

    def _take_for_601(self, frame: VideoFrame, error: OSError) -> None:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or frame.colorspace == Colorspace.ITU601:
            raise error
        if _UNKNOWN_MATRIX not in self._notes:
            self._notes.append(_UNKNOWN_MATRIX)
        frame.colorspace = Colorspace.ITU601
