"""How a clip is looked at: which span of it, with its sound or without, and in how many visual tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import msgspec

from ..errors import OptionError
from .preprocess.duplicates import check_threshold

#: The latest time in a clip that may be asked for, in seconds: 30,000 years.
LATEST = 1e12
#: What ``parse_budget`` reads.
_SHARE, _COUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,350})?)%"), re.compile(r"[0-9]{1,18}")


def as_float(name: str, value: object) -> float:
    """A number of any library as Python's. ``OptionError``, which calls it ``name``, for what is none, a truth value
    or a number above all floats."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"{name} is a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise OptionError(f"{name} is a number below 1.8e308, not one of more digits") from None


def percent(ratio: float) -> str:
    """A ratio as text without an exponent, of as many digits as tell it from all others: ``33.3%``."""
    return f"{(Decimal(repr(ratio)) * 100).normalize():f}%"


class Share(msgspec.Struct, frozen=True, tag=True):
    """A budget of visual tokens as a share of those that the clip has: above 0, at most 1. As text ``50%``."""

    ratio: float

    def __post_init__(self) -> None:
        ratio = as_float("a share of visual tokens", self.ratio)
        if not 0 < ratio <= 1:
            raise OptionError(f"a share of visual tokens is above 0 (0%) and at most 1 (100%), not {ratio!r}")
        msgspec.structs.force_setattr(self, "ratio", ratio)

    def __str__(self) -> str:
        return percent(self.ratio)

    def of(self, available: int) -> int:
        """How many of the ``available`` tokens are kept, at least one; rounded."""
        return min(available, max(1, round(self.ratio * available)))

    def spare(self, share: float, count: int) -> float:
        """How much of the budget is left when ``share`` of the tokens, ``count`` in number, are kept.

        0 for all of it, negative for more than there is.
        """
        return self.ratio - share

    def scaled(self, part: int, whole: int) -> Share:
        """The same budget for ``part`` of the ``whole`` places of a clip."""
        return self


class Count(msgspec.Struct, frozen=True, tag=True):
    """A budget of visual tokens as a number for the whole clip: 1 or more. As text ``256``."""

    number: int

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, Integral) or self.number < 1:
            raise OptionError(f"a number of visual tokens is a whole number from 1 on, not {self.number!r}")
        msgspec.structs.force_setattr(self, "number", int(self.number))

    def __str__(self) -> str:
        return str(self.number)

    def of(self, available: int) -> int:
        """How many of the ``available`` tokens are kept."""
        return min(available, self.number)

    def spare(self, share: float, count: int) -> float:
        """How much of the budget is left when ``share`` of the tokens, ``count`` in number, are kept.

        0 for all of it, negative for more than there is.
        """
        return self.number - count

    def scaled(self, part: int, whole: int) -> Count:
        """The same budget for ``part`` of the ``whole`` places of a clip; at least one token."""
        return Count(max(1, round(self.number * part / whole)))


#: How many visual tokens of a clip the decoder gets. The type tells which kind it is: 1 token or 100 %.
TokenBudget = Share | Count


def parse_budget(text: str) -> TokenBudget:
    """The budget that a text stands for: ``50%`` is a share, ``256`` a number of tokens.

    ``OptionError`` for any other text, and for a budget that cannot be.
    """
    text = text.strip()
    if share := _SHARE.fullmatch(text):
        return Share(float(Decimal(share[1]) / 100))
    if _COUNT.fullmatch(text):
        return Count(int(text))
    raise OptionError(f"visual tokens are a share such as 50% or a number such as 256, not '{text}'")


@dataclass(frozen=True)
class Viewing:
    """What of a clip the captioner sees and hears.

    ``audio=False`` leaves the sound out. ``start`` and ``end`` (seconds) take that span of the pictures and the sound
    as if it were the whole clip; ``None`` is the beginning and the end. ``duplicates``: leave out a sampled frame that
    differs from the last kept one by at most so many grey levels (0 to 255, mean absolute difference); ``None`` keeps
    all. ``visual_tokens``: the budget of visual tokens, ``Share(0.5)`` for half of them or ``Count(256)`` for 256 of
    the whole clip; similar tokens are merged. ``None``: all that the model was made for.
    ``OptionError`` for values that cannot be.
    """

    audio: bool = True
    start: float | None = None
    end: float | None = None
    duplicates: float | None = None
    visual_tokens: TokenBudget | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.audio, bool):
            raise OptionError(f"audio is True or False, not {self.audio!r}")
        for name in ("start", "end", "duplicates"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_float(name, value))
        for name, time in (("start", self.start), ("end", self.end)):
            if time is not None and not 0 <= time <= LATEST:
                raise OptionError(f"{name} of a span is seconds from 0 to {LATEST:g}, not {time}")
        begin = self.start or 0.0
        if self.end is not None and self.end <= begin:
            raise OptionError(f"a span ends after it starts, not at {self.end:g} s when it starts at {begin:g} s")
        if self.duplicates is not None:
            check_threshold(self.duplicates)
        if not isinstance(self.visual_tokens, Share | Count | None):
            raise OptionError(
                f"visual_tokens is Share(0.5) for half of them or Count(256) for 256, not {self.visual_tokens!r}"
            )

    @property
    def record(self) -> dict[str, Any]:
        """Its fields as a record has them: the budget as text."""
        fields = {name: getattr(self, name) for name in ("audio", "start", "end", "duplicates")}
        return fields | {"visual_tokens": None if self.visual_tokens is None else str(self.visual_tokens)}
