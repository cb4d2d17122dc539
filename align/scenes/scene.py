"""What a scene is, and the seeded draw of one.

A scene is a combination of discrete attributes, all of which can be seen or heard, and a seed for the rest (exact
positions, speeds, moments, pitches), which no caption speaks of. The hash of the combination decides the split, so a
combination that training has seen is in no other split, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from ...errors import OptionError

Split = Literal["train", "validation", "test"]
Shape = Literal["circle", "square", "triangle", "cross"]
Size = Literal["small", "large"]
When = Literal["first", "then", "throughout"]
Camera = Literal["still", "pans left", "pans right"]
BackgroundKind = Literal["plain", "checkered", "striped"]
SoundKind = Literal["silence", "low tone", "high tone", "rising tone", "falling tone", "noise", "beeps"]
_T = TypeVar("_T")

SPLITS: tuple[str, ...] = get_args(Split)
SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES: tuple[Size, ...] = get_args(Size)
CAMERAS: tuple[Camera, ...] = get_args(Camera)
BACKGROUND_KINDS: tuple[BackgroundKind, ...] = get_args(BackgroundKind)
SOUND_KINDS: tuple[SoundKind, ...] = get_args(SoundKind)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
"""Colors of things. Backgrounds have other colors, so that a thing is always visible."""
BACKGROUND_COLORS = ("white", "grey", "black")
MOVES = ("moves left", "moves right", "moves up", "moves down")
LASTING = (*MOVES, "grows", "shrinks", "bounces")
"""Actions that take time."""
MOMENTARY = ("appears", "disappears", "turns")
"""Actions that happen in a moment. ``turns`` means: to another colour."""
ACTIONS = (*LASTING, *MOMENTARY, "stays still")


@dataclass(frozen=True)
class Thing:
    """A coloured shape and the one thing that it does.

    ``to`` is the new colour of a thing that turns, empty otherwise. ``when`` is the half of the clip in which it acts;
    only lasting actions and rest go on throughout.
    """

    shape: Shape
    color: str
    size: Size
    action: str
    when: When = "throughout"
    to: str = ""

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("action", self.action, ACTIONS)
        _check("when", self.when, get_args(When))
        if (self.action == "turns") != bool(self.to):
            raise OptionError("a thing has a new color if, and only if, it turns")
        if self.to:
            _check("new color", self.to, tuple(color for color in COLORS if color != self.color))
        if self.when == "throughout" and self.momentary:
            raise OptionError(f"a thing that {self.action} does so first or then, not throughout")
        if self.when != "throughout" and self.action == "stays still":
            raise OptionError("a thing that stays still does so throughout")

    @property
    def name(self) -> str:
        """Colour and shape, which no other thing of the scene has."""
        return f"{self.color} {self.shape}"

    @property
    def momentary(self) -> bool:
        return self.action in MOMENTARY

    @property
    def deed(self) -> str:
        """The action with its colour: ``turns blue``."""
        return f"{self.action} {self.to}".rstrip()


@dataclass(frozen=True)
class Background:
    """One colour if plain, two if checkered or striped."""

    kind: BackgroundKind
    colors: tuple[str, ...]

    def __post_init__(self) -> None:
        _check("background", self.kind, BACKGROUND_KINDS)
        for color in self.colors:
            _check("background color", color, BACKGROUND_COLORS)
        if len(set(self.colors)) != len(self.colors) or len(self.colors) != (1 if self.kind == "plain" else 2):
            raise OptionError(f"a {self.kind} background is not of {' and '.join(self.colors) or 'no color'}")

    @property
    def palette(self) -> str:
        """Its colours in any order: ``grey and white``."""
        return palette(self.colors)


@dataclass(frozen=True)
class Heard:
    """What half a clip sounds like. ``count`` is the number of beeps, 0 for everything else."""

    kind: SoundKind
    count: int = 0

    def __post_init__(self) -> None:
        _check("sound", self.kind, SOUND_KINDS)
        if self.count not in ((1, 2, 3) if self.kind == "beeps" else (0,)):
            raise OptionError(f"{self.kind} cannot be counted as {self.count}")

    @property
    def name(self) -> str:
        """``low tone``, ``1 beep``, ``2 beeps``."""
        return f"{self.count} beep{'s' * (self.count > 1)}" if self.kind == "beeps" else self.kind


@dataclass(frozen=True)
class Scene:
    """All of a clip. Things are in the order of telling: who acts first, who acts then, who only stays.

    ``sounds`` are those of the two halves. ``tied`` means that one half is a single beep at the very moment at which a
    thing appears, disappears or turns in that half. ``seed`` decides what no caption speaks of.
    """

    background: Background
    camera: Camera
    things: tuple[Thing, ...]
    sounds: tuple[Heard, Heard]
    tied: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check("camera", self.camera, CAMERAS)
        if not 1 <= len(self.things) <= 3 or len({thing.name for thing in self.things}) != len(self.things):
            raise OptionError("a scene has 1 to 3 things that differ in color or shape")
        if len(self.sounds) != 2:
            raise OptionError(f"a scene has a sound for each half, not {len(self.sounds)}")
        if self.camera != "still" and self.background.kind == "plain":
            raise OptionError("a camera that pans over a plain background cannot be seen to")
        if len(self._tied_things) > 1:
            raise OptionError("a scene has one beep at the moment of one thing, not two")
        if self.tied != (self.tied_thing is not None):
            raise OptionError("a scene is tied if, and only if, a half of one beep holds a thing's moment")

    @property
    def tied_thing(self) -> Thing | None:
        """The thing whose action happens at the moment of the beep."""
        return next(iter(self._tied_things), None)

    @property
    def _tied_things(self) -> list[Thing]:
        return [thing for thing in self.things if thing.momentary and self.sounds[half_of(thing)].count == 1]

    @property
    def pair(self) -> tuple[Thing, Thing] | None:
        """The two things that act one after the other, or both throughout."""
        acting = [thing for thing in self.things if thing.action != "stays still"]
        if len(acting) != 2 or {thing.when for thing in acting} not in ({"first", "then"}, {"throughout"}):
            return None
        return (acting[1], acting[0]) if acting[0].when == "then" else (acting[0], acting[1])

    @property
    def combination(self) -> str:
        """The discrete attributes as JSON, the same for any order of the things."""
        things = sorted([thing.name, thing.size, thing.deed, thing.when] for thing in self.things)
        sounds = [sound.name for sound in self.sounds]
        colors = sorted(self.background.colors)
        return json.dumps([self.background.kind, colors, self.camera, things, sounds, self.tied])


def palette(colors: Iterable[str]) -> str:
    """One name for a set of colours, whatever the order in which they are given."""
    return " and ".join(sorted(set(colors)))


def half_of(thing: Thing) -> int:
    """0 or 1: the half in which a thing acts that does not act throughout."""
    return int(thing.when == "then")


def split_of(scene: Scene) -> str:
    """The only split that a scene with these discrete attributes can be in: 80 % train, 10 % of each other."""
    digit = int.from_bytes(hashlib.sha256(scene.combination.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(digit, "train")


def draw_scene(split: str, index: int) -> Scene:
    """The scene of an index in a split, the same on every machine.

    Raises ``OptionError`` for an unknown split or a negative index.
    """
    _check("split", split, SPLITS)
    if index < 0:
        raise OptionError(f"the index of a scene is 0 or greater, not {index}")
    rng = random.Random(f"intertitle scene {split} {index}")
    while True:
        scene = _draw(rng)
        if split_of(scene) == split:
            return scene


# --- chance


def _draw(rng: random.Random) -> Scene:
    kind = _weighted(rng, BACKGROUND_KINDS, (4, 3, 3))
    colors = rng.sample(BACKGROUND_COLORS, 1 if kind == "plain" else 2)
    background = Background(kind, tuple(sorted(colors)))
    camera: Camera = "still" if kind == "plain" else rng.choice(CAMERAS)
    things = _draw_things(rng)
    sounds, tied = _draw_sounds(rng, things)
    return Scene(background, camera, things, sounds, tied, rng.getrandbits(32))


def _draw_things(rng: random.Random) -> tuple[Thing, ...]:
    count = _weighted(rng, (1, 2, 3), (2, 6, 2))
    deeds = _draw_deeds(rng, count)
    # No other thing has the new colour, or the two could be confused.
    colors = rng.sample(COLORS, 2 * count)
    sizes: list[Size] = [rng.choice(SIZES) for _ in range(count)]
    if count == 3:
        # Two large things leave too little room for a third.
        sizes = rng.sample((sizes[0], "small", "small"), 3)
    return tuple(
        Thing(rng.choice(SHAPES), colors[i], sizes[i], action, when, colors[count + i] if action == "turns" else "")
        for i, (action, when) in enumerate(deeds)
    )


def _draw_deeds(rng: random.Random, count: int) -> list[tuple[str, When]]:
    """What the things do and when, in the order of telling."""
    halves: tuple[When, When] = ("first", "then")
    moment: tuple[str, When] = (rng.choice(MOMENTARY), rng.choice(halves))
    lasting = rng.choice((*LASTING, "stays still"))
    if count == 1:
        return [moment] if rng.random() < 0.45 else [(lasting, "throughout")]
    mode = _weighted(rng, ("order", "together", "apart"), (45, 30, 25))
    deeds: list[tuple[str, When]]
    if mode == "order":
        deeds = [(rng.choice((*LASTING, *MOMENTARY)), when) for when in halves]
    elif mode == "together":
        deeds = [(rng.choice(LASTING), "throughout") for _ in range(2)]
    else:
        deeds = [(lasting, "throughout"), moment]
    if count == 3:
        deeds.append(("stays still", "throughout"))
    return deeds


def _draw_sounds(rng: random.Random, things: Sequence[Thing]) -> tuple[tuple[Heard, Heard], bool]:
    sounds = [_draw_sound(rng) for _ in range(2)]
    moments = [thing for thing in things if thing.momentary]
    tied = rng.choice(moments) if moments and rng.random() < 0.35 else None
    for thing in moments:
        half = half_of(thing)
        if thing is tied:
            sounds[half] = Heard("beeps", 1)
        elif sounds[half].count == 1:
            # A single beep near the moment would be ambiguous: it might belong to the action or not.
            sounds[half] = Heard("beeps", rng.choice((2, 3)))
    return (sounds[0], sounds[1]), tied is not None


def _draw_sound(rng: random.Random) -> Heard:
    kind = rng.choice(SOUND_KINDS)
    # Most single beeps are tied ones.
    return Heard(kind, _weighted(rng, (1, 2, 3), (1, 3, 3)) if kind == "beeps" else 0)


def _weighted(rng: random.Random, options: Sequence[_T], weights: Sequence[int]) -> _T:
    return rng.choices(options, weights)[0]


def _check(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"{name} {value!r} is not one of {', '.join(choices)}")
