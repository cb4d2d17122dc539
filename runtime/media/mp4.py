"""What the header of an MP4 or MOV file claims, before FFmpeg takes memory for it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import MediaError

#: Boxes that hold others on the way to the tables of samples (ISO 14496-12, 6.2.3).
_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
#: Boxes that a file may begin with.
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")


def check_samples(path: Path) -> None:
    """``MediaError`` for an MP4 or MOV file that claims more samples than it has bytes.

    FFmpeg takes 36 bytes or more for each sample of a track. A table with an entry for each is limited by the file, but
    samples of one size take no table (``stsz``), nor do those of a fragment (``trun``) whose values are all defaults.
    Sound whose samples last one tick is exempt: FFmpeg counts its chunks.
    """
    with path.open("rb") as file:
        if file.read(8)[4:] not in _FIRST:
            return
        size = os.fstat(file.fileno()).st_size
        sound = False
        claimed = ticks = 0
        for name, start in _boxes(file, 0, size):
            file.seek(start)
            if name == b"hdlr":
                sound = file.read(12)[8:] == b"soun"
            elif name == b"stts":
                # One entry: all samples last equally long.
                entries, _, length = struct.unpack(">4x3I", file.read(16).ljust(16, b"\0"))
                ticks = length if entries == 1 else 0
            elif name in (b"stsz", b"trun"):
                content = file.read(12).ljust(12, b"\0")
                count = struct.unpack(">I", content[4:8] if name == b"trun" else content[8:12])[0]
                if name == b"trun" or not (sound and ticks == 1):
                    claimed += count
            if claimed > size:
                raise MediaError(f"{path}: claims {claimed} frames in {size} bytes")


def _boxes(file: BinaryIO, place: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Names of the boxes from ``place`` to ``end`` and where their contents begin, parents before what they hold."""
    while place + 8 <= end:
        file.seek(place)
        length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        start = place + 8
        if length == 1:
            length, start = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0], place + 16
        stop = end if length == 0 else place + length
        if stop < start:
            return
        if name in _PARENTS:
            yield from _boxes(file, start, min(stop, end))
        else:
            yield name, start
        place = stop
