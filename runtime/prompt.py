"""Prompts are assembled here, and nowhere else: a layout, an instruction and the tokens of the stages, in order.

The runtime, ``calibration.verify`` and ``align`` use it. Shapes: H decoder width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..contract.pipeline import TIMED, VARIABLES, EachOf, Ids, Piece, PromptLayout, Text, Tokens
from ..errors import BundleError, OptionError

_VARIABLE = re.compile(r"\{(" + "|".join(VARIABLES) + r")\}")

Array = TypeVar("Array")


@dataclass(frozen=True, eq=False)
class Timing:
    """What a prompt may say of a clip's time: its length in ``seconds``, and the ``times`` of its places, float64
    ``[T]``."""

    seconds: float
    times: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slot:
    """The place of a block in a prompt: the tokens of a stage's unit, or with ``unit`` ``None`` of all its units."""

    stage: str
    unit: int | None = None


def choose_pieces(layout: PromptLayout, timing: Timing | None) -> tuple[Piece, ...]:
    """The pieces of a layout for a clip. ``OptionError`` where they speak of times that are not known."""
    if timing is None and speaks_of_time(layout.pieces):
        if not layout.untimed:
            raise OptionError(
                "the prompt of this captioner says when each frame is shown: give frame_times= and seconds= with "
                "frames="
            )
        return layout.untimed
    return layout.pieces


def speaks_of_time(pieces: Sequence[Piece]) -> bool:
    """Whether a piece names a variable that needs a clip's times."""
    return any(name in TIMED for text in texts_of(pieces) for name in variables(text))


def variables(text: str) -> list[str]:
    """The variables that a text names, in order."""
    return _VARIABLE.findall(text)


def texts_of(pieces: Sequence[Piece]) -> list[str]:
    """All texts of the pieces."""
    found: list[str] = []
    for piece in pieces:
        if isinstance(piece, Text):
            found += [piece.text, piece.behind]
        elif isinstance(piece, EachOf):
            found += [piece.before, piece.after, piece.separator]
    return found


def unit_slots(pieces: Sequence[Piece]) -> set[str]:
    """The stages of whose tokens a prompt has a block for each unit."""
    return {piece.stage for piece in pieces if isinstance(piece, EachOf)}


def build_prompt(
    tokenizer: Tokenizer,
    pieces: Sequence[Piece],
    instruction: str,
    units: Mapping[str, int],
    timing: Timing | None = None,
    places: int = 0,
) -> list[list[int] | Slot]:
    """A prompt in order: token ids, and between them the slots of the clip's tokens.

    ``units``: the units of each stage. ``places``: those of the clip. Neighbouring texts are tokenized as one, without
    special tokens; ids and slots part them (VideoLLaMA2 ``mm_utils.tokenizer_multimodal_token``, docs/facts.md 1.5).
    """
    found: list[list[int] | Slot] = []
    texts: list[Text] = []
    values = _values(instruction, timing, places)
    for part in (*_flat(pieces, units, values), []):
        if isinstance(part, Text):
            if part.text:
                texts.append(part)
            continue
        if texts:
            found.append(_tokenized(tokenizer, texts))
            texts = []
        if part:
            found.append(part)
    return found


def _tokenized(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[int]:
    """The ids of neighbouring texts. ``BundleError`` where the first one's ``behind`` is no token."""
    lead = texts[0].behind
    ids = tokenizer.encode(lead + "".join(text.text for text in texts), add_special_tokens=False).ids
    if not lead:
        return ids
    if ids[:1] != [tokenizer.token_to_id(lead)]:
        raise BundleError(f"tokenizer.json: {lead!r}, which the prompt names, is not a special token")
    return ids[1:]


def segments(pieces: Sequence[list[int] | Array]) -> tuple[list[list[int] | Array], ...]:
    """What stands before the first block of the clip, from it to the last one, and behind that: what a cache can keep
    of a prompt when the clip, or only the instruction, changes."""
    places = [place for place, piece in enumerate(pieces) if not isinstance(piece, list)]
    first, last = (places[0], places[-1] + 1) if places else (len(pieces), len(pieces))
    return tuple([*pieces[start:stop]] for start, stop in ((0, first), (first, last), (last, len(pieces))))


def joined(
    pieces: Sequence[list[int] | npt.NDArray[np.float32]],
    embed: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """Pieces as the decoder's input ``[S, H]``: token ids through ``embed``, blocks ``[tokens, H]`` as they are."""
    parts = [embed(np.array(piece, np.int64)) if isinstance(piece, list) else piece for piece in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _flat(
    pieces: Sequence[Piece], units: Mapping[str, int], values: Callable[[str, int], str]
) -> Iterator[Text | list[int] | Slot]:
    """The pieces one by one, texts filled in."""
    for piece in pieces:
        if isinstance(piece, Text):
            yield Text(values(piece.text, 0), piece.behind)
        elif isinstance(piece, Ids):
            yield list(piece.ids)
        elif isinstance(piece, Tokens):
            yield Slot(piece.stage)
        else:
            for unit in range(units[piece.stage]):
                if unit:
                    yield Text(values(piece.separator, unit))
                yield Text(values(piece.before, unit + 1))
                yield Slot(piece.stage, unit)
                yield Text(values(piece.after, unit + 1))


def _values(instruction: str, timing: Timing | None, places: int) -> Callable[[str, int], str]:
    """What fills in a text; the second argument is the number of the unit."""
    known = {"instruction": instruction, "count": str(places)}
    if timing is not None:
        known |= {
            "seconds": f"{timing.seconds:.2f}",
            "times": ",".join(f"{time:.2f}s" for time in timing.times),
        }

    def fill(text: str, index: int) -> str:
        # One pass: an instruction that spells a variable is not filled in again.
        return _VARIABLE.sub(lambda match: (known | {"index": str(index)})[match[1]], text)

    return fill
