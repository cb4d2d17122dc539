"""The texts of SynPO's data over a compiled captioner: captions of segments, and candidates for the whole clip.

The four steps (docs/facts.md 2.2): segments are captioned one by one; the whole clip is captioned several times; each
caption is refined by a second look with the first in the prompt; the results are judged (``scorers``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import BundleError, IntertitleError, MediaError, OptionError, TargetError
from ...runtime.batching import BatchItem, as_item_error
from ...runtime.caption import Caption
from ...runtime.captioner import Captioner, PreparedClip
from ...runtime.decoding import Decoding
from ...runtime.media.segments import SHORTEST, Span, media_duration
from ...runtime.viewing import Viewing
from ..scenes import SECONDS, Scene
from .items import Item, equal_spans, scene_media

CAUTIOUS = (
    "Describe this part of the video in a few sentences. Say only what is certain; leave out whatever is unclear, and "
    "guess nothing about what comes before or after."
)
"""Asked of segments: what is said of them is later held for true."""


@dataclass(frozen=True)
class Recipe:
    """How many candidates of which kind, and how they are decoded.

    ``candidates`` are sampled from one prefill at SynPO's temperature, top-p and top-k (docs/facts.md 2.2); beside them
    come a greedy caption and one for each of ``contrast_alpha`` (temporal, 0.5 is SynPO's). ``retrospective``: every
    caption, those of segments too, is replaced by what a second look makes of it. ``prompt``: ``None`` is the bundle's
    own instruction; ``segment_prompt``: ``None`` is that of the whole clip. ``viewing``: of every clip, whose span is
    its own. The seed of an item follows from ``seed`` and its key, not from its place.
    """

    candidates: int = 8
    contrast_alpha: tuple[float, ...] = (0.5,)
    temperature: float = 0.9
    top_p: float = 0.95
    top_k: int = 32
    retrospective: bool = True
    max_new_tokens: int | None = None
    prompt: str | None = None
    segment_prompt: str | None = CAUTIOUS
    viewing: Viewing = field(default_factory=Viewing)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise OptionError(f"candidates to be sampled are 1 or more, not {self.candidates}")
        self.decodings("")  # a Decoding refuses what cannot be

    @property
    def record(self) -> dict[str, Any]:
        """Its fields as a record has them. No instruction of the segments' own is an empty text."""
        fields = {name: value for name, value in asdict(self).items() if name != "viewing"}
        return fields | self.viewing.record | {"segment_prompt": self.segment_prompt or ""}

    def decodings(self, key: str) -> dict[str, Decoding]:
        """By origin. The sampled ones, which are several, come first."""
        common: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "retrospective": self.retrospective}
        drawn = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        sampled = Decoding(
            "sample",
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=int.from_bytes(drawn[:8], "big"),
            **common,
        )
        contrasts = {
            f"contrast {alpha:g}": Decoding(contrast="temporal", contrast_alpha=alpha, **common)
            for alpha in self.contrast_alpha
        }
        return {"sample": sampled, "greedy": Decoding(**common), **contrasts}


@dataclass(frozen=True)
class Candidate:
    """A caption of the whole clip.

    ``origins``: what came to this very text: ``greedy``, ``contrast ALPHA`` or ``sample N`` (from 0, the likeliest
    first), with ``, refined`` where a second look wrote it; ``draft`` is then what the first had written.
    ``mean_logprob``: mean token log-likelihood (natural log) given the clip and the instruction; of a refined one only
    where it was asked for (``Proposer(likelihoods=True)``), else ``None``. ``finish_reason`` as in ``Caption``.
    """

    text: str
    origins: tuple[str, ...]
    mean_logprob: float | None = None
    draft: str | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Material:
    """All that a scorer may know of an item: what was asked, and the captions of its segments in order."""

    key: str
    instruction: str
    segments: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    scene: Scene | None = None


@dataclass(frozen=True)
class Proposal:
    """What became of an item: its material, or the error that took its place."""

    item: Item
    material: Material | None = None
    error: IntertitleError | None = None


class Proposer:
    """Makes the material of items with one captioner.

    ``segments``: whether segments are captioned; ``likelihoods``: whether every candidate's is needed (a refined one
    then costs a prefill more). Use it from one thread.
    """

    def __init__(
        self, captioner: Captioner, recipe: Recipe, *, segments: bool = True, likelihoods: bool = False
    ) -> None:
        self.captioner, self.recipe = captioner, recipe
        self._segments, self._likelihoods = segments, likelihoods

    def propose(self, items: Sequence[Item]) -> Iterator[Proposal]:
        """In the order of ``items``. The segments of all of them are captioned together before the first comes."""
        segments = self.segment_captions(items) if self._segments else {}
        for item in items:
            try:
                found = segments.get(item.key, [])
                if isinstance(found, IntertitleError):
                    raise found
                prompt = self._prompt(item)
                asked = self.captioner.manifest.default_instruction if prompt is None else prompt
                material = Material(item.key, asked, found, self.candidates(item), item.scene)
            except (BundleError, TargetError):
                raise
            except Exception as error:
                yield Proposal(item, error=as_item_error(error, item.source))
            else:
                yield Proposal(item, material)

    def segment_captions(self, items: Sequence[Item]) -> dict[str, list[str] | IntertitleError]:
        """The captions of each item's segments by its key, or the first error among them.

        A retrospective greedy caption of each (docs/facts.md 2.2), or greedy alone. An image has no
        segments.
        """
        recipe = self.recipe
        decoding = Decoding(max_new_tokens=recipe.max_new_tokens, retrospective=recipe.retrospective)
        found: dict[str, list[str] | IntertitleError] = {}
        asked: list[BatchItem] = []
        places: list[tuple[str, int]] = []
        for item in items:
            try:
                spans = self._spans(item)
                found[item.key] = [""] * len(spans)
                if item.scene is not None:
                    found[item.key] = [self._scene_segment(item, span, decoding) for span in spans]
                    continue
            except (BundleError, TargetError):
                raise
            except Exception as error:
                found[item.key] = as_item_error(error, item.source)
                continue
            asked += [BatchItem(item.source, self._segment_prompt(item), *span) for span in spans]
            places += [(item.key, number) for number in range(len(spans))]
        results = self.captioner.caption_batch(asked, viewing=recipe.viewing, decoding=decoding)
        for result in results:
            key, number = places[result.index]
            captions = found[key]
            if isinstance(captions, IntertitleError):
                continue
            if result.caption is None:
                assert result.error is not None
                found[key] = result.error
            else:
                captions[number] = result.caption.text.strip()
        return found

    def candidates(self, item: Item) -> list[Candidate]:
        """Candidates with different texts. The clip is encoded once, and prefilled once in its first pass.

        Raises ``MediaError`` for a clip that cannot be read, ``OptionError`` where prompt and caption do not fit.
        """
        recipe = self.recipe
        clip = self._prepare(item)
        prompt = self._prompt(item)
        decodings = recipe.decodings(item.key)
        # First the sampled ones: their rows are enough for the others, which find the clip prefilled there.
        sampled = self.captioner.candidates(clip, recipe.candidates, prompt=prompt, decoding=decodings.pop("sample"))
        captions = [(f"sample {number}", caption) for number, caption in enumerate(sampled)]
        for origin, decoding in decodings.items():
            if decoding.contrast is None or clip.clip.frames is not None:
                captions.append((origin, self.captioner.caption(clip, prompt=prompt, decoding=decoding)))
        return self._distinct(clip, prompt, captions)

    def _distinct(
        self, clip: PreparedClip, prompt: str | None, captions: Sequence[tuple[str, Caption]]
    ) -> list[Candidate]:
        """Equal texts are one candidate; an empty text is not a candidate."""
        made: dict[str, Candidate] = {}
        for origin, caption in captions:
            text = caption.text.strip()
            if not text:
                continue
            refined = caption.draft is not None
            origins = (*(made[text].origins if text in made else ()), f"{origin}, refined" if refined else origin)
            if text in made:
                known = made[text]
                made[text] = Candidate(text, origins, known.mean_logprob, known.draft, known.finish_reason)
                continue
            # A refined caption was generated from another prompt, with a draft in it that makes it likelier.
            likelihood = None if refined else caption.mean_logprob
            if refined and self._likelihoods:
                likelihood = self.captioner.score(clip, caption.text, prompt=prompt)
            made[text] = Candidate(text, origins, likelihood, caption.draft, caption.finish_reason)
        return list(made.values())

    def _prompt(self, item: Item) -> str | None:
        return self.recipe.prompt if item.prompt is None else item.prompt

    def _prepare(self, item: Item) -> PreparedClip:
        if item.scene is not None:
            return self.captioner.prepare(**self._media(item.scene, (0.0, SECONDS)))
        assert item.entry is not None
        viewing = replace(self.recipe.viewing, start=item.entry.start, end=item.entry.end)
        return self.captioner.prepare(item.source, viewing=viewing)

    def _segment_prompt(self, item: Item) -> str | None:
        return self._prompt(item) if self.recipe.segment_prompt is None else self.recipe.segment_prompt

    def _scene_segment(self, item: Item, span: Span, decoding: Decoding) -> str:
        assert item.scene is not None
        media = self._media(item.scene, span)
        return self.captioner.caption(prompt=self._segment_prompt(item), decoding=decoding, **media).text.strip()

    def _media(self, scene: Scene, span: Span) -> Any:
        viewing, pipeline = self.recipe.viewing, self.captioner.manifest.pipeline
        return {"viewing": viewing, **scene_media(scene, pipeline, audio=viewing.audio, span=span)}

    def _spans(self, item: Item) -> list[Span]:
        if item.scene is not None:
            return equal_spans(0.0, SECONDS, SHORTEST)
        assert item.entry is not None
        readers = self.captioner.readers
        duration = (media_duration if readers is None else readers.duration)(item.source)
        if not duration:
            return []
        start, end = item.entry.start or 0.0, min(item.entry.end or duration, duration)
        if start >= end:
            raise MediaError(f"{item.source}: lasts {duration:.2f} s, the span starts at {start:g} s")
        return equal_spans(start, end, SHORTEST)
