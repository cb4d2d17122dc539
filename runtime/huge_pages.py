"""Weights on huge pages, if the system lets a process ask for them.

A decode step reads every weight once. With pages of 4 KiB, address translation takes a good part of its time: with
pages of 2 MiB a step at the 0.5 B shape takes 0.90 of the time (``benchmarks/decode.py``). Debian, Ubuntu and JetPack
ship the setting ``madvise``: a process gets huge pages only if it asks for them.
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
    """At the end of the ``with`` block, move the memory that it allocated (pieces of 2 MiB and more) to huge pages.

    Linux only. Elsewhere, or if the kernel refuses, nothing changes and nothing is printed: only the speed differs.
    Kernels before 6.1 cannot move pages at once and do so in the background.
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
    """The process's private writable memory without a file behind it, in order of address."""
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
    """``spans`` without the parts that lie in ``taken``. Both are in order and without overlaps."""
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
