"""Captions of a scene: one that says everything in a regular way, and paraphrases that may leave facts out.

None says anything that is not so. The grammar is small: sentences of what things do, of the background, of the camera
and of the two halves of the sound, in varying words and order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ...errors import OptionError
from .lexicon import SAYINGS
from .scene import Heard, Scene, Thing, half_of


def captions(scene: Scene, count: int = 5) -> list[str]:
    """Different true captions. The first says all facts in the plainest words; the rest paraphrase, some say less.

    The same for the same scene and seed. Raises ``OptionError`` unless count is from 1 to 16.
    """
    if not 1 <= count <= 16:
        raise OptionError(f"a scene has 1 to 16 captions, not {count}")
    rng = random.Random(f"intertitle captions {scene.combination} {scene.seed}")
    found = [_Writer(scene, None).caption()]
    while len(found) < count:
        # The second caption, too, leaves nothing out.
        text = _Writer(scene, rng, complete=len(found) == 1).caption()
        if text not in found:
            found.append(text)
    return found


@dataclass
class _Writer:
    """Writes one caption; without chance the plainest and fullest."""

    scene: Scene
    rng: random.Random | None
    complete: bool = True

    def caption(self) -> str:
        grounded = self._keep(0.9)
        inline = grounded and not self._chance(0.35)
        acts = self._acts(inline)
        if grounded and not inline:
            # A background of its own comes before or after the things, never between what "then" connects.
            sentence = self._background_sentence()
            acts = [sentence, *acts] if self._chance(0.5) else [*acts, sentence]
        parts = [acts]
        if self._keep(0.75):
            parts.append([self._camera()])
        sounds = self._sounds()
        if sounds:
            parts.insert(0 if self._chance(0.25) else len(parts), sounds)
        return " ".join(_sentence(text) for part in parts for text in part)

    # --- chance

    def _say(self, meaning: str) -> str:
        ways = SAYINGS[meaning]
        return self.rng.choice(ways) if self.rng and self.rng.random() < 0.6 else ways[0]

    def _chance(self, share: float) -> bool:
        """False in the plainest caption."""
        return self.rng is not None and self.rng.random() < share

    def _keep(self, share: float) -> bool:
        """Whether a fact is said: always, in a complete caption."""
        return self.rng is None or self.complete or self.rng.random() < share

    # --- what is seen

    def _acts(self, inline: bool) -> list[str]:
        """Sentences of what the things do, the background in the first of them if it is ``inline``."""
        things = list(self.scene.things)
        where = ""
        if inline:
            where = f"{self._say('over')} a {self._background()} background"
        front = bool(where) and self._chance(0.25)
        behind = f" {where}" if where and not front else ""
        sentences: list[str] = []
        pair = self.scene.pair
        if pair is not None:
            things = [thing for thing in things if thing not in pair]
            one, two = (self._clause(thing) for thing in pair)
            sentences += self._pair(one + behind, two, pair[0].when == "throughout", front)
        for index, thing in enumerate(things):
            alone = self._clause(thing, exist=not front and self._chance(0.2))
            said_when = thing.when != "throughout" and self._keep(0.85)
            place = behind if not sentences and not index else ""
            if said_when and self._chance(0.4) and not (front and not sentences and not index):
                sentences.append(f"{self._prefix(half_of(thing))} {alone}{place}")
            else:
                sentences.append(f"{alone} {self._say(thing.when)}{place}" if said_when else alone + place)
        if front:
            sentences[0] = f"{where}, {sentences[0]}"
        return sentences

    def _pair(self, one: str, two: str, together: bool, front: bool) -> list[str]:
        if not self._keep(0.85):
            return [one, two]
        if together:
            return [f"while {one}, {two}"] if not front and self._chance(0.3) else [f"{one} while {two}"]
        if self._chance(0.25):
            return [one, f"{'then' if self._chance(0.5) else 'afterwards'} {two}"]
        return [f"{'first ' * (not front and self._chance(0.25))}{one}, then {two}"]

    def _clause(self, thing: Thing, exist: bool = False) -> str:
        size = f"{self._say(thing.size)} " if self._keep(0.85) else ""
        opening = ("there is a ", " that") if exist else ("a ", "")
        return _article(f"{opening[0]}{size}{thing.name}{opening[1]} {self._deed(thing)}")

    def _deed(self, thing: Thing) -> str:
        if thing.action.startswith("moves"):
            return f"{self._say('moves')} {self._say(thing.action.split()[1])}"
        return f"{self._say(thing.action)} {thing.to}".rstrip()

    def _background(self) -> str:
        colors = list(self.scene.background.colors)
        if self._chance(0.3):
            colors.reverse()
        return f"{self._say(self.scene.background.kind)} {' and '.join(colors)}"

    def _background_sentence(self) -> str:
        return f"the background is {self._background()}"

    def _camera(self) -> str:
        if self.scene.camera == "still":
            return f"the {self._say('camera')} {self._say('camera still')}"
        verb = "pans" if not self._chance(0.3) else "moves"
        return f"the {self._say('camera')} {verb} {self._say(self.scene.camera.split()[1])}"

    # --- what is heard

    def _sounds(self) -> list[str]:
        """One sentence of both halves, or one of each that is said."""
        first, second = self.scene.sounds
        keep = [self._keep(0.88), self._keep(0.88)]
        halves = [self._heard(half) for half in (0, 1)]
        if first == second and first.kind in ("silence", "low tone", "high tone", "noise") and all(keep):
            return [f"{halves[0]} {self._say('throughout')}"]
        if not all(keep):
            return [f"{self._prefix(half)} {halves[half]}" for half in (0, 1) if keep[half]]
        if self._chance(0.15):
            return [f"{self._prefix(half)} {halves[half]}" for half in (0, 1)]
        return [f"{'first ' * self._chance(0.25)}{halves[0]}, then {halves[1]}"]

    def _prefix(self, half: int) -> str:
        return ("at first", "at the end")[half]

    def _heard(self, half: int) -> str:
        text = self._sound(self.scene.sounds[half])
        tied = self.scene.tied_thing
        if tied is not None and half_of(tied) == half and self._keep(0.85):
            text += f" {self._say('as')} the {tied.name} {self._deed(tied)}"
        return text

    def _sound(self, heard: Heard) -> str:
        if heard.kind == "silence":
            return self._say("silence")
        if heard.kind == "noise":
            return f"{self._say('noise')} {self._say('is heard')}"
        if heard.kind == "beeps":
            if heard.count == 1:
                return f"{self._say('1')} beep {'is heard' if self._chance(0.3) else 'sounds'}"
            return f"{self._say(str(heard.count))} beeps {self._say('are heard')}"
        pitch = heard.kind.split()[0]
        return f"a {self._say(pitch)} {self._say('tone')} {self._say('is heard')}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _article(text: str) -> str:
    """The only word of the lexicon that asks for "an" is a colour."""
    return text.replace("a orange", "an orange")
