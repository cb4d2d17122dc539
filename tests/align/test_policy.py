"""The training form of a captioner against the fixtures of the original implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from intertitle.align.policy import IGNORED, Policy, pad, pixels


@pytest.fixture(scope="module")
def policy(data_dir):
    return Policy.open(data_dir / "av-qwen2").eval()


@pytest.fixture(scope="module")
def numbers(data_dir):
    return np.load(data_dir / "av-qwen2" / "expected.npz")


@pytest.fixture(scope="module")
def prompt(policy, numbers):
    visual = policy.visual_tokens(torch.from_numpy(numbers["vision_features"])[None])
    audio = torch.from_numpy(numbers["audio_tokens"])[None]
    return policy.prompt(visual, audio, "Describe what you see and hear.")


def test_visual_tokens_and_prompt_equal_the_reference(policy, numbers):
    visual = policy.visual_tokens(torch.from_numpy(numbers["vision_features"])[None])
    torch.testing.assert_close(visual[0], torch.from_numpy(numbers["video_tokens"]), rtol=1e-4, atol=1e-4)


def test_clips_of_a_batch_do_not_mix(policy):
    torch.manual_seed(0)
    features = torch.randn(3, 8, policy.config.vision.num_patches, policy.config.vision.hidden_size)
    together = policy.visual_tokens(features)
    for clip in range(3):
        alone = policy.visual_tokens(features[clip : clip + 1])[0]
        torch.testing.assert_close(together[clip], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["video", "audiovideo"])
def test_logits_and_greedy_tokens_equal_the_reference(policy, numbers, mode):
    """One pass over prompt and caption predicts every token that the reference generated step by step."""
    embeds = torch.from_numpy(numbers[f"{mode}.inputs_embeds"])[None]
    tokens = torch.from_numpy(numbers[f"{mode}.greedy_tokens"])[None]
    with torch.no_grad():
        logits = policy.logits(embeds, tokens)
    torch.testing.assert_close(logits[0, 0], torch.from_numpy(numbers[f"{mode}.last_logits"]), rtol=1e-3, atol=1e-3)
    if policy.config.generation.repetition_penalty == 1.0:
        assert logits[0].argmax(-1).tolist() == tokens[0].tolist()
    made = policy.generate(embeds, tokens.shape[1])[0]
    assert made == tokens[0].tolist()[: len(made)]


def test_padding_changes_nothing(policy, prompt):
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    with torch.no_grad():
        both, mask = policy.log_probs(prompt.expand(2, -1, -1), pad(ids))
        for row, values in enumerate(ids):
            alone, _ = policy.log_probs(prompt, pad([values]))
            torch.testing.assert_close(both[row, : len(values)], alone[0], rtol=1e-4, atol=1e-4)
            assert mask[row].sum() == len(values)
            assert torch.all(both[row, len(values) :] == 0)


def test_two_captions_of_one_prompt_are_those_alone(policy, prompt):
    """Neither sees the other, whichever is the longer."""
    ids = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], [[20, 21], [22, 23, 24, 25, 26, 27, 28]]
    both = torch.cat((prompt, prompt.flip(1)))
    with torch.no_grad():
        packed = policy.pair_log_probs(both, pad(ids[0]), pad(ids[1]))
        for (logp, mask), each in zip(packed, ids, strict=True):
            alone, alone_mask = policy.log_probs(both, pad(each))
            torch.testing.assert_close(logp, alone, rtol=1e-4, atol=1e-4)
            assert torch.equal(mask, alone_mask)


def test_gradients_reach_every_part(data_dir):
    policy = Policy.open(data_dir / "av-qwen2")
    policy.requires_grad_(True)
    torch.manual_seed(0)
    visual = policy.visual_tokens(torch.randn(1, 8, policy.config.vision.num_patches, policy.config.vision.hidden_size))
    tokens = policy.encode(["a red circle"])
    assert tokens[0, -1] == policy.eos
    assert IGNORED not in tokens
    policy.log_probs(policy.prompt(visual, None), tokens)[0].sum().neg().backward()
    for part in (policy.connector, policy.decoder, policy.embedding):
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in part.parameters())


def test_generation_in_a_batch_is_that_alone(policy, prompt):
    other = prompt + 0.5 * torch.randn(prompt.shape, generator=torch.Generator().manual_seed(1))
    both = policy.generate(torch.cat((prompt, other)), 12)
    assert both == [policy.generate(prompt, 12)[0], policy.generate(other, 12)[0]]


def test_sampling_follows_its_generator(policy, prompt):
    def draw(seed):
        return policy.generate(prompt, 12, temperature=1.0, top_p=0.95, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)[0]) for seed in range(4)}) > 1


def test_pixels_equal_the_tower_s_input(policy, numbers):
    """At the tower's own size nothing is resized: only scaled."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 70, 70, 3), np.uint8)
    want = (frames.astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels(frames, policy.config).numpy(), want.transpose(0, 3, 1, 2), atol=1e-6)
