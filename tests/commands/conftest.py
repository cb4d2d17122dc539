"""What the tests of single commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from intertitle.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command with its arguments in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([*map(str, arguments)])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def bundle(compiled: Callable[..., Path]) -> Path:
    return compiled("clip-mistral")
