"""One seed for each kind of fault, to see that the fuzzer tells them apart."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from intertitle.errors import MediaError


class FaultyTarget:
    expected = ()

    def __init__(self, folder: Path) -> None:
        del folder

    def make(self, seed: int) -> tuple[str, bytes]:
        return f"fault-{seed}", b""

    def run(self, seed: int, name: str, content: bytes) -> None:
        if seed == 1:
            crash()
        if seed == 2:
            hang()
        if seed == 3:
            assert len(bytearray(b"x") * (9 << 27))
        if seed == 4:
            raise RuntimeError("not foreseen")
        if seed == 5:
            raise MediaError("of ours")
        if seed == 6:
            try:
                raise AssertionError("of ours, perhaps")
            except AssertionError as error:
                raise MediaError("a line") from error


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    until = time.process_time() + 60
    while time.process_time() < until:
        pass
