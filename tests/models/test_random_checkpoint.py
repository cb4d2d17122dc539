"""The random checkpoint against the fixture's layout, the shapes of docs/facts.md, transformers' modules and our own
reader."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from intertitle.errors import OptionError
from intertitle.export.tokenizer import collect_tokenizer
from intertitle.models import FAMILIES, CaptionerCheckpoint, open_checkpoint
from intertitle.models.auroracap import sizes as auroracap
from intertitle.models.checkpoint import Checkpoint
from intertitle.models.families import find_family
from intertitle.models.random_checkpoint import SIZES, write_checkpoint
from intertitle.models.random_layout import RandomTensor
from intertitle.models.stages import run_stages
from intertitle.models.tensor_files import TensorInfo
from intertitle.models.videollama2 import sizes as videollama2
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

TINY = videollama2.SIZES["tiny"]
TABLE = ".relative_attention_bias.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("random") / "tiny", "tiny")


def shard_tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def fixture_shapes(data_dir: Path) -> dict[str, list[int]]:
    with safe_open(data_dir / "av-qwen2" / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_names_and_shapes_are_the_fixtures(tiny: Path, data_dir: Path) -> None:
    wanted = fixture_shapes(data_dir)
    # The two sizes that are ours to choose: the vocabulary, and the classes of the unused predictor.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted[name][0] = 320
    for name in ("weight", "bias"):
        wanted[f"model.audio_tower.predictor.{name}"][0] = 527
    assert {name: list(tensor.shape) for name, tensor in shard_tensors(tiny).items()} == wanted


def test_the_pickles_hold_the_audio_branch_once_more(tiny: Path, data_dir: Path) -> None:
    shards = shard_tensors(tiny)
    names: set[str] = set()
    for file in ("audio_tower.bin", "mm_projector_a.bin"):
        state = torch.load(tiny / file, weights_only=True)
        names |= set(state)
        for name, tensor in state.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, shards[name]), name
    audio = {
        name for name in fixture_shapes(data_dir) if name.startswith(("model.audio_tower.", "model.mm_projector_a."))
    }
    tied = {name for name in audio if name.endswith(TABLE) and ".layers.0." not in name}
    assert names == audio - tied
    tables = [tensor for name, tensor in shards.items() if name.endswith(TABLE)]
    assert len(tables) == 2
    assert torch.equal(*tables)


def test_index_and_shards_agree(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = sorted(tiny.glob("model-*.safetensors"))
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    total = 0
    for file in files:
        tensors = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        total += (size := sum(2 * tensor.numel() for tensor in tensors.values()))
        assert size <= SIZES["tiny"].shard_bytes
    assert index["metadata"]["total_size"] == total


def test_a_seed_fixes_every_byte(tiny: Path, tmp_path: Path) -> None:
    again, other = write_checkpoint(tmp_path / "again", "tiny"), write_checkpoint(tmp_path / "other", "tiny", seed=1)
    files = sorted(file.relative_to(tiny) for file in tiny.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    for file in files:
        assert (tiny / file).read_bytes() == (again / file).read_bytes(), file
    first, second = shard_tensors(tiny), shard_tensors(other)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_spreads(tiny: Path) -> None:
    tensors = shard_tensors(tiny)
    for name, mean, std in (
        ("model.layers.1.mlp.up_proj.weight", 0, 0.1),
        ("model.mm_projector.readout.0.weight", 0, 1 / math.sqrt(128)),
        ("model.mm_projector.s1.b1.conv1.conv.weight", 0, 1 / math.sqrt(64)),
        ("model.mm_projector.s2.b3.conv2.conv.weight", 0, 1 / 3),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight", 1, 0.1),
        ("model.norm.weight", 1, 0.1),
    ):
        values = tensors[name].float()
        assert values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(values.numel())), name
        assert values.std() == pytest.approx(std, rel=0.3), name
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).float()
    assert torch.isfinite(flat).all()


def test_our_reader_takes_it_and_values_stay_sane(tiny: Path) -> None:
    captioner = open_checkpoint(tiny)
    assert captioner.components == ("vision", "frame_connector", "connector", "audio", "decoder")
    config = captioner.config
    assert (config.generation.repetition_penalty, config.generation.eos_token_ids) == (1.05, (319, 317))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 70, 70, generator=generator)
    found = run_stages(config.pipeline.needed("connector"), captioner.load, {"pixels": pixels})
    assert found["connector"].flatten(0, 1).shape == (16, 128)
    for name in ("vision", "frame_connector", "connector"):
        assert 0.1 < found[name].std() < 10


def test_without_the_audio_branch_in_the_shards(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "beside", replace(TINY, audio_in_shards=False))
    assert not any("audio_tower" in name or "projector_a" in name for name in shard_tensors(path))
    assert "audio" in open_checkpoint(path).components


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = write_checkpoint(tmp_path / "tiny", "tiny", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    written = sum(tensor.numel() for tensor in shard_tensors(path).values())
    written += sum(t.numel() for file in path.glob("*.bin") for t in torch.load(file, weights_only=True).values())
    assert seen[-1] == (2 * written, 2 * written)


def count(tensors: Sequence[RandomTensor], prefix: str) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor.name.startswith(prefix))


def test_the_real_size_has_the_released_shapes_and_counts() -> None:
    layout = SIZES["7b"].layout()
    tensors, pickles = layout.shards[""], layout.pickles
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    stage = "model.mm_projector.s1."
    # docs/facts.md 1.3 and 1.4.
    for name, shape in {
        f"{stage}b1.conv1.conv.weight": (3584, 1152, 1, 1),
        f"{stage}b1.se.fc1.weight": (288, 3584, 1, 1),
        f"{stage}b1.se.fc2.weight": (3584, 288, 1, 1),
        f"{stage}b3.se.fc1.weight": (896, 3584, 1, 1),
        f"{stage}b1.downsample.conv.weight": (3584, 1152, 1, 1),
        "model.mm_projector.s2.b1.se.fc1.bias": (896,),
        "model.mm_projector.sampler.0.weight": (3584, 3584, 2, 2, 2),
        "model.audio_tower.encoder.pos_conv.0.weight_v": (768, 48, 128),
        "model.audio_tower.encoder.layers.11.self_attn.grep_linear.weight": (8, 64),
        "model.audio_tower.predictor.weight": (527, 768),
        "model.mm_projector_a.0.weight": (3584, 768),
    }.items():
        assert shapes[name] == shape, name
    assert "model.mm_projector.s2.b1.downsample.conv.weight" not in shapes
    assert count(tensors, "model.mm_projector.") == 376_889_248
    beats = [tensor for tensor in tensors if tensor.name.startswith("model.audio_tower.")]
    assert len(beats) == 252
    assert sum(math.prod(tensor.shape) for tensor in pickles["audio_tower.bin"]) == pytest.approx(90.717e6, abs=500)
    assert 2 * count(pickles["mm_projector_a.bin"], "") == pytest.approx(31.2e6, rel=2e-3)


@pytest.mark.parametrize("size", ["7b", "0.5b"])
def test_decoder_and_vision_tower_are_those_of_transformers(size: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    own = videollama2.SIZES
    d, v = own[size].decoder, own[size].vision
    qwen = Qwen2Config(
        hidden_size=d.hidden_size,
        intermediate_size=d.intermediate_size,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads,
        num_key_value_heads=d.num_kv_heads,
        vocab_size=d.vocab_size,
        tie_word_embeddings=d.tie_embeddings,
    )
    siglip = SiglipVisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
    )
    with torch.device("meta"):
        decoder, tower = Qwen2ForCausalLM(qwen), SiglipVisionModel(siglip)
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.named_parameters()}
    # transformers 5 dropped the module between the model and its parts from the names.
    root = "model.vision_tower.vision_tower.vision_model."
    wanted |= {root + name.removeprefix("vision_model."): tuple(t.shape) for name, t in tower.named_parameters()}
    others = ("model.mm_projector", "model.audio_tower.")
    ours = {t.name: t.shape for t in own[size].layout().shards[""] if not t.name.startswith(others)}
    assert ours == wanted
    released = {"7b": 7_615_616_512, "0.5b": 494_032_768}  # Qwen2-7B and Qwen2-0.5B
    assert sum(math.prod(shape) for name, shape in ours.items() if not name.startswith(root)) == released[size]


def test_tokenizer(tiny: Path, data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == json.loads((tiny / "config.json").read_text())["vocab_size"]
    text = "<|im_start|>user\nDescribe the video: déjà vu, 日本 🎬.<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-1]) == (318, 319)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids[1:-1]) == text[12:-10]
    ours = json.loads((tiny / "tokenizer_config.json").read_text())
    theirs = json.loads((data_dir / "av-qwen2" / "tokenizer_config.json").read_text())
    assert ours["chat_template"] == theirs["chat_template"]


def test_tokenizer_of_the_real_size() -> None:
    files = SIZES["7b"].files(None)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    specials = json.loads(files["added_tokens.json"])
    assert specials == {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    assert tokenizer.get_vocab_size() == 151646
    assert tokenizer.encode("<|im_end|>a").ids == [151645, tokenizer.token_to_id("a")]
    assert len(tokenizer.encode("Describe the video in detail.").ids) < 12
    assert "beats_config" not in json.loads(files["config.json"])
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [151645, 151643]
    assert not any("/" in name for name in files)


# --- every family


@pytest.mark.parametrize("name", list(SIZES))
def test_the_family_reads_the_headers_of_each_of_its_sizes(name: str, tmp_path: Path) -> None:
    """Every size is a checkpoint that its family reads, with all tensors and no others."""
    family = next(family for family in FAMILIES if name in FAMILIES[family].sizes)
    size = SIZES[name]
    for file, content in size.files(None).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    layout, headers = size.layout(), {}
    for folder, tensors in layout.shards.items():
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        (tmp_path / folder).mkdir(exist_ok=True)
        # Of a table that all layers share the first is enough.
        headers |= {
            f"{folder}/{tensor.name}".removeprefix("/"): TensorInfo(
                tuple(tensor.shape), torch.bfloat16, tmp_path / "nowhere", tensor.name
            )
            for tensor in tensors
            if tensor.seeded_as == tensor.name
        }
    checkpoint = Checkpoint(tmp_path, json.loads((tmp_path / "config.json").read_text()), headers)
    assert find_family(checkpoint) is FAMILIES[family]
    opened = CaptionerCheckpoint(checkpoint, FAMILIES[family].read_config(checkpoint))
    opened.validate()
    assert max(collect_tokenizer(tmp_path).get_vocab().values()) < opened.config.decoder.vocab_size


@pytest.mark.parametrize("name", ["tiny", "videollama2-moe-tiny", "auroracap-tiny"])
def test_a_written_checkpoint_opens(name: str, tmp_path: Path) -> None:
    captioner = open_checkpoint(write_checkpoint(tmp_path / name, name))
    config, size = captioner.config, captioner.config.image.output_size
    pixels = torch.randn(config.sampling.count, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = run_stages(config.pipeline.needed("connector"), captioner.load, {"pixels": pixels})["connector"]
    assert found.shape[2] == config.decoder.hidden_size
    assert 0.1 < found.std() < 10


def test_parameters_of_the_other_released_sizes() -> None:
    """docs/facts.md 1.1 (7B-16F: Mistral 7.24 B, connector 0.489 B, CLIP-L 0.303 B), Mixtral-8x7B (46.70 B) and
    Qwen2-72B (72.71 B)."""
    for name, decoder, connector in (
        ("videollama2-7b", 7.24e9, 489.2e6),
        ("videollama2-8x7b", 46.70e9, 489.2e6),
        ("videollama2-72b", 72.71e9, 1934.7e6),
    ):
        tensors = SIZES[name].layout().shards[""]
        tower, projector = "model.vision_tower.", "model.mm_projector."
        rest = sum(math.prod(t.shape) for t in tensors if not t.name.startswith((tower, projector)))
        assert rest == pytest.approx(decoder, rel=1e-3)
        assert count(tensors, projector) == pytest.approx(connector, rel=1e-3)
        assert count(tensors, tower) == pytest.approx(0.303e9, rel=2e-3)


def test_the_clip_tower_is_that_of_transformers() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = auroracap.SIZES["auroracap-7b"]
    v = size.vision
    config = CLIPVisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(config)
    wanted = {f"vision_model.{n.removeprefix('vision_model.')}": tuple(t.shape) for n, t in tower.named_parameters()}
    assert {t.name: t.shape for t in size.layout().shards["visual_encoder"]} == wanted


def test_sizes_have_names_of_their_own() -> None:
    assert sum(len(family.sizes) for family in FAMILIES.values()) == len(SIZES)


# --- bad input


def test_an_unknown_size_and_a_taken_path(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"size '8b' is not one of 7b, 0\.5b, tiny, "):
        write_checkpoint(tmp_path / "x", "8b")
    with pytest.raises(OptionError, match="exists already"):
        write_checkpoint(tmp_path, "tiny")


@pytest.mark.parametrize("limit", [300_000, 2_000, 1_000_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OptionError, match="cannot be written: ") as caught:
            write_checkpoint(tmp_path / "tiny", "tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nframe #0")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OptionError, match=r"cannot be written: audio_tower\.bin: PytorchStreamWriter failed"):
        write_checkpoint(tmp_path / "tiny", "tiny")
    assert list(tmp_path.iterdir()) == []
