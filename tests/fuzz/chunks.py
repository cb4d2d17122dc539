"""Where the parts of a media file lie: enough of each container's grammar to move its parts about."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Bytes ``start:stop`` of a file. Its length stands at ``length_at`` in ``length_size`` bytes (0: nowhere)."""

    start: int
    stop: int
    length_at: int = 0
    length_size: int = 0
    big: bool = True
    body: int = 0
    name_at: int = 0
    parents: tuple[Chunk, ...] = ()


_BOXES = set(b"moov trak mdia minf stbl edts udta moof traf mvex dinf meta iprp ipco".split())
_MASTERS = {0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0xE1, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB, 0xB7, 0x114D9B74}


def find_chunks(content: bytes) -> list[Chunk]:
    """The parts of a file of a known grammar, outer ones before inner ones; none of an unknown one."""
    if content[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return list(_boxes(content, 0, len(content), ()))
    if content[:4] in (b"RIFF", b"RIFX"):
        return list(_riff(content, 0, len(content), ()))
    if content[:4] == b"\x1aE\xdf\xa3":
        return list(_ebml(content, 0, len(content), ()))
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return list(_png(content))
    if content[:4] == b"FORM":
        return [Chunk(0, len(content), 4, 4, True, 12, 0), *_simple(content, 12, True)]
    if content[:4] == b"caff":
        return list(_caf(content))
    if content[:2] == b"\xff\xd8":
        return list(_jpeg(content))
    if content[:4] == b"OggS":
        return list(_starts(content, b"OggS"))
    if content[:3] == b"FLV":
        return list(_flv(content))
    if content[:1] == b"G" and content[188:189] == b"G":
        return [Chunk(at, at + 188, body=at + 4) for at in range(0, len(content) - 187, 188)]
    if content[:4] == b"DKIF":
        return list(_ivf(content))
    for mark in (b"\x00\x00\x00\x01", b"\x00\x00\x01", b"FRAME"):
        if content.count(mark) > 2:
            return list(_starts(content, mark))
    return []


def _boxes(content: bytes, place: int, end: int, parents: tuple[Chunk, ...]) -> Iterator[Chunk]:
    while place + 8 <= end:
        size = int.from_bytes(content[place : place + 4], "big")
        if size < 8 or place + size > end:
            return
        chunk = Chunk(place, place + size, place, 4, True, place + 8, place + 4, parents)
        yield chunk
        name = content[place + 4 : place + 8]
        if name in _BOXES:
            yield from _boxes(content, place + (12 if name == b"meta" else 8), place + size, (*parents, chunk))
        elif name == b"stsd":
            yield from _boxes(content, place + 16, place + size, (*parents, chunk))
        place += size


def _riff(content: bytes, place: int, end: int, parents: tuple[Chunk, ...]) -> Iterator[Chunk]:
    while place + 8 <= end:
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        stop = min(place + 8 + size + size % 2, end)
        chunk = Chunk(place, stop, place + 4, 4, False, place + 8, place, parents)
        yield chunk
        if content[place : place + 4] in (b"RIFF", b"LIST"):
            yield from _riff(content, place + 12, stop, (*parents, chunk))
        elif content[place : place + 4] == b"ANMF":
            yield from _riff(content, place + 24, stop, (*parents, chunk))
        place = stop


def _simple(content: bytes, place: int, big: bool) -> Iterator[Chunk]:
    while place + 8 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "big" if big else "little")
        stop = min(place + 8 + size + size % 2, len(content))
        yield Chunk(place, stop, place + 4, 4, big, place + 8, place)
        place = stop


def _caf(content: bytes) -> Iterator[Chunk]:
    place = 8
    while place + 12 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 12], "big", signed=True)
        stop = len(content) if size < 0 else min(place + 12 + size, len(content))
        yield Chunk(place, stop, place + 4, 8, True, place + 12, place)
        place = stop


def _png(content: bytes) -> Iterator[Chunk]:
    place = 8
    while place + 12 <= len(content):
        stop = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if stop > len(content):
            return
        yield Chunk(place, stop, place, 4, True, place + 8, place + 4)
        place = stop


def _number(content: bytes, place: int, keep: bool) -> tuple[int, int]:
    """An EBML number and its bytes; ``keep`` its mark, as in names."""
    if place >= len(content) or not content[place]:
        return 0, 0
    size = 9 - content[place].bit_length()
    value = int.from_bytes(content[place : place + size], "big")
    return (value if keep else value & ((1 << 7 * size) - 1)), size


def _ebml(content: bytes, place: int, end: int, parents: tuple[Chunk, ...]) -> Iterator[Chunk]:
    while place < end:
        name, name_size = _number(content, place, True)
        size, length_size = _number(content, place + name_size, False)
        if not name_size or not length_size:
            return
        body = place + name_size + length_size
        unknown = size == (1 << 7 * length_size) - 1
        stop = end if unknown else min(body + size, end)
        chunk = Chunk(place, stop, place + name_size, length_size, True, body, place, parents)
        yield chunk
        if name in _MASTERS:
            yield from _ebml(content, body, stop, (*parents, chunk))
        place = max(stop, body)


def _jpeg(content: bytes) -> Iterator[Chunk]:
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        stop = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        yield Chunk(place, min(stop, len(content)), place + 2, 2, True, place + 4, place + 1)
        if content[place + 1] == 0xDA:
            return
        place = stop


def _flv(content: bytes) -> Iterator[Chunk]:
    place = 13
    while place + 11 <= len(content):
        stop = place + 15 + int.from_bytes(content[place + 1 : place + 4], "big")
        if stop > len(content):
            return
        yield Chunk(place, stop, place + 1, 3, True, place + 11, place)
        place = stop


def _ivf(content: bytes) -> Iterator[Chunk]:
    place = 32
    while place + 12 <= len(content):
        stop = place + 12 + int.from_bytes(content[place : place + 4], "little")
        if stop > len(content):
            return
        yield Chunk(place, stop, place, 4, False, place + 12, place + 4)
        place = stop


def _starts(content: bytes, mark: bytes) -> Iterator[Chunk]:
    place = content.find(mark)
    while place >= 0:
        following = content.find(mark, place + len(mark))
        yield Chunk(place, len(content) if following < 0 else following, body=place + len(mark))
        place = following


def mend_checksums(content: bytes) -> bytes:
    """PNG and Ogg with checksums that are right again, so that damage behind them is looked at."""
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        out = bytearray(content)
        for chunk in _png(content):
            out[chunk.stop - 4 : chunk.stop] = zlib.crc32(content[chunk.start + 4 : chunk.stop - 4]).to_bytes(4, "big")
        return bytes(out)
    if content[:4] == b"OggS":
        out = bytearray(content)
        for chunk in _starts(content, b"OggS"):
            if chunk.stop - chunk.start >= 27:
                out[chunk.start + 22 : chunk.start + 26] = bytes(4)
                checksum = _ogg_crc(bytes(out[chunk.start : chunk.stop]))
                out[chunk.start + 22 : chunk.start + 26] = checksum.to_bytes(4, "little")
        return bytes(out)
    return content


def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


_OGG = _ogg_table()


def _ogg_crc(page: bytes) -> int:
    """RFC 3533, section 6: polynomial 0x04c11db7, begin 0, nothing reflected."""
    crc = 0
    for byte in page:
        crc = (crc << 8 & 0xFFFFFFFF) ^ _OGG[crc >> 24 ^ byte]
    return crc
