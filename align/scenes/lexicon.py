"""The words of captions, by meaning: captions are written with them and texts are read with them.

``SAYINGS`` has what a writer chooses from, the plainest first. ``PHRASES`` is what a reader knows: each of the same
words, alone or as a fixed phrase, with its role. A word of neither is unread.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .scene import BACKGROUND_COLORS, BACKGROUND_KINDS, COLORS, SHAPES

Role = Literal[
    "article",
    "beep",
    "break",
    "camera",
    "color",
    "count",
    "deed",
    "direction",
    "filler",
    "ground",
    "kind",
    "link",
    "move",
    "pan",
    "pitch",
    "shape",
    "size",
    "sound",
    "stop",
    "tie",
    "tone",
    "turn",
    "when",
]


class Sign(NamedTuple):
    """What a phrase stands for."""

    role: Role
    value: str = ""


SAYINGS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "moves": ("moves", "slides", "travels"),
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "stays still": ("stays still", "does not move", "rests in place"),
    "appears": ("appears", "shows up"),
    "disappears": ("disappears", "vanishes"),
    "grows": ("grows", "gets larger"),
    "shrinks": ("shrinks", "gets smaller"),
    "bounces": ("bounces", "hops up and down"),
    "turns": ("turns", "becomes", "changes to"),
    "plain": ("plain", "solid"),
    "checkered": ("checkered", "checked"),
    "striped": ("striped", "banded"),
    "over": ("over", "on", "in front of"),
    "camera": ("camera", "view"),
    "camera still": ("stays still", "does not move", "is fixed"),
    "low": ("low", "deep"),
    "high": ("high", "shrill"),
    "rising": ("rising", "climbing"),
    "falling": ("falling", "sinking"),
    "tone": ("tone", "note"),
    "noise": ("noise", "static"),
    "silence": ("there is silence", "it is quiet", "no sound is heard"),
    "is heard": ("is heard", "sounds", "plays"),
    "are heard": ("sound", "are heard"),
    "1": ("one", "a single"),
    "2": ("two",),
    "3": ("three",),
    "first": ("early", "at first"),
    "then": ("late", "at the end"),
    "throughout": ("throughout", "all the time"),
    "as": ("as", "just when"),
}
"""Ways to say a thing, the plainest first."""

PHRASES: dict[tuple[str, ...], Sign] = {
    (".",): Sign("stop"),
    (",",): Sign("break"),
}


def _know(role: Role, value: str, *phrases: str) -> None:
    for phrase in phrases:
        PHRASES[tuple(phrase.split())] = Sign(role, value)


for _name in (*COLORS, *BACKGROUND_COLORS):
    _know("color", _name, _name)
for _name in SHAPES:
    _know("shape", _name, _name)
for _name in ("small", "large"):
    _know("size", _name, *SAYINGS[_name])
for _name in BACKGROUND_KINDS:
    _know("kind", _name, *SAYINGS[_name])
for _name in ("left", "right", "up", "down"):
    _know("direction", _name, *SAYINGS[_name])
for _name in ("stays still", "appears", "disappears", "grows", "shrinks", "bounces"):
    _know("deed", _name, *SAYINGS[_name])
for _name in ("low", "high", "rising", "falling"):
    _know("pitch", _name, *SAYINGS[_name])
for _name in ("first", "then", "throughout"):
    _know("when", _name, *SAYINGS[_name])
for _name in "123":
    _know("count", _name, *SAYINGS[_name])
_know("article", "a", "a", "an")
_know("article", "the", "the")
_know("deed", "stays still", "is fixed", "still")
_know("deed", "bounces", "hops")
_know("move", "", *SAYINGS["moves"])
_know("pan", "", "pans")
_know("turn", "", *SAYINGS["turns"], "changes")
_know("ground", "", "background")
_know("camera", "", *SAYINGS["camera"])
_know("tone", "", *SAYINGS["tone"])
_know("sound", "noise", *SAYINGS["noise"])
_know("sound", "silence", *SAYINGS["silence"], "silence", "quiet", "no sound")
_know("beep", "one", "beep")
_know("beep", "many", "beeps")
_know("link", "then", "then", "afterwards")
_know("link", "while", "while")
_know("when", "first", "first")
_know("tie", "", *SAYINGS["as"], "when")
_know("filler", "", "and", "is", "are", "heard", "sounds", "sound", "plays", "there", "it", "that", "gets")
_know("filler", "", "of", "in", "on", "over", "front", "to", "at", "with")

WORDS: tuple[str, ...] = tuple(sorted({word for phrase in PHRASES for word in phrase}))
"""Every word of a caption, in lower case, with its two punctuation marks."""

LONGEST = max(map(len, PHRASES))
"""Words of the longest phrase."""
