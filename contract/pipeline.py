"""A family's pipeline as data: from a clip to the decoder's prompt.

The family's folder in ``models/`` declares it, the bundle's manifest carries it, and the runtime, ``verify``, the
PyTorch reference, ``align`` and the engines' shapes read it. Nothing here computes on arrays.

A clip has T *places* that the model looks at. A *stage* is a graph that runs once for each of its *units*: a place, a
window of places, the whole clip, the sound. It gives each unit some tokens. The *prompt layout* says where the tokens
of a stage stand between the texts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from typing import Annotated, Literal

from msgspec import Meta

from .records import Name, NonNegative, Positive, Record

Mode = Literal["video", "audio", "audiovideo"]
"""What a clip has. A mode without pictures, or without sound, needs other stages."""

PIXELS, SOUND = "pixels", "sound"
"""What stages can take beside the tokens of other stages: the preprocessed frames, the features of the sound."""


class Sampling(Record, frozen=True, kw_only=True):
    """Which frames of a video are taken; ``runtime.preprocess.frames`` has the rules.

    ``rule``: ``centered`` (the centres of ``count`` equal segments: VideoLLaMA 2), ``linspace`` (first to last in equal
    steps: AuroraCap), ``strided`` (from the first in equal steps without the last: LLaVA-NeXT-Video), ``segments`` (the
    middle of each of ``count`` segments: InternVL2), ``rate`` (LLaVA-Video). ``rate``: ``fps`` frames of each second.
    If these are more than ``count``, or ``forced`` is set, ``count`` frames by ``linspace``. ``count``: the places of a
    clip, for ``rate`` the most.
    """

    rule: Literal["centered", "linspace", "strided", "segments", "rate"]
    count: Positive
    fps: Annotated[float, Meta(gt=0)] | None = None
    forced: bool = False


class ImagePlan(Record, frozen=True):
    """How a decoded RGB frame becomes pixels float32 ``[3, S, S]``.

    ``resize`` is ``"exact"`` (both sides to ``size``, the SigLIP processor) or ``"shortest_edge"`` (the shorter side
    to ``size``, then a centre crop of ``crop``, the CLIP processor). Resampling is Pillow's antialiased bicubic on
    uint8. Then ``(x / 255 - mean) / std`` for each channel.
    """

    resize: Literal["exact", "shortest_edge"]
    size: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def output_size(self) -> int:
        """S, the side of the square that the tower sees."""
        return self.size if self.resize == "exact" else self.crop


class SoundPlan(Record, frozen=True, kw_only=True):
    """How sound becomes features float32 ``[num_frames, num_mel_bins]``.

    ``policy``: what of a sound is heard. ``eight_clips`` is VideoLLaMA 2's: of a video eight clips of 2 s, of a sound
    alone its beginning, padded with silence to ``num_samples`` at ``sample_rate`` Hz (docs/facts.md 1.4). ``feature``:
    ``kaldi_fbank`` is Kaldi's log mel filter bank.
    """

    sample_rate: Positive
    num_samples: Positive
    num_mel_bins: Positive
    num_frames: Positive
    policy: Literal["eight_clips"] = "eight_clips"
    feature: Literal["kaldi_fbank"] = "kaldi_fbank"

    @property
    def seconds(self) -> float:
        """The sound that is heard at most."""
        return self.num_samples / self.sample_rate


class EachUnit(Record, frozen=True, tag="frame"):
    """A run for each unit of the input: each frame, or each window of an earlier stage. Equal frames run once."""

    def count(self, units: int) -> int:
        """The runs for so many units of the input."""
        return units


class Window(Record, frozen=True, tag="window"):
    """A run for each window of ``kernel`` units of the input, ``stride`` apart.

    ``padding`` zero units stand in front of the clip and behind it. Units that fill no window are left out.
    """

    kernel: Positive
    stride: Positive
    padding: NonNegative = 0

    def count(self, units: int) -> int:
        """The runs for so many units of the input."""
        return max((units + 2 * self.padding - self.kernel) // self.stride + 1, 0)


class WholeClip(Record, frozen=True, tag="clip"):
    """One run for all units of the input together."""

    def count(self, units: int) -> int:
        """The runs for so many units of the input."""
        return 1


class OneSound(WholeClip, frozen=True, tag="sound"):
    """One run for the sound."""


Unit = EachUnit | Window | WholeClip | OneSound


class StageInput(Record, frozen=True):
    """An input of a stage's graph by its ``name``, and what it takes: ``pixels``, ``sound`` or an earlier stage."""

    name: Name
    source: Name


DEFAULT_SHARES = (1.0, 0.5, 0.25, 0.1)
"""The shares of tokens for which a stage that merges tokens is compiled unless others are asked for. The weights are
there once. Each further share took 40 s of tracing at AuroraCap's released size (32 layers, 378 pixels, 2 busy cores).
"""


class Variant(Record, frozen=True, kw_only=True):
    """A further form of a stage that keeps a share ``keep`` of the tokens: AuroraCap's token merging.

    All variants share the external data of the stage's component. ``tokens``: what a unit gets.
    """

    keep: Annotated[float, Meta(gt=0, le=1)]
    graph: Name
    tokens: Positive


class Stage(Record, frozen=True, kw_only=True):
    """One graph of the pipeline, the component of the same name.

    ``unit``: what one run is for. ``output``: the name of the graph's output. ``tokens``: the tokens that a unit gets;
    ``None``: as many as it has in the (first) input. ``variants``: forms with other numbers of tokens, the default
    first.
    """

    name: Name
    unit: Unit
    inputs: Annotated[tuple[StageInput, ...], Meta(min_length=1)]
    output: Name
    tokens: Positive | None = None
    variants: tuple[Variant, ...] = ()


class Text(Record, frozen=True, tag="text"):
    """Text of the prompt. A place in braces is filled in: see ``VARIABLES``. Neighbouring texts are tokenized as one,
    without special tokens.

    ``behind``: a special token that stands in front of it only while it is tokenized. It is for models that tokenize
    the whole prompt at once, with this token in the clip's place: some tokenizers then put no space in front.
    """

    text: str
    behind: str = ""


class Ids(Record, frozen=True, tag="ids"):
    """Rows of the embedding table: a BOS token, or a learned vector that stands behind the vocabulary.

    Texts on its two sides are tokenized apart, also if ``ids`` is empty.
    """

    ids: tuple[NonNegative, ...]


class Tokens(Record, frozen=True, tag="tokens"):
    """All tokens of a stage, unit after unit."""

    stage: Name


class EachOf(Record, frozen=True, tag="each"):
    """The tokens of a stage unit by unit, a text in front of each and behind it, ``separator`` between two units."""

    stage: Name
    before: str = ""
    after: str = ""
    separator: str = ""


Piece = Text | Ids | Tokens | EachOf

VARIABLES = ("instruction", "seconds", "times", "count", "index")
"""What a text may name in braces: the user's instruction; how long the clip lasts (``12.50``); the time of each place
(``0.00s,2.47s``); the number of places; in ``EachOf`` the number of the unit, from 1."""

TIMED = ("seconds", "times")
"""The variables that only a clip with known times can fill in."""


class PromptLayout(Record, frozen=True):
    """The pieces of a prompt in order. ``untimed``: those for a clip whose times are not known (an image, arrays), if
    ``pieces`` speak of time."""

    pieces: Annotated[tuple[Piece, ...], Meta(min_length=1)]
    untimed: tuple[Piece, ...] = ()


class Pipeline(Record, frozen=True, kw_only=True):
    """Everything between a source and the decoder."""

    sampling: Sampling
    image: ImagePlan
    sound: SoundPlan | None = None
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)]
    prompts: dict[Mode, PromptLayout]

    def stage(self, name: str) -> Stage:
        """The stage of a name. ``KeyError`` for an unknown one."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def needed(self, *names: str, given: Collection[str] = (PIXELS, SOUND)) -> list[Stage]:
        """The stages that lead from what is ``given`` to ``names``, in the order in which they run."""
        wanted = set(names) - set(given)
        found = []
        for stage in reversed(self.stages):
            if stage.name in wanted:
                wanted.update({value.source for value in stage.inputs} - set(given))
                found.append(stage)
        return found[::-1]

    def visual(self) -> list[Stage]:
        """The stages that depend on the pictures, in order."""
        seen = {PIXELS}
        found = []
        for stage in self.stages:
            if any(value.source in seen for value in stage.inputs):
                seen.add(stage.name)
                found.append(stage)
        return found

    def units(self, name: str, places: int) -> int:
        """The units of a stage in a clip of so many places."""
        return self.unit_counts(places)[name]

    def unit_counts(self, places: int) -> dict[str, int]:
        """The units of each stage, and of what the first ones take, in a clip of so many places."""
        counts = {PIXELS: places, SOUND: 1}
        for stage in self.stages:
            counts[stage.name] = stage.unit.count(counts[stage.inputs[0].source])
        return counts

    def tokens(self, name: str, variant: Variant | None = None) -> int:
        """The tokens of one unit of a stage; ``variant``: of the stage that has variants."""
        stage = self.stage(name)
        if variant is not None and variant in stage.variants:
            return variant.tokens
        return stage.tokens or self.tokens(stage.inputs[0].source, variant)

    def token_counts(self, name: str) -> list[int]:
        """The numbers of tokens that a unit of a stage may have, that of the default form first."""
        merging = self.merging
        variants = merging.variants if merging is not None else [None]
        return list(dict.fromkeys(self.tokens(name, variant) for variant in variants))

    def least_places(self) -> int:
        """Places of a clip without which a stage would have nothing to run for; ``sampling.count + 1`` if even a whole
        clip has too few."""
        seen, whole = [stage.name for stage in self.visual()], self.sampling.count

        def enough(places: int) -> bool:
            counts = self.unit_counts(places)
            return all(counts[name] > 0 for name in seen)

        # More places never make fewer units.
        return 1 + bisect_left(range(1, whole + 1), True, key=enough)

    @property
    def framewise(self) -> bool:
        """Whether no stage looks at more than one place. A clip may then have any number of them: an image is one, and
        a place that shows nothing new can be left out."""
        return all(isinstance(stage.unit, EachUnit) for stage in self.visual())

    @property
    def merging(self) -> Stage | None:
        """The stage that has variants, if there is one."""
        return next((stage for stage in self.stages if stage.variants), None)


def stages_of(pieces: Iterable[Piece]) -> list[str]:
    """The stages whose tokens stand in a prompt, in order."""
    return [piece.stage for piece in pieces if isinstance(piece, (Tokens, EachOf))]


def variant_graph(stage: str, keep: float, place: int) -> str:
    """The file of a variant's graph; ``place`` 0 is the default one, which is the component's own graph."""
    return f"{stage}.keep{keep}.onnx" if place else f"{stage}.onnx"
