"""From a clip to the decoder's input: the stages of the pipeline, and their tokens in the prompt.

One interpreter for all families: what runs, in which order and on what is data (``contract.pipeline``). Shapes: T
places of a clip, U distinct units of a stage, P tokens of a unit, W their width, H decoder width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..contract.pipeline import PIXELS, SOUND, EachUnit, Mode, Piece, Stage, Variant, Window, stages_of
from ..errors import ClosedError, OptionError
from .backends import Backend, OrtBackend
from .bundle import Bundle
from .clip import Clip
from .compression import merge_tokens
from .contrast import Contrast, diffuse, sparse_places
from .inference import FloatArray
from .preprocess.fbank import sound_features
from .preprocess.image import preprocess_frames
from .prompt import Slot, Timing, build_prompt, choose_pieces, joined, segments, unit_slots
from .timing import Stages
from .viewing import Share, TokenBudget

_log = logging.getLogger(__name__)

#: Tokens that one run of a stage takes in; more would cost memory and save no time on a CPU.
_RUN_TOKENS = 1024

Order = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """What a stage gives the units of a clip: ``values [U, P, W]``, each distinct unit once, and ``order [units]``,
    which of them each unit has. Of pixels the values are ``[U, 3, S, S]``."""

    values: FloatArray
    order: Order

    @classmethod
    def all_distinct(cls, values: FloatArray) -> Units:
        """Units that are not known to repeat."""
        return cls(values, np.arange(len(values)))

    def expand(self) -> FloatArray:
        """The values of all units, repeated ones too."""
        return self.values[self.order]


@dataclass(frozen=True)
class EncodedClip:
    """The tokens of a clip, ready for any number of prompts.

    ``tokens``: for each stage of the prompt its blocks, float32 ``[tokens, H]`` each, one for every slot of it.
    ``pieces``: the layout that applies. ``places``: those of the clip. ``notes``: what was done other than asked.
    ``visual_tokens``: the budget it was encoded with. ``kept``: what was kept for a contrast, by stage.
    """

    mode: Mode
    tokens: dict[str, list[FloatArray]]
    pieces: tuple[Piece, ...]
    places: int
    timing: Timing | None = None
    notes: list[str] = field(default_factory=list)
    visual_tokens: TokenBudget | None = None
    kept: dict[str, Units] = field(default_factory=dict)

    @property
    def blocks(self) -> list[FloatArray]:
        """All blocks, stage by stage."""
        return [block for blocks in self.tokens.values() for block in blocks]


class Encoder:
    """The stages of a bundle. Sessions open at first use, so that a silent clip never loads the audio tower.

    ``staged``: one component at a time stays loaded.
    """

    def __init__(
        self, bundle: Bundle, tokenizer: Tokenizer, backend: Backend | None = None, staged: bool = False
    ) -> None:
        self._bundle, self._tokenizer = bundle, tokenizer
        self._backend: Backend | None = OrtBackend(bundle) if backend is None else backend
        self._pipeline, self._staged = bundle.manifest.pipeline, staged
        self._visual = {stage.name for stage in self._pipeline.visual()}
        self._components: dict[str, tuple[str, Callable[..., FloatArray]]] = {}

    def encode(
        self,
        clip: Clip,
        stages: Stages,
        *,
        visual_tokens: TokenBudget | None = None,
        keep_features: bool = False,
    ) -> EncodedClip:
        """Run the stages that the clip's mode needs, once for each distinct unit.

        ``visual_tokens``: how many visual tokens the decoder gets; ``None`` is what the model was made for. A stage
        that merges tokens takes a compiled share, for other families ``compression`` merges what leaves the last
        stage. ``keep_features``: keep what ``contrast`` needs. ``OptionError`` for a budget below all compiled shares.
        """
        pieces = choose_pieces(self._pipeline.prompts[clip.mode], clip.timing)
        given: dict[str, Units] = {}
        variant, notes, places = None, [], 0
        if clip.frames is not None:
            assert clip.order is not None
            places = len(clip.order)
            variant, notes = self._merging(visual_tokens, places)
            given[PIXELS] = Units(self._pixels(clip.frames, stages), clip.order)
        if clip.sound is not None:
            given[SOUND] = self._sound(clip.sound, stages)
        found = self._run(stages_of(pieces), given, stages, variant)
        tokens = self._blocks(pieces, found, visual_tokens, stages)
        notes += self._over_budget(visual_tokens, tokens, found)
        kept = {name: found[name] for name in self._taken_framewise(pieces)} if keep_features else {}
        return EncodedClip(clip.mode, tokens, pieces, places, clip.timing, notes, visual_tokens, kept)

    def contrast(self, clip: Clip, encoded: EncodedClip, contrast: Contrast, stages: Stages) -> EncodedClip:
        """The contrasted view of a clip that ``encode`` gave ``encoded`` for, its sound taken over.

        Temporal views use what ``encoded`` kept. The budget of visual tokens is the same, a number of them being that
        number's share for the places that are left. ``OptionError`` for a clip without pictures.
        """
        if clip.order is None:
            raise OptionError("a contrast changes the pictures, and this clip has none")
        setting, notes, places, timing = encoded.visual_tokens, [], len(clip.order), clip.timing
        variant, _ = self._merging(setting, places)
        given: dict[str, Units]
        if contrast.kind == "noise":
            assert clip.frames is not None
            with stages.measure("noise"):
                pixels = diffuse(self._pixels(clip.frames, stages), contrast.noise_step, contrast.seed)
            given = {PIXELS: Units(pixels, clip.order)}
        else:
            left = sparse_places(places, self._pipeline.least_places())
            if len(left) == places:
                notes.append("too few frames for a contrast in time: it is with the clip itself")
            if setting is not None:
                setting = setting.scaled(len(left), places)
            if timing is not None:
                timing = Timing(timing.seconds, timing.times[left])
            places = len(left)
            given = {name: Units(units.values, units.order[left]) for name, units in encoded.kept.items()}
            if not given:
                assert clip.frames is not None
                distinct, order = np.unique(clip.order[left], return_inverse=True)
                given = {PIXELS: Units(self._pixels(clip.frames[distinct], stages), order)}
        seen = [name for name in stages_of(encoded.pieces) if name in self._visual]
        found = self._run(seen, given, stages, variant)
        heard = {name: blocks for name, blocks in encoded.tokens.items() if name not in self._visual}
        tokens = self._blocks([piece for piece in encoded.pieces if _stage_of(piece) in seen], found, setting, stages)
        return EncodedClip(encoded.mode, tokens | heard, encoded.pieces, places, timing, notes, encoded.visual_tokens)

    def run_stage(self, stage: Stage, inputs: Sequence[Units], stages: Stages, variant: Variant | None = None) -> Units:
        """What a stage gives its units, from what its inputs have in the order in which the stage names them.

        What is alike is computed once, some units in each run. ``variant``: the form of the stage, where it has
        several.
        """
        graph = variant.graph if variant is not None and variant in stage.variants else None
        component = self._component(stage.name, stages, graph)
        with stages.measure(stage.name):
            unit = stage.unit
            if isinstance(unit, EachUnit):
                return _run_each(stage, component, inputs, stages, self._run_size(stage, 1, variant))
            if isinstance(unit, Window):
                return _run_windows(stage, component, inputs, stages, self._run_size(stage, unit.kernel, variant), unit)
            return Units.all_distinct(component(*(units.expand() for units in inputs)))

    def prompt_pieces(self, encoded: EncodedClip, instruction: str) -> list[FloatArray | list[int]]:
        """The prompt in order: the layout's texts as lists of token ids, the clip's blocks ``[tokens, H]`` between."""
        units = {name: len(blocks) for name, blocks in encoded.tokens.items()}
        built = build_prompt(self._tokenizer, encoded.pieces, instruction, units, encoded.timing, encoded.places)
        return [encoded.tokens[part.stage][part.unit or 0] if isinstance(part, Slot) else part for part in built]

    def prompt_segments(self, encoded: EncodedClip, instruction: str) -> list[FloatArray]:
        """The prompt in what a cache keeps apart (``prompt.segments``), each float32 ``[S, H]``."""
        parts = segments(self.prompt_pieces(encoded, instruction))
        return [joined(part, self._bundle.embed) for part in parts if part]

    def prompt_embeds(self, encoded: EncodedClip, instruction: str) -> FloatArray:
        """The decoder's input ``[S, H]``: the pieces of the prompt, text through the embedding table."""
        return joined(self.prompt_pieces(encoded, instruction), self._bundle.embed)

    def prompt_length(self, clip: Clip, instruction: str, visual_tokens: TokenBudget | None = None) -> int:
        """Tokens of the prompt that ``encode`` and ``prompt_embeds`` would give for a clip, without running a stage."""
        pieces = choose_pieces(self._pipeline.prompts[clip.mode], clip.timing)
        places = 0 if clip.order is None else len(clip.order)
        variant, _ = self._merging(visual_tokens, places) if clip.order is not None else (None, [])
        units, lengths = {}, {}
        apart = unit_slots(pieces)
        for name in stages_of(pieces):
            count, tokens = self._pipeline.units(name, places), self._pipeline.tokens(name, variant)
            blocks, length = (count, tokens) if name in apart else (1, count * tokens)
            setting = visual_tokens if name in self._visual else None
            units[name], lengths[name] = blocks, self._merged_length(setting, blocks, length)
        built = build_prompt(self._tokenizer, pieces, instruction, units, clip.timing, places)
        return sum(lengths[part.stage] if isinstance(part, Slot) else len(part) for part in built)

    def _run(
        self, names: Sequence[str], given: Mapping[str, Units], stages: Stages, variant: Variant | None
    ) -> dict[str, Units]:
        """All stages that lead from what is ``given`` to ``names``."""
        found = dict(given)
        for stage in self._pipeline.needed(*names, given=set(given)):
            inputs = [found[value.source] for value in stage.inputs]
            found[stage.name] = self.run_stage(stage, inputs, stages, variant)
        return found

    def _blocks(
        self, pieces: Sequence[Piece], found: Mapping[str, Units], setting: TokenBudget | None, stages: Stages
    ) -> dict[str, list[FloatArray]]:
        """The blocks of each stage of a prompt, the visual ones merged to the setting."""
        apart, tokens = unit_slots(pieces), {}
        for name in stages_of(pieces):
            values = found[name].expand()
            blocks = values if name in apart else values.reshape(1, -1, values.shape[-1])
            if name in self._visual:
                blocks = self._compress(blocks, setting, stages)
            tokens[name] = list(blocks)
        return tokens

    def _taken_framewise(self, pieces: Sequence[Piece]) -> set[str]:
        """What each place has alone (its pixels, what stages make of it frame by frame) and the prompt, or a stage that
        looks at several places, takes: all that a view of fewer places needs."""
        seen = [name for name in stages_of(pieces) if name in self._visual]
        framewise, taken = {PIXELS}, set(seen)
        for stage in self._pipeline.needed(*seen):
            sources = {value.source for value in stage.inputs}
            if isinstance(stage.unit, EachUnit) and sources <= framewise:
                framewise.add(stage.name)
            else:
                taken |= sources
        return framewise & taken

    def _run_size(self, stage: Stage, kernel: int, variant: Variant | None) -> int:
        """How many units of a stage one run takes in."""
        source = stage.inputs[0].source
        taken = stage.name if source in (PIXELS, SOUND) else source
        return max(1, _RUN_TOKENS // (kernel * self._pipeline.tokens(taken, variant)))

    def _pixels(self, frames: npt.NDArray[np.uint8], stages: Stages) -> FloatArray:
        with stages.measure("preprocess"):
            return preprocess_frames(frames, self._pipeline.image)

    def _sound(self, sound: FloatArray, stages: Stages) -> Units:
        assert self._pipeline.sound is not None
        with stages.measure("fbank"):
            return Units.all_distinct(sound_features(sound, self._pipeline.sound)[np.newaxis])

    def _compress(self, tokens: FloatArray, setting: TokenBudget | None, stages: Stages) -> FloatArray:
        """``tokens [blocks, tokens, H]`` merged to the setting, where no stage has merged them."""
        blocks, available = tokens.shape[:2]
        count = self._merged_length(setting, blocks, available)
        if count == available:
            return tokens
        with stages.measure("compress"):
            return np.stack([merge_tokens(block, count)[0] for block in tokens])

    def _merged_length(self, setting: TokenBudget | None, blocks: int, available: int) -> int:
        """Tokens of each block after ``_compress``."""
        if setting is None or self._pipeline.merging is not None:
            return available
        return max(1, setting.of(blocks * available) // blocks)

    def _over_budget(
        self, setting: TokenBudget | None, tokens: Mapping[str, Sequence[FloatArray]], found: Mapping[str, Units]
    ) -> list[str]:
        """What to say where a budget is below one token of each block, which ``_merged_length`` keeps."""
        if setting is None or self._pipeline.merging is not None:
            return []
        notes = []
        for name in self._visual.intersection(tokens):
            units, kept = found[name], len(tokens[name])
            if setting.of(len(units.order) * units.values.shape[1]) < kept:
                notes.append(f"visual tokens {setting}: {kept} were kept, one of each of the {kept} blocks at least")
        return notes

    def _merging(self, setting: TokenBudget | None, places: int) -> tuple[Variant | None, list[str]]:
        """The compiled share of tokens that a setting comes to, and what to say about it; None without merging."""
        stage = self._pipeline.merging
        if stage is None or setting is None:
            return (None if stage is None else stage.variants[0]), []
        variants = stage.variants
        spare = {variant: setting.spare(variant.keep, variant.tokens * places) for variant in variants}
        fitting = [variant for variant in variants if spare[variant] >= 0]
        exact = next((variant for variant in fitting if spare[variant] == 0), None)
        if exact is not None:
            return exact, []
        if not fitting:
            there = ", ".join(f"{Share(each.keep)} ({each.tokens * places} tokens)" for each in variants)
            raise OptionError(f"no compiled share gives as few visual tokens as {setting}; there are {there}")
        variant = max(fitting, key=lambda variant: variant.keep)
        count = variant.tokens * places
        share = Share(variant.keep)
        note = f"visual tokens {setting}: merged to the next lower compiled share, {share} ({count} tokens)"
        # Of a clip that has no more tokens than the limit nothing was taken away.
        return variant, [] if variant.keep == 1 else [note]

    def release(self) -> None:
        """Unload the components; they are loaded again when they are needed."""
        if self._components:
            _log.debug("released: %s", ", ".join(self._components))
        self._components.clear()

    def load(self, stages: Stages) -> None:
        """Load all components now, in their default form; a staged encoder keeps the last one only."""
        for stage in self._pipeline.stages:
            self._component(stage.name, stages)

    def close(self) -> None:
        """Unload the components and let go of the device. What is needed afterwards cannot be loaded."""
        self.release()
        self._backend = None

    def _component(self, name: str, stages: Stages, graph: str | None = None) -> Callable[..., FloatArray]:
        """The session of a component, or of another graph of it: the last one is kept, each holds all the weights."""
        graph = self._bundle.manifest.components[name].graph if graph is None else graph
        held = self._components.get(name)
        if held is None or held[0] != graph:
            del held
            self._components.pop(name, None)
            if self._staged:
                self.release()
            if self._backend is None:
                raise ClosedError("the captioner was closed: load it again")
            started = time.perf_counter()
            with stages.measure("load"):
                held = self._components[name] = (graph, self._backend.component(name, graph))
            _log.debug("loaded %s in %.2f s", graph, time.perf_counter() - started)
        return held[1]


def time_windows(order: Order, window: Window) -> Order:
    """The windows of a convolution over time, as numbers of units ``[windows, kernel]``; -1 is an empty unit."""
    empty = np.full(window.padding, -1, np.int64)
    padded = np.concatenate((empty, order, empty))
    starts = np.arange(window.count(len(order))) * window.stride
    return padded[starts[:, np.newaxis] + np.arange(window.kernel)]


def _run_each(
    stage: Stage, component: Callable[..., FloatArray], inputs: Sequence[Units], stages: Stages, size: int
) -> Units:
    """Each distinct unit once; several inputs repeat units together."""
    first = inputs[0]
    if any(not np.array_equal(units.order, first.order) for units in inputs[1:]):
        inputs = [Units.all_distinct(units.expand()) for units in inputs]
    parts = []
    count = len(inputs[0].values)
    # A tower begins with one frame. How int8 kernels round depends on the shape of a run, so it must stay.
    first_run = 1 if stage.inputs[0].source == PIXELS else size
    for start, stop in pairwise([0, *range(first_run, count, size), count]):
        stages.report(stage.name, start, count)
        parts.append(component(*(units.values[start:stop] for units in inputs)))
    return Units(np.concatenate(parts), inputs[0].order)


def _run_windows(
    stage: Stage,
    component: Callable[..., FloatArray],
    inputs: Sequence[Units],
    stages: Stages,
    size: int,
    window: Window,
) -> Units:
    """Each distinct window once; several inputs are cut into the same windows."""
    orders = [time_windows(units.order, window) for units in inputs]
    distinct, places = np.unique(np.concatenate(orders, axis=1), axis=0, return_inverse=True)
    parts = []
    for start in range(0, len(distinct), size):
        stages.report(stage.name, start, len(distinct))
        taken = []
        for units, rows in zip(inputs, np.split(distinct[start : start + size], len(inputs), axis=1), strict=True):
            windows = units.values[rows]
            windows[rows < 0] = 0
            taken.append(windows)
        parts.append(component(*taken))
    return Units(np.concatenate(parts), places.reshape(-1))


def _stage_of(piece: Piece) -> str | None:
    return next(iter(stages_of((piece,))), None)
