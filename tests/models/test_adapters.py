from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from intertitle.errors import CheckpointError
from intertitle.models import bounded, open_checkpoint
from intertitle.models.adapters import Adapter
from safetensors.torch import load_file, save_file

Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(
    path: Path, tensors: dict[str, torch.Tensor], settings: dict | None = None, suffix: str = ".safetensors"
) -> Path:
    """An adapter folder; the default settings are those of a plain rank-2 LoRA."""
    path.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **(settings or {})}
    (path / "adapter_config.json").write_text(json.dumps(values))
    file = path / f"adapter_model{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    return path


def pair(module: str = Q_PROJ, rank: int = 2, out: int = 128, inside: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": torch.randn(rank, inside, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("base", ["clip-mistral", "auroracap"])
def test_merge_by_hand(base, suffix, data_dir, tmp_path, opened):
    tensors = pair()
    merged = open_checkpoint(data_dir / base, adapter=write(tmp_path / "adapter", tensors, suffix=suffix))
    a, b = tensors.values()
    before = opened(base).tensor("decoder", "layers.0.self_attn.q_proj.weight")
    after = merged.tensor("decoder", "layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(after, before + 3.0 * b @ a)
    other = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged.tensor("decoder", other), opened(base).tensor("decoder", other))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 10, "proj": 10}}, 3.0),
        ({"alpha_pattern": {r".*\.0\.self_attn\.q_proj": 10}}, 5.0),
        ({"r": 8, "rank_pattern": {"self_attn.q_proj": 2}}, 3.0),
        ({"lora_alpha": None}, 4.0),
    ],
)
def test_scale(settings, scale, tmp_path):
    adapter = Adapter.open(write(tmp_path / "adapter", pair(), settings))
    assert adapter.low_rank[f"{Q_PROJ}.weight"].scale == pytest.approx(scale)


def test_same_as_peft(tmp_path, copied, data_dir):
    """A Llama with AuroraCap's decoder weights, adapted and merged by peft itself."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    copy = copied("auroracap")
    config = transformers.LlamaConfig.from_pretrained(copy.path)
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(copy.tensors())
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=["q_proj", "down_proj", "o_proj"],
        use_rslora=True,
        init_lora_weights=False,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 6},
        alpha_pattern={"down_proj": 5},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lm_head.modules_to_save" in name:
            parameter.add_(1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().state_dict()
    merged = open_checkpoint(copy.path, adapter=tmp_path / "adapter")
    plain = open_checkpoint(copy.path)
    changed = 0
    for entry in merged.module("decoder").state_dict():
        name = entry if entry == "lm_head.weight" else f"model.{entry}"
        torch.testing.assert_close(merged.tensor("decoder", entry), wanted[name])
        changed += not torch.equal(wanted[name], plain.tensor("decoder", entry))
    assert changed == 3 * 3 + 1


def test_replacement_comes_before_the_low_rank_sum(data_dir, tmp_path):
    path = write(tmp_path / "adapter", pair())
    whole = torch.ones(128, 128)
    torch.save({f"base_model.model.{Q_PROJ}.weight": whole}, path / "non_lora_trainables.bin")
    merged = open_checkpoint(data_dir / "clip-mistral", adapter=path)
    a, b = pair().values()
    torch.testing.assert_close(merged.tensor("decoder", "layers.0.self_attn.q_proj.weight"), whole + 3.0 * b @ a)


@pytest.mark.parametrize("prefix", ["", "base_model.", "base_model.model."])
def test_non_lora_tensors_under_every_prefix(prefix, data_dir, tmp_path):
    path = write(tmp_path / "adapter", pair())
    torch.save(
        {f"{prefix}model.mm_projector.readout.2.bias": torch.full((128,), 5.0)}, path / "non_lora_trainables.bin"
    )
    merged = open_checkpoint(data_dir / "clip-mistral", adapter=path)
    assert torch.equal(merged.tensor("connector", "readout.2.bias"), torch.full((128,), 5.0))


def test_an_adapter_reaches_reshaped_tensors_and_the_embedding(data_dir, tmp_path, opened):
    path = write(tmp_path / "adapter", pair())
    kernel = torch.randn(128, 128, 1, 1)
    extra = {"model.mm_projector.s2.b2.conv1.conv.weight": kernel, "model.embed_tokens.weight": torch.ones(369, 128)}
    torch.save({f"base_model.model.{name}": value for name, value in extra.items()}, path / "non_lora_trainables.bin")
    merged = open_checkpoint(data_dir / "clip-mistral", adapter=path)
    assert torch.equal(merged.tensor("connector", "s2.b2.conv1.conv.weight"), kernel[:, :, 0, 0])
    assert torch.equal(merged.embedding(), torch.ones(369, 128))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (pair("model.layers.7.self_attn.q_proj"), "model.layers.7.self_attn.q_proj.weight"),
        (pair(out=64), f"{Q_PROJ}.weight"),
        (pair(inside=64), f"{Q_PROJ}.weight"),
        (pair("language_model.layers.0.self_attn.q_proj"), "language_model.layers.0"),
    ],
)
def test_an_adapter_for_another_base_is_refused(tensors, named, data_dir, tmp_path):
    path = write(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=f"{re.escape(named)}.*another base"):
        open_checkpoint(data_dir / "clip-mistral", adapter=path)


def test_non_lora_tensor_that_the_base_lacks_is_refused(data_dir, tmp_path):
    path = write(tmp_path / "adapter", pair())
    torch.save({"base_model.model.model.mm_projector.9.weight": torch.ones(2)}, path / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"model.mm_projector.9.weight"):
        open_checkpoint(data_dir / "clip-mistral", adapter=path)


def test_fixture_adapter_on_another_family_is_refused(data_dir):
    with pytest.raises(CheckpointError, match=r"videollama2_mistral.*videollama2_qwen2"):
        open_checkpoint(data_dir / "av-qwen2", adapter=data_dir / "clip-mistral-lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 4}, "rank is said to be 4"),
        ({"r": 0}, "r must be a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"peft_type": None}, "peft_type is missing"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(write(tmp_path / "adapter", pair(), settings))


def test_tensors_that_cannot_be_merged_are_refused(tmp_path):
    a, b = pair()
    half = {a: pair()[a]}
    with pytest.raises(CheckpointError, match="other half is missing"):
        Adapter.open(write(tmp_path / "half", half))
    magnitude = {**pair(), f"base_model.model.{Q_PROJ}.lora_magnitude_vector": torch.ones(128)}
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        Adapter.open(write(tmp_path / "dora", magnitude))
    with pytest.raises(CheckpointError, match="no LoRA tensors"):
        Adapter.open(write(tmp_path / "none", {"base_model.model.lm_head.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="lora_B"):
        Adapter.open(write(tmp_path / "bias", {**pair(), b.replace("weight", "bias"): torch.ones(128)}))


def test_folders_that_are_no_adapters_are_refused(tmp_path, data_dir):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Adapter.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        Adapter.open(data_dir / "clip-mistral")
    path = write(tmp_path / "adapter", pair())
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model"):
        Adapter.open(path)


def test_an_adapter_that_is_not_finite_is_named(data_dir, tmp_path):
    tensors = pair()
    next(iter(tensors.values()))[0, 0] = float("nan")
    merged = open_checkpoint(data_dir / "clip-mistral", adapter=write(tmp_path / "spoilt", tensors))
    with pytest.raises(CheckpointError, match=f"spoilt.*{Q_PROJ}"):
        merged.tensor("decoder", "layers.0.self_attn.q_proj.weight")


def test_fixture_adapter_has_what_its_readme_says(data_dir):
    adapter = Adapter.open(data_dir / "clip-mistral-lora")
    assert {part.scale for part in adapter.low_rank.values()} == {2.0}
    assert len(adapter.low_rank) == 3 * 7
    assert {name.rpartition(".")[0] for name in adapter.replaced} == {f"model.mm_projector.readout.{i}" for i in (0, 2)}
    files = load_file(data_dir / "clip-mistral-lora" / "adapter_model.safetensors")
    assert set(files) <= set(adapter.tensors)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_without_end_is_stopped(option, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 1)
    with pytest.raises(CheckpointError, match=f"{option} takes more than 1 s or"):
        Adapter.open(write(tmp_path / "adapter", pair(), {option: {"(([a-z0-9_.])+)+!": 2}}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -1, 0, 1e300, True])
@pytest.mark.parametrize("place", ["lora_alpha", "alpha_pattern"])
def test_absurd_numbers_are_refused(place, value, tmp_path):
    settings = {"lora_alpha": value} if place == "lora_alpha" else {"alpha_pattern": {"q_proj": value}}
    with pytest.raises(CheckpointError, match=place) as caught:
        Adapter.open(write(tmp_path / "adapter", pair(), settings))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "some_new_one", 3])
def test_adapters_that_changed_their_base_are_refused(kind, tmp_path):
    with pytest.raises(CheckpointError, match=rf"init_lora_weights is '?{kind}"):
        Adapter.open(write(tmp_path / "adapter", pair(), {"init_lora_weights": kind}))


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_adapters_that_left_their_base_alone_are_merged(kind, tmp_path):
    assert Adapter.open(write(tmp_path / "adapter", pair(), {"init_lora_weights": kind})).low_rank


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "pissa", "olora"])
def test_what_peft_does_to_the_base(kind, tmp_path, copied):
    """Untrained, an adapter is the base itself: merging a refused kind into the released weights would be wrong."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    copy = copied("auroracap")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(copy.path))
    model.load_state_dict(copy.tensors())
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=kind)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    if kind in ("pissa", "olora"):
        with pytest.raises(CheckpointError, match=f"init_lora_weights is '{kind}'"):
            open_checkpoint(copy.path, adapter=tmp_path / "adapter")
        return
    merged = open_checkpoint(copy.path, adapter=tmp_path / "adapter")
    entry = "layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        merged.tensor("decoder", entry), adapted.merge_and_unload().state_dict()[f"model.{entry}"]
    )
