"""What is true of a scene, and how much of it a text says.

A fact is a triple of strings. The facts of a scene are 8 to 16: for each thing that it exists (colour and shape), its
size, what it does, and when, where that is not said by the order of two; the background's kind and colours; the
camera; the order of two that act; the sound of each half; the thing that the beep belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .reading import Being, Reading, read
from .scene import Scene, Thing


class Fact(NamedTuple):
    """Subject, attribute and value: ``("red circle", "action", "moves left")``."""

    subject: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Comparison:
    """The comparison of a text with a scene.

    ``mentioned`` and ``missed`` are the scene's facts; ``invented`` are statements of the text that are false, a thing
    that is not there with each thing said of it. ``sound_claims`` is all that the text says of the sound, true or not.
    ``unread`` are the words that no rule could place.
    """

    mentioned: frozenset[Fact]
    missed: frozenset[Fact]
    invented: frozenset[Fact]
    sound_claims: frozenset[Fact]
    unread: tuple[str, ...]

    @property
    def sound_mentioned(self) -> frozenset[Fact]:
        """The facts of the sound that the text gets right."""
        return frozenset(fact for fact in self.mentioned if fact.subject == "sound")

    @property
    def completeness(self) -> float:
        """The share of the scene's facts that is mentioned."""
        return len(self.mentioned) / (len(self.mentioned) + len(self.missed))

    @property
    def invention(self) -> float:
        """The share of false statements; 0 for a text that states nothing."""
        return len(self.invented) / max(len(self.invented) + len(self.mentioned), 1)


def facts(scene: Scene) -> frozenset[Fact]:
    """Everything that a caption of the scene can say."""
    found = [
        Fact("background", "kind", scene.background.kind),
        Fact("background", "colors", scene.background.palette),
        Fact("camera", "motion", scene.camera),
        Fact("sound", "first half", scene.sounds[0].name),
        Fact("sound", "second half", scene.sounds[1].name),
    ]
    pair = scene.pair
    for thing in scene.things:
        found.append(Fact(thing.name, "exists", "yes"))
        found.append(Fact(thing.name, "size", thing.size))
        found.append(Fact(thing.name, "action", thing.deed))
        if thing.when != "throughout" and pair is None:
            found.append(Fact(thing.name, "when", thing.when))
    if pair is not None:
        found.append(_order(pair[0].name, pair[1].name, "while" if pair[0].when == "throughout" else "then"))
    if scene.tied_thing is not None:
        found.append(Fact("sound", "tied", scene.tied_thing.name))
    return frozenset(found)


def compare(scene: Scene, text: str) -> Comparison:
    """Read the text and compare each of its statements with the scene. No text raises an error."""
    reading = read(text)
    truth = facts(scene)
    matches = _match(scene.things, reading.beings)
    claims: dict[Fact, bool] = {}
    for being in reading.beings:
        claims |= _claims_of_being(being, matches.get(id(being)))
    claims |= _claims_of_order(reading, matches, scene)
    for attribute, values in (("kind", reading.kinds), ("colors", reading.colors)):
        claims |= _against(truth, (Fact("background", attribute, value) for value in values))
    claims |= _against(truth, (Fact("camera", "motion", value) for value in reading.camera))
    sound = _claims_of_sound(reading, scene)
    for being in reading.ties:
        thing = matches.get(id(being))
        sound[Fact("sound", "tied", thing.name if thing else being.name)] = scene.tied and thing == scene.tied_thing
    claims |= sound
    mentioned = truth & {claim for claim, holds in claims.items() if holds}
    invented = frozenset(claim for claim, holds in claims.items() if not holds)
    return Comparison(mentioned, truth - mentioned, invented, frozenset(sound), tuple(reading.unread))


# --- statements, each with whether it holds


def _against(truth: frozenset[Fact], claims: Iterable[Fact]) -> dict[Fact, bool]:
    return {claim: claim in truth for claim in claims}


def _match(things: Iterable[Thing], beings: Iterable[Being]) -> dict[int, Thing]:
    """The thing that each being of the text means. The closest pair is matched first, each thing once."""
    scores = [
        (-_agreement(thing, being), order, number, thing, being)
        for order, being in enumerate(beings)
        for number, thing in enumerate(things)
        if being.color == thing.color or being.shape == thing.shape
    ]
    found: dict[int, Thing] = {}
    for _, _, _, thing, being in sorted(scores, key=lambda score: score[:3]):
        if id(being) not in found and thing not in found.values():
            found[id(being)] = thing
    return found


def _agreement(thing: Thing, being: Being) -> int:
    same = 5 * (being.color == thing.color) + 4 * (being.shape == thing.shape)
    return same + 2 * (thing.size in being.sizes) + 2 * (thing.deed in being.deeds)


def _claims_of_being(being: Being, thing: Thing | None) -> dict[Fact, bool]:
    right = thing is not None and being.shape == thing.shape and being.color == thing.color
    name = thing.name if thing is not None else being.name
    claims = {Fact(name, "size", size): thing is not None and size == thing.size for size in being.sizes}
    claims |= {Fact(name, "action", deed): thing is not None and deed == thing.deed for deed in being.deeds}
    claims |= {Fact(name, "when", when): thing is not None and when == thing.when for when in being.whens}
    # "A circle" without its colour names nothing that could be mentioned, and is false only if there is no circle.
    if being.color or thing is None:
        claims[Fact(being.name, "exists", "yes")] = right
    return claims


def _claims_of_order(reading: Reading, matches: dict[int, Thing], scene: Scene) -> dict[Fact, bool]:
    """An order in which a thing takes part that is not there has been counted as that thing's existence."""
    claims: dict[Fact, bool] = {}
    for one, link, two in reading.orders:
        first, second = matches.get(id(one)), matches.get(id(two))
        if first is None or second is None or first is second:
            continue
        whens = ("throughout", "throughout") if link == "while" else ("first", "then")
        claims[_order(first.name, second.name, link)] = (first.when, second.when) == whens
    return claims


def _claims_of_sound(reading: Reading, scene: Scene) -> dict[Fact, bool]:
    halves = [sound.name for sound in scene.sounds]
    claims: dict[Fact, bool] = {}
    for name, where in reading.sounds:
        true = [half for half in (0, 1) if halves[half] == name or (name == "beeps" and scene.sounds[half].count)]
        if where is None:
            # Without a word of when, a sound is true of the half that has it.
            half = next((half for half in true if Fact("sound", _HALVES[half], name) not in claims), None)
            attribute = "some time" if half is None else _HALVES[half]
            claims[Fact("sound", attribute, name)] = half is not None
        else:
            claims[Fact("sound", _HALVES[where], name)] = where in true
    return claims


_HALVES = ("first half", "second half")


def _order(one: str, two: str, link: str) -> Fact:
    """While is the same in both directions."""
    names = sorted((one, two)) if link == "while" else (one, two)
    return Fact("events", "order", f" {link} ".join(names))
