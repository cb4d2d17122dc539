"""Weights on huge pages, where the system lets a process ask for them.

A decoding step reads every weight once, and on pages of 4 KiB a good part of its time goes into address translation:
the decoder at the 0.5 B shape takes 0.90 of the time on pages of 2 MiB (``benchmarks/decode.py``). Debian, Ubuntu
and JetPack ship the setting ``madvise``, under which nothing gets them that does not ask.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: linux/mman.h
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")

Span = tuple[int, int]
"""Start and end of a range of addresses."""


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move what the block allocates, in pieces of 2 MiB and more, onto huge pages when it ends.

    Linux only; elsewhere, and on a kernel that refuses, nothing happens and nothing is said: the memory is the same
    memory, only slower to find. Kernels before 6.1 cannot move pages at once and do so in the background.
    """
    before = _anonymous()
    yield
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "madvise"):
        return
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _without(_anonymous(), before):
        start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if start < end and libc.madvise(start, end - start, _MADV_HUGEPAGE) == 0:
            libc.madvise(start, end - start, _MADV_COLLAPSE)


def _anonymous() -> list[Span]:
    """The process's own writable memory that is of no file, in order of address."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and not (name and name[0].startswith("[stack")):
            start, end = (int(part, 16) for part in addresses.split("-"))
            spans.append((start, end))
    return spans


def _without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """``spans`` less what lies in ``taken``; both in order and each without overlaps."""
    left = []
    for start, end in spans:
        for other_start, other_end in taken:
            if other_end <= start:
                continue
            if other_start >= end:
                break
            if start < other_start:
                left.append((start, other_start))
            start = max(start, other_end)
        if start < end:
            left.append((start, end))
    return left
