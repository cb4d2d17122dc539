"""The PyTorch reference against the fixtures and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from intertitle.calibration import reference
from intertitle.calibration.recipe import Rounding
from intertitle.calibration.reference import Reference, reference_fbank, reference_pixels, repetition_penalty
from intertitle.contract.formats import Rule
from intertitle.contract.pipeline import ImagePlan, SoundPlan
from intertitle.errors import OptionError
from intertitle.models import open_checkpoint
from intertitle.runtime.preprocess import fbank
from intertitle.runtime.preprocess.audio import audio_policy, video_policy

PREPROCESSORS = {"av-qwen2": "tiny-siglip", "clip-mistral": "tiny-clip", "auroracap": ""}


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def opened(data_dir):
    """``opened(variant, weights)``: its reference, opened once."""
    cache = {}

    def get(variant: str, weights: str = "fp32") -> Reference:
        if (variant, weights) not in cache:
            adapter = data_dir / variant if variant == "clip-mistral-lora" else None
            checkpoint = data_dir / ("clip-mistral" if adapter else variant)
            rule = Rule(component="decoder", pattern="*", format=weights, block_size=32)
            cache[variant, weights] = Reference(
                open_checkpoint(checkpoint, adapter), {"decoder": Rounding("ort", "decoder", (rule,))}
            )
        return cache[variant, weights]

    return get


@pytest.mark.parametrize("variant", PREPROCESSORS)
def test_pixels_are_those_of_the_fixtures(variant, opened, expected):
    numbers = expected(variant)
    pixels = opened(variant).pixels(numbers["frames_uint8"])
    assert relative_error(pixels, numbers["pixel_values"]) < 1e-6


def transformers_processor(folder: Path):
    """transformers' own processor of a fixture, the one that works with Pillow."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    if "Siglip" in settings["image_processor_type"]:
        module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
        return module.SiglipImageProcessorPil(**settings)
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil(**settings)


@pytest.mark.parametrize("variant", PREPROCESSORS)
@pytest.mark.parametrize("size", [(90, 160), (160, 90), (75, 75), (71, 113)])
def test_pixels_are_those_of_transformers(variant, size, opened, data_dir):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = transformers_processor(data_dir / variant / PREPROCESSORS[variant])
    theirs = processor(images=[frame], return_tensors="np")["pixel_values"][0]
    assert relative_error(opened(variant).pixels(frame[np.newaxis])[0], theirs) < 1e-6


def test_a_tall_frame_is_resized_across_first():
    """Pillow 13 turns the passes round here, which rounds differently; the runtime keeps the old order."""
    frame = np.random.default_rng(1).integers(0, 256, (200, 50, 3), dtype=np.uint8)
    ones, zeros = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    pixels = reference_pixels(frame, ImagePlan("exact", 70, 70, zeros, ones)) * 255
    image = pytest.importorskip("PIL.Image")
    across = image.fromarray(frame).resize((70, 200), image.Resampling.BICUBIC)
    both = np.asarray(across.resize((70, 70), image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(pixels - both).max() < 1e-4


@pytest.mark.parametrize("policy", ["video", "audio"])
def test_fbank_is_that_of_the_fixtures(policy, opened, expected):
    numbers = expected("av-qwen2")
    samples = numbers["audio_int16"].astype(np.float32) / 32768
    sound = video_policy(samples) if policy == "video" else audio_policy(samples, 16_000)
    mine, theirs = opened("av-qwen2").fbank(sound), numbers[f"fbank_{policy}_policy"]
    assert mine.shape == theirs.shape == (2998, 128)
    different = mine != theirs
    step = 2.0 ** (np.floor(np.log2(np.abs(theirs[different]))) - 7)
    assert (np.abs(mine[different] - theirs[different]) <= step).all()
    assert different.mean() < 1e-4


def test_every_feature_of_sound_is_computed_twice():
    """By the runtime and by the reference."""
    known = set(get_args(get_type_hints(SoundPlan)["feature"]))
    assert known == set(reference._FEATURES) == set(fbank._FEATURES)


def test_fbank_of_silence_is_the_floor():
    assert np.unique(reference_fbank(np.zeros(1000, np.float32))).tolist() == [-15.9375]


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("av-qwen2", "video."),
        ("av-qwen2", "audio."),
        ("av-qwen2", "audiovideo."),
        ("clip-mistral", "video."),
        ("clip-mistral-lora", "video."),
    ],
)
def test_greedy_tokens_are_those_of_the_fixtures(variant, mode, opened, expected):
    numbers = expected(variant)
    caption = opened(variant).greedy(numbers[f"{mode}inputs_embeds"], 48)
    assert caption.tokens == numbers[f"{mode}greedy_tokens"].tolist()
    assert len(caption.logits) == len(caption.tokens)
    assert relative_error(caption.logits[0], numbers[f"{mode}last_logits"]) < 1e-4


def test_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    seen = [3, 7, 7, 0, 39]
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), torch.tensor(logits[np.newaxis]))
    before = logits.copy()
    assert np.array_equal(repetition_penalty(logits, seen, 1.3), theirs[0].numpy())
    assert np.array_equal(repetition_penalty(logits, [], 1.3), logits)
    assert np.array_equal(logits, before)


def test_int4_reference_has_sixteen_values_a_block(opened):
    """The rounded decoder: every linear layer, the output head included, and nothing else."""
    exact, rounded = (opened("av-qwen2", weights).module("decoder") for weights in ("fp32", "int4"))
    linear = [name for name, module in rounded.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "lm_head" in linear
    assert len(linear) == 7 * len(rounded.layers) + 1
    for name, value in rounded.state_dict().items():
        before = exact.state_dict()[name]
        layer, _, leaf = name.rpartition(".")
        if layer not in linear or leaf != "weight":
            assert torch.equal(value, before), name
            continue
        error = float((value - before).norm() / before.norm())
        assert 0.05 < error < 0.12, name
        assert all(len(block.unique()) <= 16 for block in value[:2].unflatten(1, (-1, 32)).flatten(0, 1)), name


def test_rows_of_different_length_share_a_step(opened):
    reference, random = opened("clip-mistral"), np.random.default_rng(0)
    prompts = [random.standard_normal((length, 128)).astype(np.float32) for length in (17, 4)]
    tokens = random.integers(0, 300, (3, 2))
    together = reference.open(2, 24)
    firsts = [together.prefill(row, prompt)[0] for row, prompt in enumerate(prompts)]
    steps = [together.step(pair) for pair in tokens]
    for row, prompt in enumerate(prompts):
        alone = reference.open(1, 24)
        assert relative_error(firsts[row], alone.prefill(0, prompt)[0]) < 1e-5
        for step, pair in zip(steps, tokens, strict=True):
            assert relative_error(step[row], alone.step(pair[row : row + 1])[0]) < 1e-5


def test_prefill_in_pieces_truncate_and_rearrange(opened):
    reference, random = opened("clip-mistral"), np.random.default_rng(1)
    prompt = random.standard_normal((12, 128)).astype(np.float32)
    whole = reference.open(1, 16).prefill(0, prompt, num_logits=12)
    heard: list[int] = []
    pieces = reference.open(2, 16)
    pieces.prefill(1, prompt[:9])
    assert relative_error(pieces.prefill(1, prompt[9:], num_logits=3, progress=heard.append), whole[9:]) < 1e-5
    assert heard == [3]
    pieces.rearrange({0: 1})
    pieces.truncate(0, 11)
    assert relative_error(pieces.prefill(0, prompt[11:])[0], whole[11]) < 1e-5
    after = pieces.step(np.array([5, 5]))
    assert relative_error(after[0], after[1]) < 1e-5


def test_the_cache_is_as_long_as_it_was_opened(opened):
    inference = opened("clip-mistral").open(1, 4)
    embeds = np.zeros((4, 128), np.float32)
    with pytest.raises(OptionError, match="holds 4 tokens"):
        inference.prefill(0, np.zeros((5, 128), np.float32))
    inference.prefill(0, embeds)
    with pytest.raises(OptionError, match="cannot take 1 more"):
        inference.step(np.array([1]))
    with pytest.raises(ValueError, match="cannot keep 5"):
        inference.truncate(0, 5)
    with pytest.raises(ValueError, match="num_logits"):
        inference.prefill(0, embeds[:1], num_logits=2)
    assert (inference.rows, inference.max_length) == (1, 4)
