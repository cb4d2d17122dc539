"""What an image file holds, told from its chunks before any decoder sees it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from ...errors import MediaError

PNG = b"\x89PNG\r\n\x1a\n"
#: The chunks of an animation (PNG, third edition, 11.2.6). A still image needs none of them, and OpenCV's reader of
#: animations crashes on damaged ones (opencv/opencv#27744).
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
#: Bytes of an image file that are taken for real.
MAX_BYTES = 1 << 29


def read_image_file(path: Path) -> bytes:
    """The content, ``MediaError`` for one that cannot be read or is larger than ``MAX_BYTES``."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MediaError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, too large for an image")
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error


def is_animated(path: Path, head: bytes) -> bool:
    """Whether a PNG or WebP file that begins with ``head`` (32 bytes) is an animation."""
    if head.startswith(PNG):
        with path.open("rb") as file:
            file.seek(len(PNG))
            # The control chunk stands before the first image data.
            while len(start := file.read(8)) == 8 and start[4:] not in (b"IDAT", b"IEND"):
                if start[4:] == b"acTL":
                    frames = file.read(4)
                    return len(frames) == 4 and struct.unpack(">I", frames)[0] > 1
                file.seek(struct.unpack(">I", start[:4])[0] + 4, 1)
        return False
    # The extended header's flags (RFC 9649, 2.7.1).
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 2)


def still_png(content: bytes) -> bytes:
    """``content`` without what makes it an animation: OpenCV then never enters that part of its reader.

    ``ValueError`` for chunks that are none: names that are no letters, lengths beyond the end, no header first.
    """
    kept = [PNG]
    for number, (name, start, stop) in enumerate(_chunks(content)):
        if number == 0 and (name != b"IHDR" or stop - start != 25):
            raise ValueError("has no header")
        if name not in _ANIMATION:
            kept.append(content[start:stop])
    return b"".join(kept)


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of each chunk of a PNG, up to the last one."""
    place = len(PNG)
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place) if place + 12 <= len(content) else (0, b"")
        stop = place + 12 + length
        if not name.isalpha() or stop > len(content):
            raise ValueError("is damaged or cut off")
        yield name, place, stop
        if name == b"IEND":
            return
        place = stop


def webp_animation(content: bytes) -> tuple[int, int, int]:
    """Width and height of the canvas and the number of frames of an animated WebP. ``ValueError`` without them."""
    if len(content) < 30:
        raise ValueError("is cut off")
    width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
    place, frames = 12, 0
    while place + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, place)
        frames += name == b"ANMF"
        place += 8 + length + length % 2
    return width, height, frames


def image_size(content: bytes) -> tuple[int, int] | None:
    """Width and height that a still image states; None where it does not, which decoders then find out."""
    try:
        if content.startswith(PNG):
            return struct.unpack_from(">II", content, 16)
        if content.startswith(b"\xff\xd8"):
            return _jpeg_size(content)
        if content.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", content, 18)
            return abs(width), abs(height)
        if content.startswith((b"II*\0", b"MM\0*")):
            return _tiff_size(content)
        if content[4:12] == b"ftypavif":
            # The largest of the images that the file holds: ISO 23008-12, 6.5.3.
            places = [found.end() + 4 for found in re.finditer(b"ispe", content[: 1 << 16])]
            return max((struct.unpack_from(">II", content, place) for place in places), default=None)
        return _webp_size(content)
    except struct.error:
        return None


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Of the frame header (ITU-T T.81, B.2.2), before which only segments with a length stand."""
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        # Of the markers from SOF0 to SOF15 three are something else: DHT, JPG and DAC.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, place + 5)
            return width, height
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", content, place + 2)[0]
    return None


def _tiff_size(content: bytes) -> tuple[int, int] | None:
    """Of the first directory: the entries ImageWidth and ImageLength (TIFF 6.0, 2)."""
    order = "<" if content.startswith(b"II") else ">"
    (place,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, place)
    sides = {}
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag, form = struct.unpack_from(f"{order}HH", content, entry)
        if tag in (256, 257):
            (sides[tag],) = struct.unpack_from(order + ("H" if form == 3 else "I"), content, entry + 8)
    return (sides[256], sides[257]) if len(sides) == 2 else None


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Of the first chunk (RFC 9649, 2.5 to 2.7): lossy, lossless or extended."""
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return webp_animation(content)[:2]
    return None
