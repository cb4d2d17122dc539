"""A ``bundle.json`` against itself: connected stages, sizes that a machine can hold, graphs that fit the sizes.

``graph_check`` compares the inputs and outputs that are listed here with those of the graphs themselves, so a manifest
that passes both cannot ask for arrays that its graphs do not take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..contract.manifest import Manifest
from ..contract.pipeline import (
    PIXELS,
    SOUND,
    EachOf,
    EachUnit,
    Ids,
    OneSound,
    Piece,
    Pipeline,
    Stage,
    Window,
    stages_of,
    variant_graph,
)
from ..contract.records import TensorSpec
from .prompt import speaks_of_time, texts_of, variables

Shape = tuple[int | None, ...]
"""``None``: an axis of any size, or one that varies."""

_STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED = {PIXELS, SOUND, "decoder", "selection", "embedding", "tokenizer"}

#: The most that is believed of each number; released captioners are far below.
_MOST = {
    "num_layers": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "context_length": 1 << 21,
}
_MOST_FRAMES = 4096
_MOST_SIDE = 8192
#: Pixels that the tower gets for one clip: 340 frames of 448 x 448, 800 MB in float32.
_MOST_PIXELS = 1 << 26
_MOST_NEW_TOKENS = 1 << 17
_MOST_WINDOW = 256
_MOST_STAGES = 32
_MOST_SOUND_SECONDS = 600
#: Characters of a prompt's text; a tokenizer takes some 400 bytes for each.
_MOST_CHARACTERS = 1 << 16
_MOST_PIECES = 256
#: Places of a prompt that are filled in; each may take a text as long as the user's, or the times of all frames.
_MOST_VARIABLES = 16


def pipeline_problem(manifest: Manifest) -> str | None:
    """The first thing in which the pipeline contradicts itself."""
    pipeline = manifest.pipeline
    if len(pipeline.stages) > _MOST_STAGES:
        return f"pipeline: {len(pipeline.stages)} stages are more than {_MOST_STAGES}"
    if pipeline.sampling.count > _MOST_FRAMES:
        return f"pipeline: {pipeline.sampling.count} frames are more than {_MOST_FRAMES}"
    known = {PIXELS} | ({SOUND} if pipeline.sound is not None else set())
    for stage in pipeline.stages:
        problem = _stage_problem(stage, known)
        if problem is not None:
            return f"pipeline: stage '{stage.name}': {problem}"
        known.add(stage.name)
    if sum(bool(stage.variants) for stage in pipeline.stages) > 1:
        return "pipeline: two stages have variants"
    if (pipeline.sampling.rule == "rate") != (pipeline.sampling.fps is not None):
        return "pipeline: frames of a second belong to the rule 'rate' and to no other"
    if pipeline.sampling.count < pipeline.least_places():
        return f"pipeline: {pipeline.sampling.count} places fill no window"
    return _units_problem(pipeline) or _prompts_problem(manifest)


def _stage_problem(stage: Stage, known: set[str]) -> str | None:
    if _STAGE_NAME.fullmatch(stage.name) is None or stage.name in _RESERVED or stage.name in known:
        return "its name is not plain, or taken"
    unknown = [value.source for value in stage.inputs if value.source not in known]
    if unknown:
        return f"it takes '{unknown[0]}', which does not come before it"
    if len({value.name for value in stage.inputs}) != len(stage.inputs):
        return "two of its inputs have one name"
    heard = [value.source == SOUND for value in stage.inputs]
    if any(heard) != all(heard) or (any(heard) != isinstance(stage.unit, OneSound)):
        return "sound is taken as one, and nothing else is"
    if isinstance(stage.unit, Window) and max(stage.unit.kernel, stage.unit.stride, stage.unit.padding) > _MOST_WINDOW:
        return f"windows of {stage.unit.kernel} units, {stage.unit.stride} apart, {stage.unit.padding} of padding"
    if stage.inputs[0].source in (PIXELS, SOUND) and stage.tokens is None:
        return "the number of its tokens is missing"
    for place, variant in enumerate(stage.variants):
        if variant.graph != variant_graph(stage.name, variant.keep, place):
            return f"the graph of its variant {variant.keep:g} is '{variant.graph}'"
    if stage.variants and (not isinstance(stage.unit, EachUnit) or stage.variants[0].tokens != stage.tokens):
        return "its variants do not belong to it"
    if len({variant.keep for variant in stage.variants}) != len(stage.variants):
        return "a variant is there twice"
    return None


def _units_problem(pipeline: Pipeline) -> str | None:
    """The first stage whose inputs have different numbers of units in some clip: one run takes as many of each."""
    several = [stage for stage in pipeline.stages if len({value.source for value in stage.inputs}) > 1]
    for places in range(pipeline.least_places(), pipeline.sampling.count + 1) if several else ():
        counts = pipeline.unit_counts(places)
        for stage in several:
            units = {value.source: counts[value.source] for value in stage.inputs}
            if len(set(units.values())) > 1:
                listed = ", ".join(f"'{source}' {count}" for source, count in units.items())
                return f"pipeline: stage '{stage.name}': units of its inputs in a clip of {places} places: {listed}"
    return None


def _prompts_problem(manifest: Manifest) -> str | None:
    pipeline = manifest.pipeline
    expected = {"video"} | ({"audio", "audiovideo"} if pipeline.sound is not None else set())
    if set(pipeline.prompts) != expected:
        return f"pipeline: prompts for {', '.join(sorted(pipeline.prompts))}, expected {', '.join(sorted(expected))}"
    for mode, layout in pipeline.prompts.items():
        for pieces in (layout.pieces, layout.untimed):
            problem = _pieces_problem(mode, pieces, manifest) if pieces else None
            if problem is not None:
                return f"pipeline: the prompt for {mode}: {problem}"
        if layout.untimed and (not speaks_of_time(layout.pieces) or speaks_of_time(layout.untimed)):
            return f"pipeline: the prompt for {mode}: its untimed form does not belong to it"
    return None


def _pieces_problem(mode: str, pieces: Sequence[Piece], manifest: Manifest) -> str | None:
    pipeline, names = manifest.pipeline, stages_of(pieces)
    if len(pieces) > _MOST_PIECES or not names:
        return "it has too many pieces, or no tokens of a stage"
    there = {stage.name for stage in pipeline.stages}
    if unknown := [name for name in names if name not in there]:
        return f"it names '{unknown[0]}', which is no stage"
    if len(set(names)) != len(names):
        return "a stage is there twice"
    taken = {value.source for stage in pipeline.needed(*names) for value in stage.inputs} & {PIXELS, SOUND}
    wanted = {"video": {PIXELS}, "audio": {SOUND}, "audiovideo": {PIXELS, SOUND}}[mode]
    if taken != wanted:
        return f"its stages take {' and '.join(sorted(taken))}"
    if any(isinstance(piece, EachOf) and isinstance(pipeline.stage(piece.stage).unit, OneSound) for piece in pieces):
        return "it has the units of a sound apart"
    if mode == "audio" and speaks_of_time(pieces):
        return "it speaks of times of frames"
    rows = manifest.embedding.shape[0]
    if any(token >= rows for piece in pieces if isinstance(piece, Ids) for token in piece.ids):
        return f"an id is outside the embedding table of {rows} rows"
    if (longest := max(map(len, texts_of(pieces)), default=0)) > _MOST_CHARACTERS:
        return f"a text of {longest} characters is longer than {_MOST_CHARACTERS}"
    return _growth_problem(pieces, pipeline)


def _growth_problem(pieces: Sequence[Piece], pipeline: Pipeline) -> str | None:
    """Why a prompt would grow far beyond its texts, if it would."""
    once = [piece for piece in pieces if not isinstance(piece, EachOf)]
    if (count := sum(map(len, map(variables, texts_of(once))))) > _MOST_VARIABLES:
        return f"its texts name {count} variables, more than {_MOST_VARIABLES}"
    for piece in pieces:
        if not isinstance(piece, EachOf):
            continue
        texts = texts_of((piece,))
        if any(name not in ("index", "count") for text in texts for name in variables(text)):
            return "a text around each unit names more than its number"
        length = sum(map(len, texts)) * pipeline.units(piece.stage, pipeline.sampling.count)
        if length > _MOST_CHARACTERS:
            return f"the texts around each unit of '{piece.stage}' are {length} characters for a clip"
    return None


def size_problem(manifest: Manifest) -> str | None:
    """The first number that is larger than a machine could serve."""
    for name, most in _MOST.items():
        if getattr(manifest.decoder, name) > most:
            return f"decoder: {name} {getattr(manifest.decoder, name)} is above {most}"
    pipeline, generation = manifest.pipeline, manifest.generation
    image, places = pipeline.image, pipeline.sampling.count
    if image.size < 1 or image.crop < 1 or (image.resize == "shortest_edge" and image.crop > image.size):
        return f"image: size {image.size}, crop {image.crop}"
    if max(image.size, image.crop) > _MOST_SIDE or places * image.output_size**2 > _MOST_PIXELS:
        return f"pipeline: {places} frames of {image.output_size} x {image.output_size} pixels are too many"
    if not all(abs(value) <= 1e3 for value in (*image.mean, *image.std)) or min(image.std) < 1e-3:
        return f"image: mean {list(image.mean)}, std {list(image.std)}"
    rate = pipeline.sampling.fps
    if rate is not None and not 1e-6 <= rate <= 1000:
        return f"pipeline: {rate:g} frames of each second are too many or too few"
    if (problem := _token_problem(pipeline)) is not None:
        return problem
    sound = pipeline.sound
    if sound is not None and not (
        sound.sample_rate == 16000 and sound.num_samples <= _MOST_SOUND_SECONDS * sound.sample_rate
    ):
        return f"sound: {sound.num_samples} samples at {sound.sample_rate} Hz"
    if generation.max_new_tokens > _MOST_NEW_TOKENS or generation.top_k > _MOST["vocab_size"]:
        return f"generation: max_new_tokens {generation.max_new_tokens}, top_k {generation.top_k}"
    if generation.temperature > 100 or not 1e-2 <= generation.repetition_penalty <= 100:
        return f"generation: temperature {generation.temperature}, repetition penalty {generation.repetition_penalty}"
    if len(manifest.default_instruction) > _MOST_CHARACTERS:
        return f"the default instruction is longer than {_MOST_CHARACTERS} characters"
    return None


def _token_problem(pipeline: Pipeline) -> str | None:
    for stage in pipeline.stages:
        units = pipeline.units(stage.name, pipeline.sampling.count)
        tokens = max([pipeline.tokens(stage.name), *(variant.tokens for variant in stage.variants)])
        if units * tokens > _MOST["context_length"]:
            return f"pipeline: {units} x {tokens} tokens of '{stage.name}' are more than a context holds"
    return None


def signature_problem(manifest: Manifest) -> str | None:
    """The first input or output of a component that does not fit the sizes that the manifest states."""
    wanted = _stage_shapes(manifest)
    wanted["decoder"] = _decoder_shapes(manifest)
    for name, sides in wanted.items():
        component = manifest.components[name]
        for tensors, shapes in zip((component.inputs, component.outputs), sides, strict=True):
            there = {tensor.name: tensor for tensor in tensors}
            for tensor, shape in shapes.items():
                if tensor not in there or not _fits(there[tensor], shape):
                    found = list(there[tensor].shape) if tensor in there else "not there"
                    sizes = ["any" if size is None else size for size in shape]
                    return f"component '{name}': '{tensor}' is {found}, the sizes say {sizes}"
            if caches := sorted(key for key in there if key.startswith(("past.", "present.")) and key not in shapes):
                return f"component '{name}': '{caches[0]}' belongs to no layer"
            if "position_ids" in there and "position_ids" not in shapes:
                return f"component '{name}': 'position_ids' of a decoder whose positions are places"
            if name != "decoder" and len(there) != len(shapes):
                return f"component '{name}' has inputs or outputs that are not those of its stage"
    return None


def _stage_shapes(manifest: Manifest) -> dict[str, tuple[dict[str, Shape], dict[str, Shape]]]:
    """The inputs and outputs of each stage's graph. The tokens of a prompt are as wide as the decoder."""
    pipeline, components = manifest.pipeline, manifest.components
    side, sound = pipeline.image.output_size, pipeline.sound
    shapes: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {}
    in_prompt = {name for layout in pipeline.prompts.values() for name in stages_of((*layout.pieces, *layout.untimed))}
    for stage in pipeline.stages:
        inputs: dict[str, Shape] = {}
        for value in stage.inputs:
            if value.source == SOUND:
                assert sound is not None
                inputs[value.name] = (1, sound.num_frames, sound.num_mel_bins)
                continue
            kernel = (stage.unit.kernel,) if isinstance(stage.unit, Window) else ()
            if value.source == PIXELS:
                inputs[value.name] = (None, *kernel, 3, side, side)
                continue
            made = next(iter(components[value.source].outputs[0].shape[-1:]), None)
            inputs[value.name] = (
                None,
                *kernel,
                pipeline.stage(value.source).tokens,
                made if isinstance(made, int) else None,
            )
        width = manifest.decoder.hidden_size if stage.name in in_prompt else None
        shapes[stage.name] = (inputs, {stage.output: (None, stage.tokens, width)})
    return shapes


def _decoder_shapes(manifest: Manifest) -> tuple[dict[str, Shape], dict[str, Shape]]:
    decoder = manifest.decoder
    hidden, cache = decoder.hidden_size, (None, decoder.num_kv_heads, None, decoder.head_dim)
    parts = [f"{layer}.{part}" for layer in range(decoder.num_layers) for part in ("key", "value")]
    positions: dict[str, Shape] = {"position_ids": (None, None)} if decoder.positions == "explicit" else {}
    return (
        {"inputs_embeds": (None, None, hidden), **positions, **{f"past.{part}": cache for part in parts}},
        {"logits": (None, None, decoder.vocab_size), **{f"present.{part}": cache for part in parts}},
    )


def _fits(tensor: TensorSpec, shape: Shape) -> bool:
    """A graph that is made for several numbers of tokens has an axis ``tokens``."""
    pairs = zip(tensor.shape, shape, strict=False)
    return len(tensor.shape) == len(shape) and all(size is None or has in (size, "tokens") for has, size in pairs)
