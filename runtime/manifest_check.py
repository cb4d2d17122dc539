"""Numbers of a ``bundle.json`` against each other: sizes that a machine can hold, graphs that fit the sizes.

``graph_check`` compares the inputs and outputs that are listed here with those of the graphs themselves, so a manifest
that passes both cannot ask for arrays that its graphs do not take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Manifest, TensorSpec

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
_MOST_SOUND_SECONDS = 600
#: Characters of a prompt's text; a tokenizer takes some 400 bytes for each.
_MOST_CHARACTERS = 1 << 16


def size_problem(manifest: Manifest) -> str | None:
    """The first number that is larger than a machine could serve."""
    for name, most in _MOST.items():
        if getattr(manifest.decoder, name) > most:
            return f"decoder: {name} {getattr(manifest.decoder, name)} is above {most}"
    preprocessing, visual, generation = manifest.preprocessing, manifest.visual, manifest.generation
    image, frames = preprocessing.image, preprocessing.num_frames
    if frames > _MOST_FRAMES:
        return f"preprocessing: {frames} frames are more than {_MOST_FRAMES}"
    if max(image.size, image.crop) > _MOST_SIDE or frames * image.output_size**2 > _MOST_PIXELS:
        return f"preprocessing: {frames} frames of {image.output_size} x {image.output_size} pixels are too many"
    if not all(abs(value) <= 1e3 for value in (*image.mean, *image.std)) or min(image.std) < 1e-3:
        return f"image: mean {list(image.mean)}, std {list(image.std)}"
    if max(visual.time_kernel, visual.time_padding) > _MOST_WINDOW:
        return f"visual: windows of {visual.time_kernel} frames, {visual.time_padding} frames of padding"
    if visual.blocks * visual.tokens_per_block > _MOST["context_length"]:
        return f"visual: {visual.blocks} x {visual.tokens_per_block} tokens are more than a context holds"
    sound = preprocessing.audio
    if sound is not None and not (
        sound.sample_rate == 16000 and sound.num_samples <= _MOST_SOUND_SECONDS * sound.sample_rate
    ):
        return f"audio: {sound.num_samples} samples at {sound.sample_rate} Hz"
    if generation.max_new_tokens > _MOST_NEW_TOKENS or generation.top_k > _MOST["vocab_size"]:
        return f"generation: max_new_tokens {generation.max_new_tokens}, top_k {generation.top_k}"
    if generation.temperature > 100 or not 1e-2 <= generation.repetition_penalty <= 100:
        return f"generation: temperature {generation.temperature}, repetition penalty {generation.repetition_penalty}"
    texts = [text for spec in manifest.prompts.values() for text in (spec.prefix, spec.suffix, spec.separator)]
    if (longest := max(map(len, [*texts, manifest.default_instruction]))) > _MOST_CHARACTERS:
        return f"prompts: a text of {longest} characters is longer than {_MOST_CHARACTERS}"
    if any(spec.sentinel < -(1 << 31) for spec in manifest.prompts.values()):
        return "prompts: a sentinel is below -2147483648"
    return None


def signature_problem(manifest: Manifest) -> str | None:
    """The first input or output of a component that does not fit the sizes that the manifest states."""
    decoder, sound = manifest.decoder, manifest.preprocessing.audio
    side, hidden = manifest.preprocessing.image.output_size, decoder.hidden_size
    wanted: dict[str, tuple[dict[str, tuple[int | None, ...]], dict[str, tuple[int | None, ...]]]] = {
        "vision": ({"pixel_values": (None, 3, side, side)}, {}),
        "connector": ({}, {"visual_tokens": (None, None, hidden)}),
    }
    if sound is not None:
        wanted["audio"] = (
            {"fbank": (1, sound.num_frames, sound.num_mel_bins)},
            {"audio_tokens": (1, sound.num_tokens, hidden)},
        )
    cache = (None, decoder.num_kv_heads, None, decoder.head_dim)
    parts = [f"{layer}.{part}" for layer in range(decoder.num_layers) for part in ("key", "value")]
    wanted["decoder"] = (
        {"inputs_embeds": (None, None, hidden), **{f"past.{part}": cache for part in parts}},
        {"logits": (None, None, decoder.vocab_size), **{f"present.{part}": cache for part in parts}},
    )
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
    for name in ("vision", "frame_connector", "connector", "audio"):
        component = manifest.components.get(name)
        if component is not None and (len(component.inputs), len(component.outputs)) != (1, 1):
            return f"component '{name}' does not have one input and one output"
    return None


def _fits(tensor: TensorSpec, shape: tuple[int | None, ...]) -> bool:
    """``None``: an axis of any size, or one that varies."""
    pairs = zip(tensor.shape, shape, strict=False)
    return len(tensor.shape) == len(shape) and all(size is None or size == has for has, size in pairs)
