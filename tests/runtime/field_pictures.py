"""An H.264 stream of 64x64 pixels and 25 frames a second with a picture for each field (PAFF), which x264 cannot make.

Macroblocks are raw samples (I_PCM); frame n has luma ``20 + 2 n`` (ITU-T H.264, 7.3).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av

_WIDTH, _HEIGHT = 4, 4  # in macroblocks
_GROUP = 12


class _Bits:
    def __init__(self) -> None:
        self.text = ""

    def fixed(self, width: int, *values: int) -> _Bits:
        self.text += "".join(format(value, f"0{width}b") for value in values)
        return self

    def golomb(self, *values: int) -> _Bits:
        for value in values:
            binary = format(value + 1, "b")
            self.text += "0" * (len(binary) - 1) + binary
        return self

    def align(self) -> _Bits:
        self.text += "0" * (-len(self.text) % 8)
        return self

    def unit(self, header: int) -> bytes:
        """The NAL unit, with a stop bit at its end and bytes that keep start codes out of it."""
        self.fixed(1, 1).align()
        out, zeros = bytearray([header]), 0
        for place in range(0, len(self.text), 8):
            byte = int(self.text[place : place + 8], 2)
            if zeros >= 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes(out)


def _parameters() -> bytes:
    sequence = _Bits().fixed(8, 77, 0, 30).golomb(0, 0, 0, 4, 1).fixed(1, 0).golomb(_WIDTH - 1, _HEIGHT // 2 - 1)
    # Fields are allowed; the timing is 50 ticks a second, two a frame.
    sequence.fixed(1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1).fixed(32, 1, 50).fixed(1, 1, 0, 0, 0, 0)
    picture = _Bits().golomb(0, 0).fixed(1, 0, 0).golomb(0, 0, 0).fixed(1, 0).fixed(2, 0).golomb(0, 0, 0)
    return sequence.unit(0x67) + picture.fixed(1, 0, 0, 0).unit(0x68)


def _field(frame: int, bottom: int) -> bytes:
    place = frame % _GROUP
    first = place == 0 and not bottom
    bits = _Bits().golomb(0, 7, 0).fixed(4, place).fixed(1, 1, bottom)
    if first:
        bits.golomb(0)
    bits.fixed(8, 2 * place + bottom).fixed(1, *((0, 0) if first else (0,))).golomb(0)
    for _ in range(_WIDTH * _HEIGHT // 2):
        bits.golomb(25).align().fixed(8, *([20 + 2 * frame] * 256 + [128] * 128))
    delimiter = _Bits().fixed(3, 0)
    return (
        delimiter.unit(9) + (_parameters() if place == 0 else b"") * (not bottom) + bits.unit(0x65 if first else 0x61)
    )


def write_field_pictures(path: Path, frames: int) -> Path:
    """The stream in the container that the name of ``path`` says, each field with a time of its own."""
    raw = path.with_suffix(".h264")
    raw.write_bytes(b"".join(_field(frame, bottom) for frame in range(frames) for bottom in (0, 1)))
    with av.open(str(raw), options={"framerate": "50"}) as source, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        packets = (packet for packet in source.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            changed: Any = packet
            changed.pts = changed.dts = number * 1800
            changed.duration, changed.time_base, changed.stream = 1800, Fraction(1, 90_000), stream
            copy.mux(changed)
    return path
