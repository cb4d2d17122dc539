"""Reading the two families' JSON: what is taken over, and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from intertitle.contract.pipeline import ImagePlan, PromptLayout, Text, Tokens
from intertitle.errors import CheckpointError
from intertitle.models import FAMILIES, bounded, open_checkpoint
from intertitle.models.captioner import CaptionerCheckpoint
from intertitle.models.checkpoint import Checkpoint
from intertitle.models.fields import Fields
from intertitle.models.hf_config import BUILTIN_TOWERS, builtin_tower, read_image_processing, read_vision
from intertitle.models.stages import run_stages
from intertitle.models.tensor_files import TensorInfo

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def read(path):
    checkpoint = Checkpoint.open(path)
    family = next(family for family in FAMILIES.values() if family.matches(checkpoint))
    return family.read_config(checkpoint)


def around(layout: PromptLayout) -> tuple[str, str]:
    """The texts in front of the tokens and behind them."""
    before, *_, after = layout.pieces
    assert isinstance(before, Text)
    assert isinstance(after, Text)
    return before.text, after.text


@pytest.mark.parametrize(("name", "patches"), list(zip(BUILTIN_TOWERS, (576, 729, 729), strict=True)))
def test_builtin_towers(name, patches):
    """docs/facts.md 1.2 and 2.4."""
    tower = builtin_tower(name)
    assert tower is not None
    config = read_vision(tower)
    assert (config.num_patches, config.num_used_layers) == (patches, config.num_layers - 1)
    eps, act = (1e-6, "gelu_pytorch_tanh") if "siglip" in name else (1e-5, "quick_gelu")
    assert (config.layer_norm_eps, config.hidden_act) == (eps, act)
    again = builtin_tower(f"/checkpoints/{name.rpartition('/')[2]}/")
    assert again is not None
    assert again.values == tower.values
    assert builtin_tower(f"{name}-other") is None


def test_released_layout_names_a_hub_tower(copied):
    """The tower's config is built in, its weights are in the shards: only the tiny shapes give it away."""
    copy = copied("clip-mistral")
    copy.edit_json("config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    config = read(copy.path)
    vision, connector = config.part("vision").config, config.part("connector").config
    assert (vision.hidden_size, vision.num_layers) == (1024, 24)
    assert config.image == ImagePlan("shortest_edge", 336, 336, *CLIP_STATISTICS)
    assert (connector.in_size, connector.grid) == (1024, 24)
    with pytest.raises(CheckpointError, match=r"class_embedding is \[64\].* \[1024\]"):
        open_checkpoint(copy.path)
    copy.edit_json("config.json", mm_vision_tower="google/siglip-so400m-patch14-384")
    assert read(copy.path).image == ImagePlan("exact", 384, 384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    copy.edit_json("config.json", mm_vision_tower="somebody/other-tower")
    with pytest.raises(CheckpointError, match="somebody/other-tower"):
        read(copy.path)


@pytest.mark.parametrize("fixture", ["clip-mistral", "av-qwen2"])
def test_tower_in_its_folder_is_used_where_the_shards_have_none(fixture, copied, opened):
    copy = copied(fixture)
    copy.save({name: value for name, value in copy.tensors().items() if "vision_tower" not in name})
    checkpoint, original = open_checkpoint(copy.path), opened(fixture)
    for entry in original.module("vision").state_dict():
        assert torch.equal(checkpoint.tensor("vision", entry), original.tensor("vision", entry))


def test_shards_tower_wins_over_the_folder(copied, opened):
    copy = copied("av-qwen2")
    copy.save({name: value * 0 for name, value in copy.tensors("tiny-siglip/model.safetensors").items()}, "tower")
    (copy.path / "tower").replace(copy.path / "tiny-siglip/model.safetensors")
    weight = open_checkpoint(copy.path).tensor("vision", "encoder.layers.0.mlp.fc1.weight")
    assert torch.equal(weight, opened("av-qwen2").tensor("vision", "encoder.layers.0.mlp.fc1.weight"))


def test_frames_default_to_eight(copied):
    copy = copied("clip-mistral")
    copy.edit_json("config.json", num_frames=16)
    assert read(copy.path).sampling.count == 16
    copy.edit_json("config.json", "num_frames")
    assert read(copy.path).sampling.count == 8


def test_plain_mistral_of_older_revisions(copied, opened):
    copy = copied("clip-mistral")
    copy.edit_json("config.json", model_type="mistral")
    assert read(copy.path) == opened("clip-mistral").config
    copy.edit_json("config.json", "mm_vision_tower")
    with pytest.raises(CheckpointError, match="model_type 'mistral'"):
        open_checkpoint(copy.path)


def test_experts_of_a_config(copied):
    copy = copied("clip-mixtral")
    decoder = read(copy.path).decoder
    assert (decoder.num_experts, decoder.experts_per_token, decoder.intermediate_size) == (8, 2, 72)
    # transformers' MixtralConfig has these where a file leaves them out.
    copy.edit_json("config.json", "num_local_experts", "num_experts_per_tok")
    assert read(copy.path).decoder == decoder
    copy.edit_json("config.json", num_experts_per_tok=9)
    with pytest.raises(CheckpointError, match="cannot get 9 of 8 experts"):
        open_checkpoint(copy.path)


def test_sliding_window_caps_the_context_where_it_is_on(copied):
    mistral, qwen = copied("clip-mistral"), copied("av-qwen2")
    assert read(mistral.path).decoder.context_length == 4096
    mistral.edit_json("config.json", sliding_window=1024)
    assert read(mistral.path).decoder.context_length == 1024
    qwen.edit_json("config.json", sliding_window=1024)
    assert read(qwen.path).decoder.context_length == 4096
    qwen.edit_json("config.json", use_sliding_window=True)
    assert read(qwen.path).decoder.context_length == 1024


def test_decoder_of_each_family(opened):
    qwen, mistral, llama = (opened(name).config.decoder for name in ("av-qwen2", "clip-mistral", "auroracap"))
    assert (qwen.qkv_bias, mistral.qkv_bias, llama.qkv_bias) == (True, False, False)
    assert (qwen.rope_factor, mistral.rope_factor, llama.rope_factor) == (1.0, 1.0, 4.0)
    assert (qwen.num_kv_heads, llama.num_kv_heads, llama.context_length) == (2, 4, 16384)


def test_context_of_a_scaled_vicuna_config(copied):
    """lmsys/vicuna-7b-v1.5-16k keeps the unscaled length in one key and the real one in the other."""
    copy = copied("auroracap")
    copy.edit_json("config.json", max_position_embeddings=4096, max_sequence_length=16384)
    assert read(copy.path).decoder.context_length == 16384


@pytest.mark.parametrize("spelling", [{"type": "linear"}, {"rope_type": "linear"}])
def test_linear_and_dynamic_rope_scaling_and_no_other(spelling, copied):
    copy = copied("auroracap")
    copy.edit_json("config.json", rope_scaling={**spelling, "factor": 2.0})
    assert read(copy.path).decoder.rope_factor == 2.0
    copy.edit_json("config.json", rope_scaling={next(iter(spelling)): "yarn", "factor": 2.0})
    with pytest.raises(CheckpointError, match="'yarn'"):
        read(copy.path)
    # It acts beyond max_position_embeddings only, and the context ends there.
    copy.edit_json(
        "config.json",
        max_position_embeddings=4096,
        max_sequence_length=16384,
        rope_scaling={next(iter(spelling)): "dynamic", "factor": 2.0},
    )
    decoder = read(copy.path).decoder
    assert (decoder.rope_factor, decoder.context_length) == (1.0, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "128"}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number from"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta must be a number from"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
        ({"mm_projector_type": "identity"}, "'identity'"),
        ({"mm_projector_type": 3}, "mm_projector_type must be a string"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_vision_select_layer": -9}, "hidden state -9"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer"),
        ({"num_frames": 0}, "num_frames"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_config_values_that_cannot_be_are_named(changes, message, copied):
    copy = copied("clip-mistral")
    copy.edit_json("config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy.path)
    assert "\n" not in str(caught.value)


def test_connector_of_another_kind_than_the_tensors_is_refused(copied):
    copy = copied("clip-mistral")
    copy.edit_json("config.json", mm_projector_type="mlp2x_gelu")
    with pytest.raises(CheckpointError, match=r"model\.mm_projector\.0\.weight is missing"):
        open_checkpoint(copy.path)


@pytest.mark.parametrize(
    "kind", ["stc_connector_v35", "stp_connector", "spatial_conv", "spatial_pool", "mlp2x_gelu", "linear"]
)
def test_every_connector_kind_is_read_from_its_released_names(kind, copied, data_dir):
    """Weights written channels-first under the reference's names come back as the module's own."""
    copy = copied("clip-mistral")
    spatial = kind.startswith("spatial")
    tensors = {name: value for name, value in copy.tensors().items() if not name.startswith("model.mm_projector.")}
    prefix, random = "model.mm_projector.", torch.Generator().manual_seed(0)
    if kind in ("mlp2x_gelu", "linear"):
        shapes = {"weight": (128, 64), "bias": (128,)}
        if kind == "mlp2x_gelu":
            shapes = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    elif spatial:
        # Such a connector takes a tower as wide as the decoder, which the tiny tower is not.
        shapes = {
            f"readout.{i}.{entry}": (128, 128)[: 1 + (entry == "weight")]
            for i in (0, 2)
            for entry in ("weight", "bias")
        }
        if kind == "spatial_conv":
            shapes |= {"sampler.0.weight": (128, 128, 1, 2, 2), "sampler.0.bias": (128,)}
    else:
        shapes = {
            name.removeprefix(prefix): tuple(value.shape) for name, value in copy.tensors().items() if prefix in name
        }
        if kind == "stp_connector":
            shapes = {name: shape for name, shape in shapes.items() if "sampler" not in name}
    added = {prefix + name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    copy.save({**tensors, **added})
    copy.edit_json("config.json", mm_projector_type=kind)
    if spatial:
        with pytest.raises(CheckpointError, match=f"{kind}.*needs a vision tower as wide"):
            open_checkpoint(copy.path)
        return
    checkpoint = open_checkpoint(copy.path)
    stages = checkpoint.config.pipeline.needed("connector")[1:]
    state = [
        checkpoint.tensor(stage.name, entry) for stage in stages for entry in checkpoint.module(stage.name).state_dict()
    ]
    assert sum(value.numel() for value in state) == sum(value.numel() for value in added.values())
    assert run_stages(stages, checkpoint.load, {"vision": torch.randn(8, 16, 64)})["connector"].shape[2] == 128


def test_audio_projector_kind_is_told_from_its_tensors(copied, opened):
    """A derivative's config says linear where the weights are an MLP (docs/facts.md 1.1)."""
    copy = copied("av-qwen2")
    copy.edit_json("config.json", mm_projector_a_type="linear")
    config = read(copy.path)
    assert config == opened("av-qwen2").config
    assert config.part("audio").config.projector_kind == "mlp2x_gelu"
    tensors = {name: value for name, value in copy.tensors().items() if "mm_projector_a" not in name}
    tensors |= {"model.mm_projector_a.weight": torch.randn(128, 96), "model.mm_projector_a.bias": torch.randn(128)}
    copy.save(tensors)
    assert open_checkpoint(copy.path).load("audio")(torch.zeros(1, 2998, 128)).shape == (1, 1496, 128)


def test_released_audio_dimensions_hold_without_beats_config(copied):
    copy = copied("av-qwen2")
    copy.edit_json("config.json", "beats_config")
    audio = read(copy.path).part("audio").config
    assert (audio.embed_dim, audio.hidden_size, audio.num_layers, audio.num_tokens) == (512, 768, 12, 1496)


def test_tied_bias_table_may_be_kept_once_but_not_in_two_versions(copied, opened):
    copy = copied("av-qwen2")
    tensors, prefix = copy.tensors(), "model.audio_tower.encoder.layers"
    first, second = (f"{prefix}.{i}.self_attn.relative_attention_bias.weight" for i in (0, 1))
    wanted = opened("av-qwen2").tensor("audio", "tower.encoder.relative_attention_bias.weight")
    for lost in (first, second):
        copy.save({name: value for name, value in tensors.items() if name != lost})
        kept = open_checkpoint(copy.path).tensor("audio", "tower.encoder.relative_attention_bias.weight")
        assert torch.equal(kept, wanted)
    copy.save({**tensors, second: tensors[second] + 1})
    with pytest.raises(CheckpointError, match=r"layers\.1.* should be a copy of .*layers\.0.* and differs"):
        open_checkpoint(copy.path)
    copy.save({name: value for name, value in tensors.items() if name not in (first, second)})
    with pytest.raises(CheckpointError, match=r"relative_attention_bias\.weight is missing"):
        open_checkpoint(copy.path)


def test_second_name_of_auroracaps_position_table(copied, opened):
    copy, file = copied("auroracap"), "visual_encoder/model.safetensors"
    tensors, position = copy.tensors(file), "vision_model.embeddings.position_embedding.weight"
    wanted = opened("auroracap").tensor("vision", "embeddings.position_embedding.weight")
    without = {name: value for name, value in tensors.items() if name != position}
    for content in ({**tensors, "pos_emb": tensors[position]}, {**without, "pos_emb": tensors[position]}):
        copy.save(content, "new-tower")
        (copy.path / "new-tower").replace(copy.path / file)
        assert torch.equal(open_checkpoint(copy.path).tensor("vision", "embeddings.position_embedding.weight"), wanted)
    copy.save({**tensors, "pos_emb": tensors[position] * 2}, "new-tower")
    (copy.path / "new-tower").replace(copy.path / file)
    with pytest.raises(CheckpointError, match=r"visual_encoder/pos_emb should be a copy of .* and differs"):
        open_checkpoint(copy.path)


def test_generation_settings(copied):
    copy = copied("av-qwen2")
    assert read(copy.path).generation.repetition_penalty == 1.0
    copy.edit_json(
        "generation_config.json", eos_token_id=[5, 0], repetition_penalty=1.05, top_k=20, temperature=0.7, top_p=0.8
    )
    generation = read(copy.path).generation
    # The tokenizer's eos (2) also ends the text; mm_infer sets temperature and top_p itself.
    assert generation.eos_token_ids == (5, 0, 2)
    assert (generation.repetition_penalty, generation.top_k) == (1.05, 20)
    assert (generation.temperature, generation.top_p, generation.max_new_tokens) == (0.2, 0.9, 2048)
    aurora = copied("auroracap")
    aurora.edit_json("generation_config.json", temperature=0.7, top_p=0.8)
    generation = read(aurora.path).generation
    assert (generation.eos_token_ids, generation.temperature, generation.top_p) == ((2,), 0.7, 0.8)


@pytest.mark.parametrize("name", ["clip-mistral", "av-qwen2", "auroracap"])
def test_the_longest_caption(name, copied):
    """As the families' own inference has it (mm_infer; AuroraCap's quick start), unless the checkpoint says."""
    copy = copied(name)
    assert read(copy.path).generation.max_new_tokens == 2048
    copy.edit_json("generation_config.json", max_new_tokens=300)
    assert read(copy.path).generation.max_new_tokens == 300
    for value in (0, -1, 10**30, "many", True):
        copy.edit_json("generation_config.json", max_new_tokens=value)
        with pytest.raises(CheckpointError, match="max_new_tokens must be a whole number"):
            read(copy.path)


LINES = """
{%- for message in messages %}
    {% if message.role == 'user' %}
  {{ bos_token }}[{{ message['content'] }}]
    {% else %}
  ({{ message.content | tojson }})
    {% endif %}
    {% if loop.last %}{% break %}{% endif %}
{% endfor %}
{# a remark #}
{% if add_generation_prompt %}
>{{ eos_token }}
{% endif %}
"""


@pytest.mark.parametrize("fixture", ["clip-mistral", "av-qwen2"])
@pytest.mark.parametrize("template", [None, LINES])
def test_prompt_is_what_transformers_renders(fixture, template, copied):
    transformers = pytest.importorskip("transformers")
    from intertitle.models.videollama2.prompt import SYSTEM

    copy = copied(fixture)
    if template is not None:
        # Whitespace control and whatever else transformers switches on in its templates.
        copy.edit_json("tokenizer_config.json", chat_template=template, bos_token="<|im_start|>")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(copy.path)
    before, after = around(read(copy.path).prompts["video"])
    messages = [{"role": "system", "content": SYSTEM}] if fixture == "clip-mistral" else []
    messages.append({"role": "user", "content": "<video>\nWho {is} there?"})
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert before + "<video>" + after.replace("{instruction}", "Who {is} there?") == wanted


def test_chat_template_from_its_own_file_and_from_a_list(copied, opened):
    copy = copied("av-qwen2")
    template = "{%- for m in messages -%}\n[{{ m.content }}]{{ eos_token }}\n{%- endfor %}"
    copy.edit_json(
        "tokenizer_config.json",
        chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": template}],
    )
    prompt = read(copy.path).prompts["audio"]
    assert prompt.pieces == (Text("["), Tokens("audio"), Text("\n{instruction}]<|im_end|>"))
    (copy.path / "chat_template.jinja").write_text("U: {{ messages[-1].content }} A:")
    assert around(read(copy.path).prompts["video"])[1] == "\n{instruction} A:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat_template"),
        ("{{ raise_exception('only user and assistant roles') }}", "only user and assistant roles"),
        ("{% for %}", "cannot be rendered"),
        ("{{ messages[5].content }}", "cannot be rendered"),
        ("nothing of the user", "does not keep the user's turn"),
        ("{{ messages[-1].content }}{{ messages[-1].content }}", "does not keep the user's turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
    ],
)
def test_chat_templates_that_cannot_be_used_are_refused(template, message, copied):
    copy = copied("clip-mistral")
    copy.edit_json("tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ messages[-1].content }}{{ 'a' * 70000 }}",
    ],
)
def test_chat_templates_without_end_are_stopped(template, copied, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 1)
    copy = copied("clip-mistral")
    copy.edit_json("tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match=r"takes (more than|too much)|gives \d+ characters"):
        open_checkpoint(copy.path)


def test_a_chat_template_cannot_load_code_beside_it(copied, monkeypatch):
    """A checkpoint may be the current folder."""
    copy = copied("clip-mistral")
    (copy.path / "jinja2.py").write_text("raise SystemExit('ran')")
    (copy.path / "json.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(copy.path)
    bounded._answer.cache_clear()
    assert "[INST]" in around(open_checkpoint(copy.path).config.prompts["video"])[0]


def test_absurd_statistics_are_refused(opened):
    clip = opened("clip-mistral").config.part("vision").config
    for key in ("image_mean", "image_std"):
        for value in (float("nan"), float("inf"), 10**400, True, None, [1]):
            with pytest.raises(CheckpointError, match=key):
                read_image_processing({"size": 56, "crop_size": 56, key: [0.5, value, 0.5]}, "p", clip)
    with pytest.raises(CheckpointError, match="image_std must be above 0"):
        read_image_processing({"size": 56, "crop_size": 56, "image_std": [0.5, -0.5, 0.5]}, "p", clip)


def test_image_processor_files(opened):
    clip = opened("clip-mistral").config.part("vision").config
    values = {"size": 56, "crop_size": 56, "resample": 3}
    assert read_image_processing(values, "p", clip) == ImagePlan("shortest_edge", 56, 56, *CLIP_STATISTICS)
    values = {
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
    }
    assert read_image_processing(values, "p", clip) == ImagePlan("shortest_edge", 64, 56, (0, 0, 0), (1, 1, 1))
    for changes, message in [
        ({"resample": 2}, "resample 2"),
        ({"size": 40, "crop_size": 40}, "56 x 56"),
        ({"do_center_crop": False, "size": {"height": 56, "width": 64}}, "not square"),
        ({"image_std": [0.0, 1, 1]}, "image_std must be above 0"),
        ({"image_mean": "x"}, "image_mean"),
        ({"do_normalize": False}, "do_normalize"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_image_processing({"size": 56, "crop_size": 56, **changes}, "p", clip)


def test_vision_config_of_a_whole_clip_and_of_another_tower():
    nested = {"model_type": "clip", "vision_config": {"hidden_size": 96, "num_attention_heads": 4, "patch_size": None}}
    config = read_vision(Fields(nested, "c"))
    assert (config.hidden_size, config.num_layers, config.patch_size, config.image_size) == (96, 12, 32, 224)
    for values, message in [
        ({"model_type": "dinov2"}, "neither CLIP nor SigLIP"),
        ({"model_type": "clip", "hidden_act": "relu"}, "'relu'"),
        ({"model_type": "clip", "num_channels": 4}, "num_channels"),
        ({"model_type": "clip", "num_attention_heads": 7}, "7 heads"),
        ({"model_type": "clip", "image_size": 16}, "smaller than one patch"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_vision(Fields(values, "c"))


def test_released_size_is_accepted_from_its_headers(copied):
    """Names and shapes of VideoLLaMA2.1-7B-AV, written down from docs/facts.md for the benchmark's random
    checkpoint."""
    from intertitle.models.random_checkpoint import SIZES

    copy = copied("av-qwen2")
    decoder = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "num_frames": 16}
    tower = "google/siglip-so400m-patch14-384"
    copy.edit_json("config.json", "beats_config", **decoder, **heads, mm_vision_tower=tower, mm_hidden_size=1152)
    table = "relative_attention_bias"
    tensors, kept = SIZES["7b"].layout().shards[""], "layers.0.self_attn.relative_attention_bias.weight"
    headers = {
        tensor.name: TensorInfo(tuple(tensor.shape), torch.bfloat16, copy.path / "nowhere", tensor.name)
        for tensor in tensors
        if table not in tensor.name or kept in tensor.name
    }
    checkpoint = Checkpoint(copy.path, json.loads((copy.path / "config.json").read_text()), headers)
    opened = CaptionerCheckpoint(checkpoint, FAMILIES["videollama2"].read_config(checkpoint))
    opened.validate()
    assert (opened.config.decoder.head_dim, opened.config.part("audio").config.projector_kind) == (128, "mlp2x_gelu")
    del headers["model.mm_projector.s1.b1.downsample.bn.bias"]
    with pytest.raises(CheckpointError, match=r"s1\.b1\.downsample\.bn\.bias is missing"):
        opened.validate()


JUNK = [None, 0, -1, 1.5, "x", "", [], {}, True, 10**30, 10**6, [1], {"a": 1}, float("nan"), float("inf"), 3]
DATA = Path(__file__).parents[1] / "data"
#: The settings of each fixture, those in its folders too.
FILES = {
    folder.name: [
        str(file.relative_to(folder)) for file in sorted(folder.rglob("*.json")) if file.name != "tokenizer.json"
    ]
    for folder in sorted(DATA.iterdir())
    if (folder / "config.json").exists() and [*folder.glob("model*.safetensors")]
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_junk_in_a_config_gets_past_as_another_error(data, data_dir, tmp_path_factory):
    """Any value under any key either does not matter or is refused in one line."""
    fixture = data.draw(st.sampled_from(sorted(FILES)))
    name = data.draw(st.sampled_from(FILES[fixture]))
    values = json.loads((data_dir / fixture / name).read_text())
    holder = values
    assume(isinstance(values, dict) and values)
    key = data.draw(st.sampled_from(sorted(values)))
    if isinstance(values[key], dict) and values[key] and data.draw(st.booleans()):
        holder, key = values[key], data.draw(st.sampled_from(sorted(values[key])))
    holder[key] = data.draw(st.sampled_from(JUNK))
    path = tmp_path_factory.mktemp("junk") / fixture
    shutil.copytree(data_dir / fixture, path, ignore=shutil.ignore_patterns("expected.npz"), copy_function=os.symlink)
    (path / name).unlink()
    (path / name).write_text(json.dumps(values))
    complaint = ""
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        complaint = str(error)
    shutil.rmtree(path)
    assert "\n" not in complaint
