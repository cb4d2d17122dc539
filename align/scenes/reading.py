"""Reading a text with the lexicon, word by word, so that ungrammatical text says as much as can be made out.

There is no parse that could fail: words of quality are kept until a noun takes them, verbs and words of time go to the
last noun, and what finds no noun is unread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .lexicon import LONGEST, PHRASES, Sign
from .scene import BACKGROUND_COLORS, palette

_WORD = r"[a-z]+|[0-9]+|[.,;:!?\n]"
_STOPS = {"!": ".", "?": ".", ";": ".", ":": ".", "\n": "."}


@dataclass(eq=False)
class Being:
    """A thing as a text has it. An empty colour was not said."""

    shape: str
    color: str
    sizes: set[str] = field(default_factory=set)
    deeds: set[str] = field(default_factory=set)
    whens: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}".strip()


@dataclass
class Reading:
    """All statements of a text.

    ``orders`` has (one, "then" or "while", other); ``sounds`` (name, half or None where the text has no word for it).
    """

    beings: list[Being] = field(default_factory=list)
    orders: list[tuple[Being, str, Being]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    colors: set[str] = field(default_factory=set)
    camera: set[str] = field(default_factory=set)
    sounds: list[tuple[str, int | None]] = field(default_factory=list)
    ties: list[Being] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def read(text: str) -> Reading:
    """What the text says. Never raises."""
    reader = _Reader()
    found: list[str] = re.findall(_WORD, text.lower())
    words = [_STOPS.get(word, word) for word in found]
    position = 0
    while position < len(words):
        for length in range(min(LONGEST, len(words) - position), 0, -1):
            sign: Sign | None = PHRASES.get(tuple(words[position : position + length]))
            if sign is not None:
                break
        else:
            length, sign = 1, None
        phrase = " ".join(words[position : position + length])
        if sign is None or not reader.take(sign):
            reader.reading.unread.append(phrase)
        position += length
    return reader.finish()


class _Reader:
    def __init__(self) -> None:
        self.reading = Reading()
        self.subject: Being | str | None = None
        """The last noun: a being, "ground", "camera", "sound", or nothing since the sentence began."""
        self.actor: Being | None = None
        """The last being that was not named only to say what a beep belongs to."""
        self.acted = False
        """Whether this sentence has such a being."""
        self.link = ""
        self.linked: Being | None = None
        self.tie = False
        self.verb = ""
        self.opening = True
        """At the beginning of a clause a word of time belongs to the noun to come, later to the last one."""
        self.when = ""
        self.sounds: list[list[str]] = []
        """Names with "first", "then", "throughout" or nothing."""
        self._forget()

    def _forget(self) -> None:
        self.colors: list[str] = []
        self.kind = self.size = self.pitch = self.count = ""

    def finish(self) -> Reading:
        self._stop("")
        ordered = any(when == "then" for _, when in self.sounds)
        for name, when in self.sounds:
            if when == "throughout":
                self.reading.sounds += [(name, 0), (name, 1)]
            else:
                half = {"first": 0, "then": 1}.get(when, 0 if ordered else None)
                self.reading.sounds.append((name, half))
        return self.reading

    def take(self, sign: Sign) -> bool:
        """Make of a phrase what can be made of it; whether anything could."""
        done = getattr(self, f"_{sign.role}")(sign.value)
        # "At first" and "the end" are words of time; an article may stand between them and their noun.
        self.opening = sign.role in ("stop", "break", "link") or (self.opening and sign.role in ("when", "article"))
        return done is not False

    # --- sentences

    def _stop(self, _: str) -> None:
        self._settle_ground()
        self._forget()
        self.subject, self.acted, self.tie, self.verb, self.when = None, False, False, "", ""
        if self.link == "while":
            self.link = ""

    def _break(self, _: str) -> None:
        if self.subject == "ground":
            self._settle_ground()
            self.subject = None
        self.tie, self.verb = False, ""

    def _link(self, value: str) -> None:
        self._settle_ground()
        # "While A moves, B grows": the link is to the second of the two.
        self.link, self.linked = value, self.actor if value == "then" or self.acted else None
        self.tie, self.verb = False, ""

    def _tie(self, _: str) -> bool:
        self.tie = self.subject == "sound"
        return self.tie

    def _filler(self, _: str) -> None:
        pass

    def _article(self, value: str) -> None:
        # A new noun begins, so that "the background is grey and a red circle moves" is of two colours.
        if self.subject == "ground":
            self._settle_ground()
        self.count = "1" if value == "a" else ""

    # --- words of quality

    def _color(self, value: str) -> None:
        if self.verb == "turn" and isinstance(self.subject, Being):
            self.subject.deeds.add(f"turns {value}")
            self.verb = ""
        else:
            self.colors.append(value)

    def _kind(self, value: str) -> None:
        self.kind = value

    def _size(self, value: str) -> None:
        self.size = value

    def _pitch(self, value: str) -> None:
        self.pitch = value

    def _count(self, value: str) -> None:
        self.count = value

    # --- nouns

    def _shape(self, value: str) -> None:
        color = self.colors.pop() if self.colors else ""
        if self.subject == "ground":
            self._settle_ground()
        being = self._being(value, color)
        if self.size:
            being.sizes.add(self.size)
        self._forget()
        self.verb = ""
        if self.tie:
            self.reading.ties.append(being)
            self.tie = False
        else:
            self._connect(being)
            self.actor, self.acted = being, True
            if self.when:
                being.whens.add(self.when)
                self.when = ""
        self.subject = being

    def _being(self, shape: str, color: str) -> Being:
        """The one that the text has named so before, or a new one."""
        for being in reversed(self.reading.beings):
            if being.shape == shape and color in ("", being.color):
                return being
        self.reading.beings.append(Being(shape, color))
        return self.reading.beings[-1]

    def _connect(self, being: Being) -> None:
        if self.link and self.linked is not None and self.linked is not being:
            self.reading.orders.append((self.linked, self.link, being))
            self.link = ""
        elif self.link == "while" and self.linked is None:
            self.linked = being
        else:
            self.link = ""

    def _ground(self, _: str) -> None:
        self._settle_ground()
        self.subject, self.verb = "ground", ""

    def _settle_ground(self) -> None:
        """Give the background the words of quality that were kept for a noun."""
        if self.subject != "ground" and not self.kind and not any(color in BACKGROUND_COLORS for color in self.colors):
            return
        if self.kind:
            self.reading.kinds.add(self.kind)
        if self.colors:
            self.reading.colors.add(palette(self.colors))
        self.kind, self.colors = "", []

    def _camera(self, _: str) -> None:
        self._settle_ground()
        self._forget()
        self.subject, self.verb, self.link = "camera", "", ""

    def _tone(self, _: str) -> bool:
        return bool(self.pitch) and self._hear(f"{self.pitch} tone")

    def _sound(self, value: str) -> bool:
        return self._hear(value)

    def _beep(self, value: str) -> bool:
        count = self.count or ("1" if value == "one" else "")
        return self._hear({"": "beeps", "1": "1 beep"}.get(count, f"{count} beeps"))

    def _hear(self, name: str) -> bool:
        self._settle_ground()
        self._forget()
        after = self.link == "then" and bool(self.sounds)
        self.sounds.append([name, "then" if after else self.when])
        self.subject, self.verb, self.link, self.when, self.tie = "sound", "", "", "", False
        return True

    # --- verbs and words of time

    def _deed(self, value: str) -> bool:
        self.verb = ""
        if isinstance(self.subject, Being):
            self.subject.deeds.add(value)
            return True
        if self.subject == "camera" and value == "stays still":
            self.reading.camera.add("still")
            return True
        return False

    def _move(self, _: str) -> bool:
        self.verb = "move"
        return isinstance(self.subject, Being) or self.subject == "camera"

    _pan = _move

    def _turn(self, _: str) -> bool:
        self.verb = "turn"
        return isinstance(self.subject, Being)

    def _direction(self, value: str) -> bool:
        if isinstance(self.subject, Being):
            self.subject.deeds.add(f"moves {value}")
            return True
        if self.subject == "camera":
            self.reading.camera.add(f"pans {value}")
            return True
        return False

    def _when(self, value: str) -> bool:
        if self.opening:
            self.when = value
            return True
        if self.subject == "sound":
            self.sounds[-1][1] = value
            return True
        if isinstance(self.subject, Being):
            self.subject.whens.add(value)
            return True
        return False
