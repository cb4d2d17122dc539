"""LLaVA-Video and LLaVA-NeXT-Video against the numbers of the original implementations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from intertitle.contract.pipeline import PIXELS, Ids, PromptLayout, Sampling, Text, Tokens
from intertitle.errors import CheckpointError
from intertitle.models import CaptionerCheckpoint, open_checkpoint
from intertitle.models.checkpoint import Checkpoint
from intertitle.models.config import ConnectorConfig
from intertitle.models.families import find_family
from intertitle.models.llava_video import prompt
from intertitle.models.pooling import Pool, PoolConfig
from intertitle.models.random_checkpoint import write_checkpoint
from intertitle.models.stages import measured, run_stages
from torch import Tensor

# The contract asks for 1e-4; what is met is 6e-7 at most.
TOLERANCE = 1e-5


def encoded(opened: CaptionerCheckpoint, pixels: np.ndarray) -> dict[str, Tensor]:
    return run_stages(opened.config.pipeline.stages, opened.load, {PIXELS: torch.from_numpy(pixels)})


def spliced(opened: CaptionerCheckpoint, ids: np.ndarray, place: int, tokens: Tensor) -> Tensor:
    """The embeddings of the recorded ids, the block's own id being ``place``."""
    (at,) = np.flatnonzero(ids == place)
    table = opened.embedding()
    return torch.cat((table[ids[:at]], tokens, table[ids[at + 1 :]]))


class Greedy:
    """Greedy decoding by the reference decoder."""

    def __init__(self, opened: CaptionerCheckpoint) -> None:
        self.opened, self.decoder, self.table = opened, opened.load("decoder"), opened.embedding()

    def _step(self, embeds: Tensor, cache: list, length: int) -> tuple[Tensor, list]:
        last = torch.tensor([length - 1], dtype=torch.int32)
        asked = torch.tensor([[embeds.shape[0] - 1]])
        logits, cache = self.decoder(embeds[None], last, torch.tensor(length, dtype=torch.int32), asked, cache)
        return logits[0, 0], cache

    def logits(self, embeds: Tensor) -> Tensor:
        return self._step(embeds, self.decoder.empty_cache(1, len(embeds)), len(embeds))[0]

    def tokens(self, embeds: Tensor, count: int, penalty: float) -> list[int]:
        length, found = len(embeds), list[int]()
        logits, cache = self._step(embeds, self.decoder.empty_cache(1, length + count), length)
        while len(found) < count:
            seen = torch.tensor(sorted(set(found)), dtype=torch.long)
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
            found.append(int(logits.argmax()))
            if found[-1] in self.opened.config.generation.eos_token_ids:
                break
            length += 1
            logits, cache = self._step(self.table[found[-1]][None], cache, length)
        return found


def test_llava_video_stage_by_stage(opened, expected, relative_error):
    checkpoint, numbers = opened("llava-video"), expected("llava-video")
    values = encoded(checkpoint, numbers["pixel_values"])
    assert relative_error(values["vision"], numbers["vision_features"]) < TOLERANCE
    connector = checkpoint.load("connector")
    projected = connector.mlp(values["vision"])
    assert relative_error(projected, numbers["projected_features"]) < TOLERANCE
    assert relative_error(connector.pool(projected).flatten(1, 2), numbers["pooled_features"]) < TOLERANCE
    assert relative_error(values["connector"].flatten(0, 1), numbers["visual_tokens"]) < TOLERANCE
    assert [stage.tokens for stage in measured(checkpoint.config).stages] == [49, 4 * 5]


def test_llava_video_with_average_pooling(copied, expected, relative_error):
    copy, numbers = copied("llava-video"), expected("llava-video")
    copy.edit_json("config.json", mm_spatial_pool_mode="average")
    checkpoint = open_checkpoint(copy.path)
    connector, features = checkpoint.load("connector"), torch.from_numpy(numbers["vision_features"])
    pooled = connector.pool(connector.mlp(features)).flatten(1, 2)
    assert relative_error(pooled, numbers["average.pooled_features"]) < TOLERANCE
    tokens = connector(features).flatten(0, 1)
    assert relative_error(tokens, numbers["average.visual_tokens"]) < TOLERANCE
    greedy, embeds = Greedy(checkpoint), spliced(checkpoint, numbers["prompt_ids"], -200, tokens)
    assert relative_error(greedy.logits(embeds), numbers["average.last_logits"]) < TOLERANCE
    assert greedy.tokens(embeds, 24, 1.0) == numbers["average.greedy_tokens"].tolist()


def test_llava_video_decodes(opened, expected, relative_error):
    checkpoint, numbers = opened("llava-video"), expected("llava-video")
    tokens = encoded(checkpoint, numbers["pixel_values"])["connector"].flatten(0, 1)
    greedy = Greedy(checkpoint)
    embeds = spliced(checkpoint, numbers["prompt_ids"], -200, tokens)
    assert relative_error(embeds, numbers["video.inputs_embeds"]) < TOLERANCE
    assert relative_error(greedy.logits(embeds), numbers["video.last_logits"]) < TOLERANCE
    assert greedy.tokens(embeds, 32, 1.0) == numbers["video.greedy_tokens"].tolist()
    generation = checkpoint.config.generation
    assert generation.repetition_penalty == 1.05
    assert generation.eos_token_ids == (438, 436)
    assert greedy.tokens(embeds, 32, generation.repetition_penalty) == numbers["video.generate_tokens"].tolist()
    for form in ("demo", "untimed"):
        embeds = spliced(checkpoint, numbers[f"{form}.prompt_ids"], -200, tokens)
        assert relative_error(greedy.logits(embeds), numbers[f"{form}.last_logits"]) < TOLERANCE
        assert greedy.tokens(embeds, 24, 1.0) == numbers[f"{form}.greedy_tokens"].tolist()


def test_llava_next_video(opened, expected, relative_error):
    checkpoint, numbers = opened("llava-next-video"), expected("llava-next-video")
    values = encoded(checkpoint, numbers["pixel_values"])
    assert relative_error(values["vision"], numbers["vision_features"]) < TOLERANCE
    pooled = checkpoint.load("connector").pool(values["vision"]).flatten(1, 2)
    assert relative_error(pooled, numbers["pooled_features"]) < TOLERANCE
    tokens = values["connector"].flatten(0, 1)
    assert relative_error(tokens, numbers["video_tokens"]) < TOLERANCE
    embeds = spliced(checkpoint, numbers["prompt_ids"], 320, tokens)
    assert relative_error(embeds, numbers["video.inputs_embeds"]) < TOLERANCE
    greedy = Greedy(checkpoint)
    assert relative_error(greedy.logits(embeds), numbers["video.last_logits"]) < TOLERANCE
    assert greedy.tokens(embeds, 40, 1.0) == numbers["video.greedy_tokens"].tolist()
    assert checkpoint.config.generation.repetition_penalty == 1.0
    assert [stage.tokens for stage in measured(checkpoint.config).stages] == [36, 9]


@pytest.mark.parametrize("grid", [2, 6, 7, 24, 27])
def test_pooling_is_pytorch_s(grid, relative_error):
    random = torch.Generator().manual_seed(grid)
    x = torch.randn(2, grid * grid, 5, generator=random)
    image = x.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    half = -(-grid // 2)
    wanted = {
        "average": F.avg_pool2d(image, 2),
        "max": F.max_pool2d(image, 2),
        "bilinear": F.interpolate(image, (half, half), mode="bilinear", align_corners=False, antialias=False),
    }
    for mode, value in wanted.items():
        config = PoolConfig(ConnectorConfig("linear", 5, 5, grid), mode)  # type: ignore[arg-type]
        assert relative_error(Pool(config)(x), value.permute(0, 2, 3, 1)) < TOLERANCE


# --- where the learned vector stands


@pytest.mark.parametrize(
    ("place", "merge", "rows"),
    [
        ("grid", "spatial_unpad", 4 * 5),
        ("frame", "spatial_unpad", 4 * 4 + 1),
        ("one_token", "spatial_unpad", 4 * 4),
        ("no_token", "spatial_unpad", 4 * 4),
        ("one_token", "spatial", 4 * 4),
        ("grid", "flat", 4 * 4),
        (None, "spatial_unpad", 4 * 4),
    ],
)
def test_newline_of_each_place(place, merge, rows, copied, expected):
    copy, numbers = copied("llava-video"), expected("llava-video")
    copy.edit_json("config.json", mm_newline_position=place, mm_patch_merge_type=merge)
    checkpoint = open_checkpoint(copy.path)
    tokens = checkpoint.load("connector")(torch.from_numpy(numbers["vision_features"]))
    assert tokens.shape == (6, rows, 96)
    newline = checkpoint.checkpoint.tensor("model.image_newline")
    pooled = torch.from_numpy(numbers["pooled_features"])
    table, kept = checkpoint.embedding(), int(numbers["vocab_kept"])
    pieces = checkpoint.config.prompts["video"].pieces
    if rows == 17:
        assert torch.equal(tokens[:, -1], newline.expand(6, -1))
        tokens = tokens[:, :-1]
    if rows == 20:
        assert torch.equal(tokens[:, 4::5], newline.expand(6, 4, -1))
        tokens = tokens.unflatten(1, (4, 5))[:, :, :-1].flatten(1, 2)
    np.testing.assert_allclose(tokens, pooled, atol=1e-5)
    # Behind the whole clip it is a row of the table, and no token that could be chosen.
    behind = merge == "spatial_unpad" and place in ("one_token", None)
    assert (Ids((kept,)) in pieces) == behind
    assert len(table) == kept + behind
    assert checkpoint.config.decoder.vocab_size == kept
    if behind:
        assert torch.equal(table[kept], newline)
        assert pieces.index(Ids((kept,))) == pieces.index(Tokens("connector")) + 1


def test_vocabulary_is_cut_to_the_tokenizer(copied, opened, expected):
    checkpoint, kept = opened("llava-video"), int(expected("llava-video")["vocab_kept"])
    assert kept < checkpoint.checkpoint.config["vocab_size"]
    assert checkpoint.config.decoder.vocab_size == len(checkpoint.embedding()) == kept
    assert len(checkpoint.tensor("decoder", "lm_head.weight")) == kept
    copy = copied("llava-video")
    # The slow tokenizer's files alone, and the fast one's alone.
    for missing in ("tokenizer.json", "vocab.json"):
        text = (copy.path / missing).read_text()
        (copy.path / missing).unlink()
        assert open_checkpoint(copy.path).config.decoder.vocab_size == kept
        (copy.path / missing).write_text(text)
    # Where the key is absent, the original adds one more token.
    copy.edit_json("config.json", "mm_use_im_patch_token")
    assert open_checkpoint(copy.path).config.decoder.vocab_size == kept + 1
    copy.edit_json("config.json", vocab_size=kept)
    with pytest.raises(CheckpointError, match=f"{kept + 1} tokens, but the embedding table has {kept} rows"):
        open_checkpoint(copy.path)


@pytest.mark.parametrize(("name", "place"), [("llava-video", "one_token"), ("llava-next-video", "grid")])
def test_weights_go_back_under_the_released_names(name, place, copied):
    copy = copied(name)
    copy.edit_json("config.json", mm_newline_position=place)
    checkpoint = open_checkpoint(copy.path)
    before = copy.tensors()
    for component in (*checkpoint.components, "embedding"):
        state = (
            {"weight": checkpoint.embedding()} if component == "embedding" else checkpoint.load(component).state_dict()
        )
        written = checkpoint.to_checkpoint(component, state)
        for tensor, value in written.items():
            kept = len(value) if value.ndim < 2 or name != "llava-video" else checkpoint.config.decoder.vocab_size
            assert value.shape == before[tensor].shape
            assert torch.equal(value[:kept], before[tensor][:kept])


# --- configuration and prompt


def test_llava_video_prompt_is_the_reference_text(opened, expected):
    checkpoint, numbers = opened("llava-video"), expected("llava-video")
    assert checkpoint.config.default_instruction == "Please describe this video in detail."
    values = {
        "instruction": checkpoint.config.default_instruction,
        "seconds": f"{numbers['video_time']:.2f}",
        "count": len(numbers["frame_index"]),
        "times": str(numbers["frame_time"]),
    }

    def text(pieces) -> str:
        return "".join(piece.text.format_map(values) if isinstance(piece, Text) else "<image>" for piece in pieces)

    layout = checkpoint.config.prompts["video"]
    assert str(numbers["prompt_form"]) == "card"
    assert text(layout.pieces) == str(numbers["prompt"])
    assert text(layout.untimed) == str(numbers["untimed.prompt"])
    demo = prompt.layouts(timed=True, newline=None, form="demo")["video"]
    assert text(demo.pieces) == str(numbers["demo.prompt"])
    assert text(prompt.layouts(timed=False, newline=None)["video"].pieces) == str(numbers["untimed.prompt"])


def test_llava_next_video_prompt_is_the_reference_text(opened, expected):
    layout = opened("llava-next-video").config.prompts["video"]
    question = Text("\n{instruction} ASSISTANT:", behind="<video>")
    assert layout == PromptLayout((Ids((1,)), Text("USER: "), Tokens("connector"), question))
    before, after = layout.pieces[1].text, layout.pieces[3].text.format(instruction="Describe the video in detail.")
    assert f"{before}<video>{after}" == str(expected("llava-next-video")["prompt"])


def test_llava_video_config(copied, opened):
    config = opened("llava-video").config
    assert config.sampling == Sampling(rule="rate", count=64, fps=1.0, forced=True)
    assert config.part("vision").config.num_used_layers == 3
    assert (config.image.resize, config.image.size) == ("exact", 98)
    copy = copied("llava-video")
    copy.edit_json("config.json", mm_vision_select_layer=-1, mm_spatial_pool_stride=4, rope_scaling={"type": "yarn"})
    assert open_checkpoint(copy.path).config == config
    copy.edit_json("config.json", "add_time_instruction", force_sample=False, tokenizer_model_max_length=1000)
    config = open_checkpoint(copy.path).config
    assert config.sampling.forced is False
    assert config.prompts["video"].untimed == ()
    assert config.decoder.context_length == 1000


def test_llava_video_with_the_released_tower_s_name(copied):
    copy = copied("llava-video")
    copy.edit_json("config.json", mm_vision_tower="google/siglip-so400m-patch14-384")
    with pytest.raises(CheckpointError, match=r"is \[.*48.*\], but the config asks for \[.*1152"):
        open_checkpoint(copy.path)


def test_released_sizes_give_the_tokens_of_the_facts(copied):
    """docs/facts.md 8.2 and 9.2: 210 and 144 tokens a frame; the vocabulary of Qwen2 is cut to its 151,646 tokens."""
    video, following = copied("llava-video"), copied("llava-next-video")
    qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    video.edit_json("config.json", **qwen, **heads, mm_vision_tower="google/siglip-so400m-patch14-384")
    (video.path / "vocab.json").write_text(json.dumps({str(token): token for token in range(151643)}))
    (video.path / "tokenizer.json").unlink()
    text = {"model_type": "llama", "vocab_size": 32064, "rope_scaling": {"type": "linear", "factor": 2.5}}
    following.edit_json("config.json", "vision_config", text_config={**text, "max_position_embeddings": 4096})
    (following.path / "preprocessor_config.json").unlink()
    for copy, kept, tokens in ((video, 151646, [729, 210]), (following, 32064, [576, 144])):
        checkpoint = Checkpoint.open(copy.path)
        config = find_family(checkpoint).read_config(checkpoint)
        assert config.decoder.vocab_size == kept
        assert [stage.tokens for stage in measured(config).stages] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_faster_video": True}, "add_faster_video"),
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode 'conv'"),
        ({"mm_spatial_pool_mode": None}, "mm_spatial_pool_mode is missing"),
        ({"mm_newline_position": "word"}, "mm_newline_position 'word'"),
        ({"mm_patch_merge_type": "maxpool"}, "mm_patch_merge_type 'maxpool'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "CLIP tower"),
        ({"mm_vision_tower": None}, "mm_vision_tower is missing"),
    ],
)
def test_llava_video_refuses_by_name(changes, message, copied):
    copy = copied("llava-video")
    copy.edit_json("config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy.path)
    assert "\n" not in str(caught.value)


def test_llava_next_video_config(copied, opened, data_dir):
    config = opened("llava-next-video").config
    assert config.sampling == Sampling(rule="strided", count=8)
    decoder = config.decoder
    assert (decoder.rope_factor, decoder.context_length, decoder.rms_norm_eps) == (2.5, 10240, 1e-5)
    tower = config.part("vision").config
    assert (tower.layer_norm_eps, tower.hidden_act, tower.num_used_layers) == (1e-5, "quick_gelu", 2)
    # transformers 5 writes the scaling under another key.
    copy = copied("llava-next-video")
    text = json.loads((data_dir / "llava-next-video/config.json").read_text())["text_config"]
    scaled = {key: value for key, value in text.items() if key != "rope_scaling"}
    scaled["rope_parameters"] = {**text["rope_scaling"], "rope_type": "linear", "rope_theta": 10000.0}
    copy.edit_json("config.json", text_config=scaled)
    assert open_checkpoint(copy.path).config == config


def test_llava_next_video_leaves_the_released_sizes_to_the_classes(copied, data_dir):
    """The released text_config has no sizes: they are LlamaConfig's own (docs/facts.md 9.1)."""
    copy = copied("llava-next-video")
    text = json.loads((data_dir / "llava-next-video/config.json").read_text())["text_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    (copy.path / "preprocessor_config.json").unlink()
    copy.edit_json("config.json", "vision_config", text_config={k: v for k, v in text.items() if k not in sizes})
    checkpoint = Checkpoint.open(copy.path)
    config = find_family(checkpoint).read_config(checkpoint)
    decoder, tower = config.decoder, config.part("vision").config
    assert (decoder.hidden_size, decoder.intermediate_size, decoder.num_layers) == (4096, 11008, 32)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.vocab_size) == (32, 32, 336)
    assert (tower.hidden_size, tower.num_layers, tower.image_size, tower.num_patches) == (1024, 24, 336, 576)
    assert config.image.output_size == 336


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_pool_mode": "conv"}, "spatial_pool_mode 'conv'"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer must be one layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ({"projector_hidden_act": "relu"}, "projector"),
        ({"spatial_pool_stride": 7}, "spatial_pool_stride"),
        ({"text_config": {"model_type": "mistral"}}, "model_type 'mistral'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "only a CLIP tower"),
    ],
)
def test_llava_next_video_refuses_by_name(changes, message, copied):
    copy = copied("llava-next-video")
    copy.edit_json("config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llava-video", "llava-next-video"])
def test_random_checkpoints_have_the_fixture_s_tensors(name, opened, tmp_path):
    path = write_checkpoint(tmp_path / name, f"{name}-tiny")
    assert set(Checkpoint.open(path).tensors) == set(opened(name).checkpoint.tensors)
    checkpoint = open_checkpoint(path)
    config, size = checkpoint.config, checkpoint.config.image.output_size
    tokens = encoded(checkpoint, np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32))["connector"]
    assert 0.1 < tokens.std() < 10
    own = json.loads((path / "config.json").read_text())
    rows = own.get("vocab_size") or own["text_config"]["vocab_size"]
    assert (config.decoder.vocab_size < rows) == (name == "llava-video")
