"""Huge pages: what is asked of the kernel, seen in the kernel's own account of the process."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.runtime import huge_pages as module

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Allocates 64 MiB inside the block the way malloc does, and prints what of it lies on huge pages before and after.
SCRIPT = """
import mmap, re
from intertitle.runtime.huge_pages import huge_pages
def huge():
    return int(re.search(r"AnonHugePages:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])
before = huge()
with huge_pages():
    block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE)
    for at in range(0, len(block), 4096):
        block[at:at + 8] = at.to_bytes(8, "little")
after = huge()
assert all(int.from_bytes(block[at:at + 8], "little") == at for at in range(0, len(block), 4096))
print(before, after)
"""


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel gives no huge pages")
def test_what_the_block_allocates_moves_to_huge_pages_and_keeps_its_content():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after = (int(number) for number in done.stdout.split())
    # The ends are not aligned to 2 MiB; a machine short of free memory may refuse a few.
    assert after - before >= 32 << 10


def test_a_kernel_that_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(module, "_MADV_HUGEPAGE", 12345)
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.madvise(0, 4096, 12345) == -1
    with module.huge_pages():
        block = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE)
        block[0] = 7
    assert block[0] == 7


def test_no_proc_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MAPS", tmp_path / "maps")
    with module.huge_pages():
        pass


def test_only_own_memory_is_touched(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "1000-2000 rw-p 00000000 00:00 0 \n"
        "2000-3000 r--p 00000000 00:00 0 \n"
        "3000-4000 rw-p 00000000 fe:00 77 /lib/some file.so\n"
        "4000-5000 rw-s 00000000 00:01 0 /dev/shm\n"
        "5000-6000 rw-p 00000000 00:00 0 [heap]\n"
        "6000-7000 rw-p 00000000 00:00 0 [stack]\n"
    )
    monkeypatch.setattr(module, "_MAPS", maps)
    assert module._anonymous() == [(0x1000, 0x2000), (0x5000, 0x6000)]


SPANS = st.lists(st.integers(0, 60), unique=True, max_size=12).map(
    lambda edges: list(zip(*[iter(sorted(edges[: len(edges) // 2 * 2]))] * 2, strict=True))
)


@given(SPANS, SPANS)
def test_without_is_the_difference_of_sets(spans, taken):
    def addresses(pairs):
        return {at for start, end in pairs for at in range(start, end)}

    left = module._without(spans, taken)
    assert addresses(left) == addresses(spans) - addresses(taken)
    assert all(start < end for start, end in left)
    assert np.all(np.diff([edge for pair in left for edge in pair]) >= 0)
