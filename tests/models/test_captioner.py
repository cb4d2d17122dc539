"""Every component of every fixture against the numbers of the original implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from intertitle.contract.pipeline import EachOf, Ids, Text, Tokens
from intertitle.errors import CheckpointError, OptionError
from intertitle.models import CaptionerCheckpoint, open_checkpoint
from intertitle.models.stages import run_stages
from tokenizers import Tokenizer
from torch import Tensor

# The contract asks for 1e-4; what is met is 1.3e-6 at most, so a slip such as a norm's epsilon shows.
TOLERANCE = 1e-5

#: The components of a VideoLLaMA2 captioner without an audio tower.
SEEING = ("vision", "frame_connector", "connector", "decoder")


#: Places of tokens in the reference's prompt ids (VideoLLaMA2 ``constants.py``; xtuner ``constants.py``).
SENTINELS = {("videollama2", "connector"): -201, ("videollama2", "audio"): -202, ("auroracap", "connector"): -200}


def splice(opened: CaptionerCheckpoint, mode: str, blocks: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    """The reference's prompt ids and input embeddings of the default instruction, from the prompt's layout.

    ``blocks``: what the stages give, ``[units, n, H]``.
    """
    config, table = opened.config, opened.embedding().float()
    tokenizer = Tokenizer.from_file(str(opened.path / "tokenizer.json"))
    ids: list[int] = []
    pieces: list[Tensor] = []

    def say(found: list[int]) -> None:
        ids.extend(found)
        pieces.append(table[found])

    def show(stage: str, block: Tensor) -> None:
        ids.append(SENTINELS[config.family, stage])
        pieces.append(block)

    for piece in config.prompts[mode].pieces:
        if isinstance(piece, Text):
            text = piece.text.replace("{instruction}", config.default_instruction)
            say(tokenizer.encode(text, add_special_tokens=False).ids)
        elif isinstance(piece, Ids):
            say(list(piece.ids))
        elif isinstance(piece, Tokens):
            show(piece.stage, blocks[piece.stage].flatten(0, 1))
        else:
            for number, block in enumerate(blocks[piece.stage]):
                say(tokenizer.encode(piece.separator, add_special_tokens=False).ids if number else [])
                show(piece.stage, block)
    return ids, torch.cat(pieces)


def run(opened: CaptionerCheckpoint, name: str, **values: Tensor) -> dict[str, Tensor]:
    """What the stages up to ``name`` give from ``values``, those that ``values`` holds aside."""
    stages = [stage for stage in opened.config.pipeline.needed(name) if stage.name not in values]
    return run_stages(stages, opened.load, values)


def last_logits(opened: CaptionerCheckpoint, embeds: Tensor) -> Tensor:
    decoder, length = opened.load("decoder"), len(embeds)
    past = decoder.empty_cache(1, length)
    at = torch.tensor([length - 1])
    return decoder(embeds[None], at.int(), torch.tensor(length).int(), at[None], past)[0][0, 0]


@pytest.mark.parametrize("name", ["clip-mistral", "clip-mixtral", "siglip-phi3", "av-qwen2"])
def test_videollama2_video(name, opened, expected, relative_error):
    checkpoint, numbers = opened(name), expected(name)
    found = run(checkpoint, "connector", pixels=torch.from_numpy(numbers["pixel_values"]))
    assert relative_error(found["vision"], numbers["vision_features"]) < TOLERANCE
    assert relative_error(found["connector"].flatten(0, 1), numbers["video_tokens"]) < TOLERANCE
    ids, embeds = splice(checkpoint, "video", found)
    assert ids == numbers["prompt_ids"].tolist()
    assert relative_error(embeds, numbers["video.inputs_embeds"]) < TOLERANCE
    assert relative_error(last_logits(checkpoint, embeds), numbers["video.last_logits"]) < TOLERANCE


def test_videollama2_audio(opened, expected, relative_error):
    checkpoint, numbers = opened("av-qwen2"), expected("av-qwen2")
    branch = checkpoint.load("audio")
    fbank = torch.from_numpy(numbers["fbank_video_policy"])[None]
    features, tokens = branch.features(fbank), branch(fbank)
    assert relative_error(features[0], numbers["audio_features"]) < TOLERANCE
    assert relative_error(tokens[0], numbers["audio_tokens"]) < TOLERANCE
    assert torch.equal(run(checkpoint, "audio", sound=fbank)["audio"], tokens)
    blocks = {"connector": torch.from_numpy(numbers["video_tokens"])[None], "audio": tokens}
    _, embeds = splice(checkpoint, "audiovideo", blocks)
    assert relative_error(embeds, numbers["audiovideo.inputs_embeds"]) < TOLERANCE
    assert relative_error(last_logits(checkpoint, embeds), numbers["audiovideo.last_logits"]) < TOLERANCE
    ids, _ = splice(checkpoint, "audio", blocks)
    assert ids == numbers["audio.prompt_ids"].tolist()


def test_videollama2_audio_alone_follows_the_other_clip_policy(opened, expected, relative_error):
    checkpoint, numbers = opened("av-qwen2"), expected("av-qwen2")
    found = run(checkpoint, "audio", sound=torch.from_numpy(numbers["fbank_audio_policy"])[None])
    _, embeds = splice(checkpoint, "audio", found)
    assert relative_error(embeds, numbers["audio.inputs_embeds"]) < TOLERANCE


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_auroracap(keep, opened, expected, relative_error):
    checkpoint, numbers = opened("auroracap", keep=keep), expected("auroracap")
    found = run(checkpoint, "connector", pixels=torch.from_numpy(numbers["pixel_values"]))
    assert relative_error(found["vision"], numbers[f"vision_features.keep{keep}"]) < TOLERANCE
    tokens = found["connector"]
    assert relative_error(tokens, numbers[f"visual_tokens.keep{keep}"]) < TOLERANCE
    if keep == numbers["token_kept_ratio"]:
        ids, embeds = splice(checkpoint, "video", found)
        assert ids == numbers["prompt_ids"].tolist()
        assert relative_error(embeds, numbers["inputs_embeds"]) < TOLERANCE
        assert relative_error(last_logits(checkpoint, embeds), numbers["last_logits"]) < TOLERANCE
        # The contrasted stream of contrastive decoding: the same prompt over fewer frames.
        _, sparse = splice(checkpoint, "video", {"connector": tokens[numbers["sparse_frame_index"]]})
        assert relative_error(last_logits(checkpoint, sparse), numbers["sparse.last_logits"]) < TOLERANCE


def test_adapter_changes_connector_and_decoder(opened, expected, relative_error):
    checkpoint, numbers = opened("clip-mistral", adapter="clip-mistral-lora"), expected("clip-mistral-lora")
    features = torch.from_numpy(expected("clip-mistral")["vision_features"])
    _, embeds = splice(checkpoint, "video", run(checkpoint, "connector", vision=features))
    assert relative_error(embeds, numbers["video.inputs_embeds"]) < TOLERANCE
    assert relative_error(last_logits(checkpoint, embeds), numbers["video.last_logits"]) < TOLERANCE
    # And it matters: without the adapter both are elsewhere.
    assert relative_error(numbers["video.last_logits"], expected("clip-mistral")["video.last_logits"]) > 0.05


@pytest.mark.parametrize("name", ["clip-mistral", "clip-mixtral", "siglip-phi3", "av-qwen2", "auroracap"])
def test_prompt_is_the_reference_text(name, opened, expected):
    config, tag = opened(name).config, {"auroracap": "<image>"}.get(name, "<video>")
    text = ""
    for piece in config.prompts["video"].pieces:
        if isinstance(piece, Text):
            text += piece.text.replace("{instruction}", config.default_instruction)
        elif isinstance(piece, EachOf):
            text += piece.separator.join([tag] * config.sampling.count)
        elif isinstance(piece, Tokens):
            text += tag
    assert text == str(expected(name)["prompt"])


@pytest.mark.parametrize("name", ["clip-mistral", "clip-mixtral", "siglip-phi3", "av-qwen2", "auroracap"])
def test_components_on_meta_and_on_disk_agree(name, opened):
    checkpoint = opened(name)
    wanted = {
        **dict.fromkeys(("clip-mistral", "clip-mixtral", "siglip-phi3"), SEEING),
        "av-qwen2": ("vision", "frame_connector", "connector", "audio", "decoder"),
        "auroracap": ("vision", "connector", "decoder"),
    }
    assert checkpoint.components == wanted[name]
    for component in checkpoint.components:
        module, loaded = checkpoint.module(component), checkpoint.load(component)
        assert not module.training
        assert not any(p.requires_grad for p in [*module.parameters(), *loaded.parameters()])
        assert all(p.device.type == "meta" for p in module.parameters())
        for entry, value in module.state_dict().items():
            tensor = checkpoint.tensor(component, entry)
            assert tensor.shape == value.shape
            assert torch.equal(tensor.float(), loaded.state_dict()[entry])
    assert checkpoint.embedding().shape == (checkpoint.config.decoder.vocab_size, checkpoint.config.decoder.hidden_size)


def test_dtype_of_the_file_is_kept_unless_folded_or_merged(copied, data_dir):
    copy = copied("av-qwen2")
    copy.save({name: value.bfloat16() for name, value in copy.tensors().items()})
    checkpoint = open_checkpoint(copy.path)
    assert checkpoint.embedding().dtype == torch.bfloat16
    assert checkpoint.tensor("decoder", "layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    assert checkpoint.tensor("frame_connector", "s1.b1.conv1.conv.weight").dtype == torch.bfloat16
    assert checkpoint.tensor("audio", "tower.encoder.pos_conv.weight").dtype == torch.float32
    assert next(checkpoint.load("vision").parameters()).dtype == torch.float32


def test_weight_norm_is_folded_in_float32(opened):
    checkpoint = opened("av-qwen2")
    gain = checkpoint.checkpoint.tensor("model.audio_tower.encoder.pos_conv.0.weight_g").numpy().astype(np.float64)
    direction = checkpoint.checkpoint.tensor("model.audio_tower.encoder.pos_conv.0.weight_v").numpy().astype(np.float64)
    wanted = gain * direction / np.sqrt((direction**2).sum((0, 1), keepdims=True) + 1e-6)
    np.testing.assert_allclose(checkpoint.tensor("audio", "tower.encoder.pos_conv.weight").numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(bad, dtype, copied):
    copy, name = copied("clip-mistral"), "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.to(dtype) for key, value in copy.tensors().items()}
    tensors[name].view(-1)[12345] = bad
    copy.save(tensors)
    checkpoint = open_checkpoint(copy.path)
    checkpoint.tensor("decoder", "layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.tensor("decoder", "layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("fixture", ["clip-mistral", "av-qwen2", "auroracap"])
def test_every_used_tensor_is_missed_by_name(fixture, opened, copied):
    """Whichever tensor of a component is taken away, it is the one named."""
    copy = copied(fixture)
    tensors = copy.tensors()
    tower = "vision_tower.vision_model."
    unused = (f"{tower}encoder.layers.2.", f"{tower}post_layernorm.", f"{tower}head.", "predictor.")
    used = [name for name in tensors if not any(part in name for part in (*unused, "relative_attention_bias"))]
    for name in used[:: max(1, len(used) // 12)]:
        copy.save({key: value for key, value in tensors.items() if key != name})
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            open_checkpoint(copy.path)


def test_wrong_shape_extra_and_quantized_tensors_are_named(copied):
    copy = copied("clip-mistral")
    tensors = copy.tensors()
    position = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    copy.save({**tensors, position: tensors[position][:-1]})
    with pytest.raises(CheckpointError, match=r"position_embedding.weight is \[16, 64\].* \[17, 64\]"):
        open_checkpoint(copy.path)
    copy.save({**tensors, "model.layers.0.self_attn.q_proj.qweight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight is not part of a videollama2"):
        open_checkpoint(copy.path)
    copy.save({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not floating point"):
        open_checkpoint(copy.path)


def test_tensors_known_to_be_dead_are_accepted(copied, opened):
    copy = copied("clip-mistral")
    tower = "model.vision_tower.vision_tower.vision_model."
    copy.save(
        {
            **copy.tensors(),
            f"{tower}embeddings.position_ids": torch.arange(17)[None],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
        }
    )
    original = opened("clip-mistral")
    assert torch.equal(open_checkpoint(copy.path).embedding(), original.embedding())


def test_tied_head_is_the_embedding_table(copied):
    copy = copied("clip-mistral")
    tensors = copy.tensors()
    del tensors["lm_head.weight"]
    copy.save(tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        open_checkpoint(copy.path)
    copy.edit_json("config.json", tie_word_embeddings=True)
    checkpoint = open_checkpoint(copy.path)
    assert torch.equal(checkpoint.tensor("decoder", "lm_head.weight"), checkpoint.embedding())


def test_keep_is_for_token_merging_only(data_dir):
    assert open_checkpoint(data_dir / "clip-mistral", keep=1.0).config.part("vision").config.keep is None
    with pytest.raises(OptionError):
        open_checkpoint(data_dir / "clip-mistral", keep=0.5)
    for keep in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(OptionError):
            open_checkpoint(data_dir / "auroracap", keep=keep)


def test_fingerprint_follows_content_and_adapter(copied, data_dir):
    copy = copied("clip-mistral")
    base, adapted = open_checkpoint(copy.path), open_checkpoint(copy.path, adapter=data_dir / "clip-mistral-lora")
    assert base.fingerprint() == open_checkpoint(data_dir / "clip-mistral").fingerprint()
    assert adapted.fingerprint() != base.fingerprint()
    tensors = copy.tensors()
    tensors["model.norm.weight"][0] += 1
    before = base.fingerprint()
    copy.save(tensors)
    changed = open_checkpoint(copy.path).fingerprint()
    assert changed != before
    copy.edit_json("tokenizer_config.json", extra=1)
    assert open_checkpoint(copy.path).fingerprint() not in (before, changed)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"])
def test_fingerprint_follows_the_files_that_a_tokenizer_is_read_from(name, copied):
    """With a tokenizer.json they are not read."""
    copy = copied("clip-mistral")
    with_json = open_checkpoint(copy.path).fingerprint()
    (copy.path / name).write_text("{}")
    assert open_checkpoint(copy.path).fingerprint() == with_json
    (copy.path / "tokenizer.json").unlink()
    before = open_checkpoint(copy.path).fingerprint()
    (copy.path / name).write_text('{"a": 1}')
    assert open_checkpoint(copy.path).fingerprint() != before
