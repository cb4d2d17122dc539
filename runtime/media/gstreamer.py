"""The pictures of a video file through GStreamer, whose decoder on a Jetson is hardware (``nvv4l2decoder``).

The frames are those that PyAV's index of the packets counts, decoded from the beginning by ``gst-launch-1.0`` in a
process of its own: a board's decoder is fast and has no use for the processor, but knows nothing of seeking to the bit.
What it does not give (a damaged frame, a codec without a decoder) is decoded as always. Chosen with
``INTERTITLE_VIDEO_DECODER=gstreamer``.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import MediaError
from .source import FrameArray
from .video import ContainerFrameReader

_LAUNCH, _INSPECT = "gst-launch-1.0", "gst-inspect-1.0"


class GStreamerFrameReader(ContainerFrameReader):
    """A ``FrameReader``; ``MediaError`` where GStreamer is not installed."""

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, FrameArray]]:
        """See ``FrameReader.read``."""
        if shutil.which(_LAUNCH) is None:
            raise MediaError(f"{_LAUNCH} is not installed, which INTERTITLE_VIDEO_DECODER=gstreamer asks for")
        missing = sorted(indices)
        # GStreamer turns nothing by itself, and a stream whose frames cannot be told apart is counted by decoding.
        if self._index is not None and not self._turned():
            for number, frame in self._decoded(missing[-1] if missing else -1):
                if missing and number == missing[0]:
                    yield missing.pop(0), frame
        if missing:
            self.notes.append(f"GStreamer gave {len(indices) - len(missing)} of {len(indices)} frames: PyAV the others")
            yield from super().read(missing)

    @property
    def size(self) -> tuple[int, int]:
        if self._size is None:
            for _, frame in ContainerFrameReader.read(self, [0]):
                self._size = frame.shape[1], frame.shape[0]
        assert self._size is not None
        return self._size

    def _turned(self) -> bool:
        frame = next(self._decode_all("AUTO"), None)
        return frame is None or frame.side_data.get("DISPLAYMATRIX") is not None

    def _decoded(self, last: int) -> Iterator[tuple[int, FrameArray]]:
        """Frames 0 to ``last`` with their numbers, as far as they come."""
        width, height = self._coded_size
        # RGBA, whose lines are never padded.
        caps = f"video/x-raw,format=RGBA,width={width},height={height}"
        convert = "nvvidconv" if _has_element("nvvidconv") else "videoconvert"
        # gst-launch parses its arguments as a text, so a name is never among them: the opened file is its input.
        command = [_LAUNCH, "-q", "fdsrc", "fd=0", "!", "decodebin", "!", convert, "!", caps]
        with self._path.open("rb") as file:
            process = subprocess.Popen(
                [*command, "!", "fdsink", "fd=1", "sync=false"],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert process.stdout is not None
        try:
            for number in range(last + 1):
                data = process.stdout.read(width * height * 4)
                if len(data) < width * height * 4:
                    return
                pixels = np.frombuffer(data, np.uint8).reshape(height, width, 4)
                yield number, np.ascontiguousarray(pixels[:, :, :3])
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _has_element(name: str) -> bool:
    if shutil.which(_INSPECT) is None:
        return False
    return subprocess.run([_INSPECT, name], capture_output=True, check=False).returncode == 0
