"""Training on pairs: what is learned, what it costs, that it can be stopped, and that the adapter merges."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from intertitle.align.features import Features
from intertitle.align.objectives import OBJECTIVES
from intertitle.align.policy import Policy
from intertitle.align.tune import Pair, Tuning, tune
from intertitle.errors import OptionError

pytest.importorskip("peft")

HOW = Tuning(steps=4, batch=2, rank=4, alpha=8, learning_rate=1e-2, save_every=2)
PAIRS = [
    Pair(0, "a red ball follows the camera", "music plays", (9.0, 2.0)),
    Pair(1, "people talk in the background", "a grey floor over the scene and music and people", (8.0, 3.5)),
    Pair(2, "the scene", "a red red red ball", (10.0, 1.0)),
    Pair(1, "music plays while people talk", "a ball plays music", (7.0, 5.0)),
]


@pytest.fixture(scope="module")
def base(data_dir):
    return data_dir / "av-qwen2"


@pytest.fixture(scope="module")
def clips(base):
    """Three clips' features: noise."""
    config, rng = Policy.open(base).config, np.random.default_rng(0)
    tower, branch = config.part("vision").config, config.part("audio").config
    vision = (config.sampling.count, tower.num_patches, tower.hidden_size)
    audio = (branch.num_tokens, branch.hidden_size)
    return Features(*(rng.standard_normal((3, *shape)).astype(np.float16) for shape in (vision, audio)))


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logits_of(policy, clips):
    with torch.no_grad():
        return policy.logits(clips.prompts(policy, slice(None)), policy.encode([pair.chosen for pair in PAIRS[:3]]))


def count_passes(policy):
    """(rows, with gradient) of every pass through the decoder."""
    passes = []
    policy.decoder.register_forward_pre_hook(lambda _, given: passes.append((len(given[0]), torch.is_grad_enabled())))
    return passes


@pytest.mark.parametrize(
    ("objective", "connector_rate"), [*((name, 0.0) for name in OBJECTIVES), ("synpo", 1e-3), ("supervised", 1e-3)]
)
def test_adapter_merges_to_the_tuned_policy(objective, connector_rate, base, clips, tmp_path):
    policy = Policy.open(base)
    before = logits_of(policy, clips)
    how = replace(HOW, objective=objective, connector_rate=connector_rate)
    out = tune(policy, clips, PAIRS, how, tmp_path / "adapter")
    tuned = logits_of(policy, clips)
    assert float((tuned - before).abs().max()) > 1e-2
    merged = Policy.open(base, out)
    torch.testing.assert_close(logits_of(merged, clips), tuned, rtol=1e-4, atol=1e-4)


def test_the_adapter_is_of_the_base_by_released_names(base, clips, tmp_path):
    out = tune(Policy.open(base), clips, PAIRS, HOW, tmp_path / "adapter")
    opened = Policy.open(base, out).opened
    opened.validate()
    assert opened.adapter is not None
    wanted = {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    layers = opened.config.decoder.num_layers
    assert len(opened.adapter.low_rank) == 7 * layers
    assert {name.split(".")[-2] + ".weight" for name in opened.adapter.low_rank} == wanted


def test_connector_and_projector_are_replaced_whole(base, clips, tmp_path):
    policy = Policy.open(base)
    before = clips.prompts(policy, slice(None)).detach()
    out = tune(policy, clips, PAIRS, replace(HOW, connector_rate=1e-3), tmp_path / "adapter")
    opened = Policy.open(base, out).opened
    opened.validate()
    assert opened.adapter is not None
    wanted = {name for name in opened.checkpoint.tensors if ".mm_projector" in name}
    assert set(opened.adapter.replaced) == wanted
    after = clips.prompts(policy, slice(None)).detach()
    changed = sum(tokens[0].flatten(0, 1).shape[0] for tokens in clips.tokens(policy, slice(1)).values())
    assert (after != before).any(dim=-1).sum() == 3 * changed
    saved = json.loads((out / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["mm_projector", "mm_projector_a"]


def test_peft_itself_reads_the_folder(base, clips, tmp_path):
    from peft import PeftConfig

    out = tune(Policy.open(base), clips, PAIRS, HOW, tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(out))
    assert (config.r, config.lora_alpha, config.peft_type) == (4, 8, "LORA")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "tuning.json"]


@pytest.mark.slow
@pytest.mark.parametrize("connector_rate", [0.0, 1e-3])
def test_the_compiled_captioner_says_what_the_tuned_policy_says(connector_rate, base, tmp_path):
    """From pairs to a bundle: frames and sound in, the same tokens out, and not those of the base."""
    import intertitle
    from intertitle.export.compile import compile_bundle

    numbers = np.load(base / "expected.npz")
    policy = Policy.open(base)
    with torch.no_grad():
        seen = policy.stages["vision"](torch.from_numpy(numbers["pixel_values"])).numpy()[None]
    width = policy.config.part("audio").config.hidden_size
    clip = Features(seen, numbers["audio_features"].reshape(1, -1, width))
    how = replace(HOW, objective="supervised", connector_rate=connector_rate)
    out = tune(policy, clip, [replace(PAIRS[0], clip=0)], how, tmp_path / "adapter")
    with torch.no_grad():
        want = policy.generate(clip.prompts(policy, slice(None)), 48)[0]
    assert want != numbers["audiovideo.greedy_tokens"].tolist()
    compile_bundle(base, tmp_path / "bundle", weights="fp32", adapter=out)
    caption = intertitle.Captioner.load(tmp_path / "bundle").caption(
        frames=numbers["frames_uint8"],
        waveform=numbers["audio_int16"],
        sample_rate=16000,
        decoding=intertitle.Decoding(max_new_tokens=48),
    )
    assert caption.token_ids == want


# --- learning


@pytest.mark.parametrize(
    "objective",
    [
        name if name in ("synpo", "dpo") else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
        if name != "supervised"
    ],
)
def test_every_objective_widens_its_margin(objective, base, clips, tmp_path):
    how = replace(HOW, objective=objective, steps=12, batch=4, learning_rate=1e-2, dropout=0.0, save_every=100)
    # SynPO compares probabilities, which are tiny in a random model: a wider slope lets it start.
    how = replace(how, options={"alpha": 3000.0}) if objective == "synpo" else how
    out = tune(Policy.open(base), clips, PAIRS, how, tmp_path / "adapter")
    log = lines(out)
    assert [line["step"] for line in log] == list(range(1, 13))
    measures = {"margin", "accuracy", "logp_chosen", "logp_rejected"}
    assert set(log[0]) == {"step", "loss", "grad_norm", "seconds"} | measures
    assert log[-1]["margin"] > log[0]["margin"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] == 1.0


def test_supervised_raises_the_chosen_texts(base, clips, tmp_path):
    how = replace(HOW, objective="supervised", steps=10, batch=4)
    log = lines(tune(Policy.open(base), clips, PAIRS, how, tmp_path / "adapter"))
    assert log[-1]["logp_chosen"] > log[0]["logp_chosen"] + 0.5


def test_dpo_begins_at_log_2(base, clips, tmp_path):
    """The adapter starts as nothing: the policy is its reference."""
    log = lines(tune(Policy.open(base), clips, PAIRS, replace(HOW, objective="dpo"), tmp_path / "adapter"))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert log[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_the_reference_is_the_policy_before_the_training(base, clips, tmp_path):
    """Batches of all pairs, no dropout: DPO's loss at step 2 from two policies, one of them tuned by one step."""
    how = replace(HOW, objective="dpo", connector_rate=1e-3, batch=4, steps=2, dropout=0.0, bfloat16=False)
    log = lines(tune(Policy.open(base), clips, PAIRS, how, tmp_path / "two"))
    tuned = Policy.open(base)
    tune(tuned, clips, PAIRS, replace(how, steps=1, warmup=0.0), tmp_path / "one")
    assert how.rate(0) == 1.0

    def margins(policy):
        with torch.no_grad():
            prompts = clips.prompts(policy, np.array([pair.clip for pair in PAIRS]))
            texts = [policy.encode([getattr(pair, name) for pair in PAIRS]) for name in ("chosen", "rejected")]
            chosen, rejected = (log_probs.sum(-1) for log_probs, _ in policy.pair_log_probs(prompts, *texts))
        return chosen - rejected

    loss = -torch.nn.functional.logsigmoid(0.1 * (margins(tuned) - margins(Policy.open(base)))).mean()
    assert log[1]["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_accumulated_batches_are_one_large_batch(base, clips, tmp_path):
    """Synpo is a mean over pairs, so that two batches of two are one of four."""
    how = replace(HOW, steps=1, dropout=0.0, bfloat16=False)
    large = tune(Policy.open(base), clips, PAIRS, replace(how, batch=4), tmp_path / "large")
    small = tune(Policy.open(base), clips, PAIRS, replace(how, batch=2, accumulation=2), tmp_path / "small")
    first, second = lines(large)[0], lines(small)[0]
    for name in ("loss", "grad_norm", "margin", "logp_chosen", "logp_rejected"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


# --- cost


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_only_dpo_runs_a_reference(objective, base, clips, tmp_path):
    policy = Policy.open(base)
    passes = count_passes(policy)
    tune(policy, clips, PAIRS, replace(HOW, objective=objective, accumulation=2), tmp_path / "adapter")
    rows = 2  # both captions of a pair share one row
    step = [(rows, False), (rows, True)] if objective == "dpo" else [(rows, True)]
    assert passes == step * HOW.steps * 2


def test_nothing_but_the_adapter_changes(base, clips, tmp_path):
    policy, fresh = Policy.open(base), Policy.open(base)
    state = torch.get_rng_state()
    tune(policy, clips, PAIRS, HOW, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    after = {name.replace(".base_layer.", "."): value for name, value in policy.state_dict().items()}
    for name, value in fresh.state_dict().items():
        assert torch.equal(after[name], value), name


def test_rates():
    how = Tuning(steps=20, warmup=0.1)
    rates = [how.rate(step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 18)
    assert [replace(how, decay="constant").rate(step) for step in (1, 2, 19)] == [1.0, 1.0, 1.0]


# --- stopping


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("stop", "connector_rate"),
    [pytest.param(1, 0.0, marks=pytest.mark.slow), (3, 0.0), pytest.param(5, 1e-3, marks=pytest.mark.slow)],
)
def test_a_stopped_run_ends_with_the_same_bytes(stop, connector_rate, base, clips, tmp_path):
    """Stopped before the first save, and between two; dropout and the order of the pairs go on where they were."""
    how = replace(HOW, steps=6, objective="dpo", dropout=0.3, connector_rate=connector_rate)

    def interrupt(_stage, step, _of):
        if step == stop:
            raise Stopped

    whole = tune(Policy.open(base), clips, PAIRS, how, tmp_path / "whole")
    torch.manual_seed(1234)
    with pytest.raises(Stopped):
        tune(Policy.open(base), clips, PAIRS, how, tmp_path / "parts", interrupt)
    assert not (tmp_path / "parts" / "adapter_model.safetensors").exists()
    seen = []
    parts = tune(Policy.open(base), clips, PAIRS, how, tmp_path / "parts", lambda _, step, of: seen.append((step, of)))
    assert seen[0] == (stop // 2 * 2 + 1, 6)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert [{**line, "seconds": 0} for line in lines(parts)] == [{**line, "seconds": 0} for line in lines(whole)]


def test_files_that_a_power_loss_left_half(base, clips, tmp_path):
    def interrupt(_stage, step, _of):
        if step == 3:
            raise Stopped

    out = tmp_path / "parts"
    with pytest.raises(Stopped):
        tune(Policy.open(base), clips, PAIRS, HOW, out, interrupt)
    for name in ("state.pt", "tuning.json", "log.jsonl"):
        whole = (out / name).read_bytes()
        for size in {0, len(whole) // 2} - ({0} if name == "log.jsonl" else set()):
            (out / name).write_bytes(whole[:size] + b"\n" * (name == "log.jsonl"))
            with pytest.raises(OptionError, match=rf"{name} is damaged"):
                tune(Policy.open(base), clips, PAIRS, HOW, out)
        (out / name).write_bytes(whole)


def test_a_finished_run_is_not_run_again(base, clips, tmp_path):
    policy = Policy.open(base)
    out = tune(policy, clips, PAIRS, HOW, tmp_path / "adapter")
    again = Policy.open(base)
    passes = count_passes(again)
    tune(again, clips, PAIRS, HOW, out)
    assert passes == []
    torch.testing.assert_close(logits_of(again, clips), logits_of(policy, clips), rtol=0, atol=0)


# --- mistakes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "ppo"}, "not one of synpo, leanpo"),
        ({"options": {"gama": 1.0}}, "synpo has no option 'gama'; it has alpha, beta, form"),
        ({"objective": "supervised", "options": {"beta": 1.0}}, "it has none"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_be_honoured(fields, said):
    with pytest.raises(OptionError, match=said):
        Tuning(**fields)


def test_pairs_and_folders_that_do_not_fit(base, clips, tmp_path):
    out = tune(Policy.open(base), clips, PAIRS, HOW, tmp_path / "adapter")
    with pytest.raises(OptionError, match="holds another training"):
        tune(Policy.open(base), clips, PAIRS[:3], HOW, out)
    with pytest.raises(OptionError, match="holds another training"):
        tune(Policy.open(base), clips, PAIRS, replace(HOW, seed=1), out)
    with pytest.raises(OptionError, match="none of 4 pairs has a gap of 20 or more"):
        tune(Policy.open(base), clips, PAIRS, replace(HOW, min_gap=20), tmp_path / "other")
    with pytest.raises(OptionError, match="clip 7, but there are features of 3"):
        tune(Policy.open(base), clips, [Pair(7, "a", "b")], HOW, tmp_path / "other")
    with pytest.raises(OptionError, match="has an adapter"):
        tune(Policy.open(base, out), clips, PAIRS, HOW, tmp_path / "other")
    tuned = Policy.open(base)
    tune(tuned, clips, PAIRS, HOW, tmp_path / "second")
    with pytest.raises(OptionError, match="tuned already"):
        tune(tuned, clips, PAIRS, HOW, tmp_path / "third")
    with pytest.raises(OptionError, match="the loss is nan at step 1"):
        tune(Policy.open(base), Features(clips.vision * np.nan, clips.audio), PAIRS, HOW, tmp_path / "fourth")


def test_pairs_under_the_gap_are_left_out(base, clips, tmp_path):
    policy = Policy.open(base)
    out = tune(policy, clips, PAIRS, replace(HOW, min_gap=4), tmp_path / "adapter")
    assert json.loads((out / "tuning.json").read_text())["pairs"] == 3
