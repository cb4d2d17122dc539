"""Compiled graphs against the numbers of the original implementations (tests/data/*/expected.npz)."""

from __future__ import annotations

import numpy as np
import pytest
from intertitle.calibration.reference import Reference
from intertitle.models import open_checkpoint
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.decoding import Decoding, generate, resolve
from intertitle.runtime.ort import OrtComponent, OrtDecoder

ALL = ["av-qwen2", "clip-mistral", "clip-mistral-lora", "auroracap", "auroracap-keep"]
MODES = {
    "av-qwen2": ["video.", "audio.", "audiovideo."],
    "clip-mistral": ["video."],
    "clip-mistral-lora": ["video."],
    "auroracap-keep": [""],
}


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def component(bundle: Bundle, name: str) -> OrtComponent:
    return OrtComponent(bundle.file(bundle.manifest.components[name].graph))


def decoder(bundle: Bundle) -> OrtDecoder:
    graph = bundle.file(bundle.manifest.components["decoder"].graph)
    return OrtDecoder(graph, bundle.manifest.decoder, bundle.embed)


@pytest.mark.parametrize("variant", ALL)
def test_encoders(variant, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant)), expected(variant)
    keep = {"auroracap": ".keep1.0", "auroracap-keep": ".keep0.4"}.get(variant, "")
    features = numbers[f"vision_features{keep}"]
    tokens = numbers["video_tokens"][np.newaxis] if not keep else numbers[f"visual_tokens{keep}"]
    if variant != "clip-mistral-lora":
        assert relative_error(component(bundle, "vision")(numbers["pixel_values"]), features) < 1e-4
        assert relative_error(component(bundle, "connector")(features), tokens) < 1e-4
    else:
        # The adapter's folder replaces the connector's tensors; its prompt holds the tokens that come out.
        start = int(np.argmin(numbers["prompt_ids"]))
        embeds = numbers["video.inputs_embeds"][start : start + tokens.shape[1]]
        assert relative_error(component(bundle, "connector")(features)[0], embeds) < 1e-4
        assert relative_error(embeds, tokens[0]) > 1e-2


def test_vision_does_not_depend_on_the_batch(compiled, expected):
    pixels = expected("auroracap")["pixel_values"]
    tower = component(Bundle.open(compiled("auroracap-keep")), "vision")
    together, alone = tower(pixels), np.concatenate([tower(pixels[i : i + 1]) for i in range(len(pixels))])
    assert relative_error(together, alone) < 1e-5


def test_audio(compiled, expected):
    bundle, numbers = Bundle.open(compiled("av-qwen2")), expected("av-qwen2")
    tokens = component(bundle, "audio")(numbers["fbank_video_policy"][np.newaxis])
    assert relative_error(tokens[0], numbers["audio_tokens"]) < 1e-4


@pytest.mark.parametrize(("variant", "mode"), [(v, m) for v, modes in MODES.items() for m in modes])
def test_greedy_tokens(variant, mode, compiled, expected):
    bundle, numbers = Bundle.open(compiled(variant)), expected(variant)
    embeds, tokens = numbers[f"{mode}inputs_embeds"], numbers[f"{mode}greedy_tokens"].tolist()
    inference = decoder(bundle).open(1, len(embeds) + 48)
    logits = inference.prefill(0, embeds)[0]
    assert relative_error(logits, numbers[f"{mode}last_logits"]) < 1e-4
    settings = resolve(Decoding(max_new_tokens=48), bundle.manifest.generation)
    assert [token.id for token in generate(inference, logits, settings)] == tokens


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap"])
def test_int4_graph_is_the_rounded_model(variant, compiled, expected, data_dir):
    """int4 graphs against PyTorch with the same rounded weights: what is left is the kernel's int8 activations."""
    numbers = expected(variant)
    embeds = numbers[next(name for name in numbers if name.endswith("inputs_embeds"))]
    bundle = Bundle.open(compiled(variant, "int4"))
    mine = decoder(bundle).open(1, len(embeds)).prefill(0, embeds)
    rounded = Reference(open_checkpoint(data_dir / variant), "int4").open(1, len(embeds)).prefill(0, embeds)
    original = Reference(open_checkpoint(data_dir / variant)).open(1, len(embeds)).prefill(0, embeds)
    assert relative_error(mine, rounded) < 5e-2
    # Without this the line above could not tell a rounded model from the original.
    assert relative_error(mine, original) > 2 * relative_error(mine, rounded)


def test_rows_of_different_length_share_a_step(compiled):
    """The seam's promise: rows prefilled apart, in chunks, stepped together, equal rows run alone."""
    opened = decoder(Bundle.open(compiled("av-qwen2")))
    random = np.random.default_rng(0)
    prompts = [random.standard_normal((length, 128)).astype(np.float32) for length in (700, 9, 300)]
    tokens = random.integers(0, 369, (4, 3))

    def alone(row: int) -> list[np.ndarray]:
        inference = opened.open(1, 800)
        return [inference.prefill(0, prompts[row])[0]] + [inference.step(t[row : row + 1])[0].copy() for t in tokens]

    together = opened.open(3, 800)
    firsts = [together.prefill(row, prompt)[0] for row, prompt in enumerate(prompts)]
    steps = [together.step(t).copy() for t in tokens]
    for row in range(3):
        expected_row = alone(row)
        assert relative_error(firsts[row], expected_row[0]) < 1e-5
        for step, logits in enumerate(steps):
            assert relative_error(logits[row], expected_row[step + 1]) < 1e-5


def test_prefill_in_pieces_gives_the_logits_of_every_position(compiled):
    opened = decoder(Bundle.open(compiled("av-qwen2")))
    embeds = np.random.default_rng(1).standard_normal((1100, 128)).astype(np.float32)
    one_by_one = opened.open(1, 1100)
    expected_rows = [one_by_one.prefill(0, embeds[:1090])[0]]
    expected_rows += [one_by_one.prefill(0, embeds[i : i + 1])[0] for i in range(1090, 1100)]
    whole = opened.open(1, 1100).prefill(0, embeds, num_logits=11)
    assert relative_error(whole, np.stack(expected_rows)) < 1e-5
    across_chunks = opened.open(1, 1100).prefill(0, embeds, num_logits=600)
    assert across_chunks.shape[0] == 600
    assert relative_error(across_chunks[-11:], whole) < 1e-5


def test_truncate_and_rearrange(compiled):
    opened = decoder(Bundle.open(compiled("clip-mistral")))
    random = np.random.default_rng(2)
    prompt = random.standard_normal((20, 128)).astype(np.float32)
    inference = opened.open(2, 40)
    inference.prefill(0, prompt)
    inference.rearrange([0, 0])
    first = inference.step(np.array([5, 9])).copy()
    inference.truncate(0, 20)
    inference.truncate(1, 20)
    second = inference.step(np.array([9, 5]))
    assert relative_error(first[0], second[1]) < 1e-6
    assert relative_error(first[1], second[0]) < 1e-6
