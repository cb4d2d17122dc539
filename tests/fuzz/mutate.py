"""Mutations of bytes: blind ones, and ones that know where the parts of a file lie."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .chunks import Chunk, find_chunks, mend_checksums

_EDGES = (0, 1, -1, 2, 7, 8, 9, 16, 63, 64, 65, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536)
_WIDE = (1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 16, 1 << 40, (1 << 62) - 1, (1 << 63) - 1)
#: Larger mutants are cut: they would only be slow.
MOST_BYTES = 1 << 18


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A mutant of ``content``; parts of ``others`` may come in. The same for the same state of ``rng``."""
    for _ in range(min(int(rng.expovariate(0.5)) + 1, 8)):
        if not content:
            break
        chunks = find_chunks(content) if rng.random() < 0.6 else []
        if chunks:
            content = rng.choice(_STRUCTURED)(content, chunks, others, rng)
        else:
            content = rng.choice(_BLIND)(content, others, rng)
    if rng.random() < 0.8:
        content = mend_checksums(content)
    return content[:MOST_BYTES]


def _place(content: bytes, rng: random.Random) -> int:
    """Heads decide more than bodies: half of the places are among the first bytes."""
    return rng.randrange(min(len(content), 256) if rng.random() < 0.5 else len(content))


def _number(size: int, old: int, rng: random.Random) -> int:
    value = rng.choice((*_EDGES, *_WIDE[: 4 if size < 5 else None], old + 1, old - 1, old * 2, old // 2, old ^ 1))
    return value & ((1 << 8 * size) - 1)


def _bits(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        out[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _bytes(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        out[_place(content, rng)] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
    return bytes(out)


def _integer(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
    place = _place(content, rng)
    old = int.from_bytes(content[place : place + size], order)  # type: ignore[arg-type]
    return content[:place] + _number(size, old, rng).to_bytes(size, order) + content[place + size :]  # type: ignore[arg-type]


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(content, rng)
    return start, min(start + int(2 ** rng.uniform(0, 11)), len(content))


def _delete(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + content[stop:]


def _repeat(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 2, 10)) + content[stop:]


def _fill(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    filling = rng.choice((b"\0", b"\xff", None))
    return content[:start] + (filling * (stop - start) if filling else rng.randbytes(stop - start)) + content[stop:]


def _splice(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    start, stop = _span(other, rng)
    place = _place(content, rng)
    return content[:place] + other[start:stop] + content[place + rng.choice((0, stop - start)) :]


def _join(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return content + other[rng.choice((0, 0, 13, _place(other, rng))) :]


def _truncate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content) + 1)]


_BLIND: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...] = (
    _bits, _bits, _bytes, _bytes, _integer, _integer, _integer, _delete, _repeat, _fill, _splice, _join, _truncate
)  # fmt: skip


def _edit(content: bytes, chunk: Chunk, start: int, stop: int, new: bytes, mend: bool) -> bytes:
    """``content[start:stop]`` replaced by ``new``; ``mend``: the lengths of the chunks around it follow."""
    out = bytearray(content)
    more = len(new) - (stop - start)
    if mend and more:
        for parent in chunk.parents:
            at, size, order = parent.length_at, parent.length_size, "big" if parent.big else "little"
            length = int.from_bytes(content[at : at + size], order) + more  # type: ignore[arg-type]
            out[at : at + size] = (length & ((1 << 8 * size) - 1)).to_bytes(size, order)  # type: ignore[arg-type]
    out[start:stop] = new
    return bytes(out)


def _chunk_length(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    chunk = rng.choice(chunks)
    if not chunk.length_size:
        return _bits(content, others, rng)
    at, size, order = chunk.length_at, chunk.length_size, "big" if chunk.big else "little"
    old = int.from_bytes(content[at : at + size], order)  # type: ignore[arg-type]
    return content[:at] + _number(size, old, rng).to_bytes(size, order) + content[at + size :]  # type: ignore[arg-type]


def _chunk_delete(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    chunk = rng.choice(chunks)
    return _edit(content, chunk, chunk.start, chunk.stop, b"", rng.random() < 0.8)


def _chunk_repeat(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    chunk = rng.choice(chunks)
    new = content[chunk.start : chunk.stop] * rng.choice((1, 1, 2, 20))
    return _edit(content, chunk, chunk.stop, chunk.stop, new, rng.random() < 0.8)


def _chunk_swap(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    first, second = rng.choice(chunks), rng.choice(chunks)
    new = content[first.start : first.stop]
    return _edit(content, second, second.start, second.stop, new, rng.random() < 0.8)


def _chunk_foreign(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    theirs = find_chunks(other)
    if not theirs:
        return _splice(content, others, rng)
    taken, chunk = rng.choice(theirs), rng.choice(chunks)
    stop = rng.choice((chunk.start, chunk.stop))
    return _edit(content, chunk, chunk.start, stop, other[taken.start : taken.stop], rng.random() < 0.8)


def _chunk_name(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    chunk, other = rng.choice(chunks), rng.choice(chunks)
    if not chunk.name_at:
        return _bytes(content, others, rng)
    name = rng.choice((content[other.name_at : other.name_at + 4], rng.randbytes(4), bytes(4), b"free"))
    return content[: chunk.name_at] + name + content[chunk.name_at + 4 :]


def _chunk_body(content: bytes, chunks: list[Chunk], others: Sequence[bytes], rng: random.Random) -> bytes:
    """The blind mutations within one chunk, its own length right."""
    chunk = rng.choice(chunks)
    body = content[chunk.body : chunk.stop]
    if not body:
        return content
    return (
        content[: chunk.body]
        + rng.choice((_bits, _bytes, _integer, _integer, _fill))(body, others, rng)[: len(body)]
        + content[chunk.stop :]
    )


_STRUCTURED: tuple[Callable[[bytes, list[Chunk], Sequence[bytes], random.Random], bytes], ...] = (
    _chunk_length, _chunk_delete, _chunk_repeat, _chunk_swap, _chunk_foreign, _chunk_name, *[_chunk_body] * 5
)  # fmt: skip
