"""The training form of a captioner against the fixtures of the original implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from intertitle.align.policy import IGNORED, Policy, pad, pixels
from intertitle.contract.pipeline import EachUnit, Stage, StageInput, WholeClip, Window
from intertitle.errors import OptionError
from intertitle.runtime.prompt import Timing


@pytest.fixture(scope="module")
def policy(data_dir):
    return Policy.open(data_dir / "av-qwen2").eval()


@pytest.fixture(scope="module")
def numbers(data_dir):
    return np.load(data_dir / "av-qwen2" / "expected.npz")


def visual(policy, features):
    """What follows the tower: ``[B, T, P, D]`` to ``{"connector": [B, U, n, H]}``."""
    return {"connector": policy.run(["connector"], {"vision": features})["connector"]}


@pytest.fixture(scope="module")
def prompt(policy, numbers):
    tokens = visual(policy, torch.from_numpy(numbers["vision_features"])[None])
    tokens["audio"] = torch.from_numpy(numbers["audio_tokens"])[None, None]
    return policy.prompt(tokens, "Describe what you see and hear.")


def test_stages_of_a_batch_equal_the_reference(policy, numbers):
    """Two clips, the second with its frames in reverse order: the first one's numbers are the reference's."""
    frames, fbank = (torch.from_numpy(numbers[name]) for name in ("pixel_values", "fbank_video_policy"))
    with torch.no_grad():
        found = policy.run(
            ["connector", "audio"],
            {"pixels": torch.stack((frames, frames.flip(0))), "sound": fbank.expand(2, 1, -1, -1)},
        )
    for name, wanted in (("vision", "vision_features"), ("connector", "video_tokens"), ("audio", "audio_tokens")):
        reference = torch.from_numpy(numbers[wanted])
        torch.testing.assert_close(found[name][0].reshape(reference.shape), reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["connector"][0], found["connector"][1], atol=1e-2)


@pytest.mark.parametrize("mode", ["video", "audio", "audiovideo"])
def test_prompts_equal_the_reference(policy, numbers, mode):
    """The instruction is the default one. A sound alone is heard from its beginning, so its tokens are made here."""
    heard = "fbank_audio_policy" if mode == "audio" else "fbank_video_policy"
    given = {"pixels": torch.from_numpy(numbers["pixel_values"])[None]}
    given["sound"] = torch.from_numpy(numbers[heard])[None, None]
    names = {"video": ["connector"], "audio": ["audio"], "audiovideo": ["connector", "audio"]}[mode]
    with torch.no_grad():
        tokens = {name: policy.run([name], given)[name] for name in names}
        embeds = policy.prompt(tokens)[0]
    torch.testing.assert_close(embeds, torch.from_numpy(numbers[f"{mode}.inputs_embeds"]), rtol=1e-4, atol=1e-4)


def test_tokens_without_a_prompt_are_refused(policy):
    with pytest.raises(OptionError, match="no prompt of a videollama2 captioner is of vision"):
        policy.prompt({"vision": torch.zeros(1, 8, 25, 64)})


@pytest.mark.parametrize("name", ["av-qwen2", "clip-mistral", "auroracap"])
def test_clips_of_a_batch_do_not_mix(name, data_dir):
    """Windows that divide the clip (av-qwen2), windows over zeros around it (clip-mistral), single frames."""
    policy = Policy.open(data_dir / name).eval()
    torch.manual_seed(0)
    size = policy.config.image.output_size
    pixels = torch.randn(3, 8, 3, size, size)
    with torch.no_grad():
        together = policy.run(["connector"], {"pixels": pixels})["connector"]
        for clip in range(3):
            alone = policy.run(["connector"], {"pixels": pixels[clip : clip + 1]})["connector"]
            torch.testing.assert_close(together[clip : clip + 1], alone, rtol=1e-4, atol=1e-4)
            prompt = policy.prompt({"connector": together})[clip : clip + 1]
            torch.testing.assert_close(prompt, policy.prompt({"connector": alone}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [4, 7])
@pytest.mark.parametrize(
    "unit", [EachUnit(), Window(2, 2), Window(2, 2, 1), Window(3, 1), WholeClip()], ids=lambda unit: str(unit)
)
def test_any_unit_runs_for_a_batch_as_for_each_clip(unit, frames, policy):
    """A stage of each kind whose module sums what it sees, frames in powers of ten: by hand for each clip alone."""

    class Sum(torch.nn.Module):
        def forward(self, x):
            kept = {"frame": 1, "window": 1, "clip": 0}[unit.__struct_config__.tag]
            return x.sum(tuple(range(kept, x.dim())), keepdim=True).reshape(-1, 1, 1)

    stage = Stage(name="sum", unit=unit, inputs=(StageInput("x", "pixels"),), output="y")
    clips = 10.0 ** torch.arange(frames) * torch.tensor([1.0, 3.0])[:, None]
    policy.stages["sum"] = Sum()
    try:
        found = policy._run_stage(stage, {"pixels": clips[..., None]})
    finally:
        del policy.stages["sum"]
    wanted = []
    for clip in clips.tolist():
        if isinstance(unit, Window):
            padded = [0.0] * unit.padding + clip + [0.0] * unit.padding
            starts = range(0, len(padded) - unit.kernel + 1, unit.stride)
            wanted.append([sum(padded[start : start + unit.kernel]) for start in starts])
        else:
            wanted.append([sum(clip)] if isinstance(unit, WholeClip) else clip)
    assert found.flatten(1).tolist() == wanted


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
    tower = policy.config.part("vision").config
    tokens = visual(policy, torch.randn(1, 8, tower.num_patches, tower.hidden_size))
    caption = policy.encode(["a red circle"])
    assert caption[0, -1] == policy.eos
    assert IGNORED not in caption
    policy.log_probs(policy.prompt(tokens), caption)[0].sum().neg().backward()
    for part in (policy.stages["frame_connector"], policy.stages["connector"], policy.decoder, policy.embedding):
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


@pytest.mark.parametrize("name", ["llava-video", "llava-next-video"])
def test_another_family_from_pixels_to_tokens(name, data_dir):
    """Its stages, its prompt (which for LLaVA-Video says when each frame is shown) and the tokens of the reference."""
    policy, wanted = Policy.open(data_dir / name).eval(), np.load(data_dir / name / "expected.npz")
    timing = None
    if "frame_time" in wanted:
        times = np.array([float(time.removesuffix("s")) for time in str(wanted["frame_time"]).split(",")])
        timing = Timing(float(wanted["video_time"]), times)
    pixels = torch.from_numpy(wanted["pixel_values"])[None]
    with torch.no_grad():
        tokens = policy.run(["connector"], {"pixels": pixels})["connector"]
        prompt = policy.prompt({"connector": tokens}, timing=timing)
        torch.testing.assert_close(prompt[0], torch.from_numpy(wanted["video.inputs_embeds"]), rtol=1e-4, atol=1e-4)
        greedy = wanted["video.greedy_tokens"].tolist()
        logits = policy.logits(prompt, torch.tensor([greedy]))
    assert logits[0].argmax(-1).tolist() == greedy
