from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from intertitle.errors import CheckpointError
from intertitle.export.tokenizer import collect_tokenizer
from intertitle.models import open_checkpoint
from intertitle.models.checkpoint import Checkpoint


def same(path: Path, original) -> bool:
    """Whether every entry of every component reads alike."""
    checkpoint = open_checkpoint(path)
    return all(
        torch.equal(checkpoint.tensor(component, entry), original.tensor(component, entry))
        for component in original.components
        for entry in original.module(component).state_dict()
    ) and torch.equal(checkpoint.embedding(), original.embedding())


def shard(copy, suffix: str, parts: int = 3, skip: str | None = None) -> None:
    """Write the weights again as ``parts`` shards with an index, the single file gone."""
    tensors = copy.tensors()
    (copy.path / "model.safetensors").unlink()
    stem, weight_map = {".safetensors": "model", ".bin": "pytorch_model"}[suffix], {}
    for i in range(parts):
        name = f"{stem}-{i + 1:05}-of-{parts:05}{suffix}"
        part = {key: tensors[key].clone() for key in list(tensors)[i::parts] if key != skip}
        weight_map.update(dict.fromkeys(list(tensors)[i::parts], name))
        copy.save(part, name) if suffix == ".safetensors" else torch.save(part, copy.path / name)
    (copy.path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_read_like_the_single_file(suffix, copied, opened):
    copy = copied("auroracap")
    shard(copy, suffix)
    assert same(copy.path, opened("auroracap"))


@pytest.mark.parametrize("legacy", [False, True])
def test_single_pickle_reads_like_safetensors(legacy, copied, opened):
    copy = copied("auroracap")
    torch.save(copy.tensors(), copy.path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (copy.path / "model.safetensors").unlink()
    assert same(copy.path, opened("auroracap"))


def test_audio_tower_and_projectors_beside_the_shards(copied, opened):
    copy = copied("av-qwen2")
    tensors = copy.tensors()
    prefixes = {"audio_tower.bin": "model.audio_tower.", "mm_projector_a.bin": "model.mm_projector_a."}
    prefixes["mm_projector.bin"] = "model.mm_projector."
    for file, prefix in prefixes.items():
        torch.save({key: value for key, value in tensors.items() if key.startswith(prefix)}, copy.path / file)
    copy.save({key: value for key, value in tensors.items() if not key.startswith(tuple(prefixes.values()))})
    assert same(copy.path, opened("av-qwen2"))


def test_shards_win_over_files_beside_them(copied, opened):
    copy = copied("av-qwen2")
    stale = {key: value * 0 + 7 for key, value in copy.tensors().items() if key.startswith("model.audio_tower.")}
    torch.save(stale, copy.path / "audio_tower.bin")
    assert same(copy.path, opened("av-qwen2"))


def test_headers_are_read_without_values(data_dir):
    checkpoint = Checkpoint.open(data_dir / "auroracap")
    info = checkpoint.tensors["projector/model.2.weight"]
    assert (info.shape, info.dtype) == ((128, 128), torch.float32)
    assert checkpoint.tensors["model.norm.weight"].shape == (128,)
    assert checkpoint.part_names == ("visual_encoder", "projector")


class Mallory:
    """What a pickle must not bring to life."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda p: (p / "config.json").write_text("[1]"), "config.json is not a JSON object"),
        (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not readable JSON"),
        (lambda p: (p / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert'"),
        (lambda p: (p / "config.json").write_text('{"model_type": "llama"}'), "model_type 'llama'"),
        (lambda p: (p / "config.json").write_text("{}"), "model_type None"),
        (lambda p: (p / "model.safetensors").unlink(), "no model weights"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors is not a readable"),
        (lambda p: truncate(p / "model.safetensors"), "model.safetensors is not a readable"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 4096), "model.safetensors is not a readable"),
    ],
)
def test_a_broken_folder_is_refused_by_name(spoil, message, copied):
    path = copied("clip-mistral").path
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            open_checkpoint(path)


def test_missing_shard_and_bad_index_are_named(copied):
    copy = copied("clip-mistral")
    shard(copy, ".safetensors")
    lost = copy.path / "model-00002-of-00003.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(copy.path)
    lost.write_bytes(content)
    index = copy.path / "model.safetensors.index.json"
    for weight_map in (
        {"a": "../../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "config.json"},
        [],
        None,
        {"a": 1},
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(copy.path)


def test_a_tensor_lost_between_shards_is_named(copied):
    copy = copied("clip-mistral")
    shard(copy, ".safetensors", skip="model.layers.1.mlp.gate_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is missing"):
        open_checkpoint(copy.path)


@pytest.mark.parametrize(
    "content", [{"model.norm.weight": Mallory()}, {"step": 3}, [torch.zeros(1)], {1: torch.zeros(1)}, Mallory()]
)
def test_a_pickle_of_anything_but_tensors_is_refused(content, copied):
    path = copied("clip-mistral").path
    (path / "model.safetensors").unlink()
    torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


class Program:
    """Unpickled the unsafe way, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_never_runs_code(zipped, copied, tmp_path):
    copy, mark = copied("clip-mistral"), tmp_path / "ran"
    content = {**copy.tensors(), "zzz": Program(mark)}
    (copy.path / "model.safetensors").unlink()
    torch.save(content, copy.path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused"):
        open_checkpoint(copy.path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 not a zip"])
def test_a_file_that_is_no_pickle_is_refused(content, copied):
    path = copied("clip-mistral").path
    (path / "mm_projector.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin is refused"):
        open_checkpoint(path)


def test_truncated_pickle_is_refused(copied):
    copy = copied("clip-mistral")
    torch.save(copy.tensors(), copy.path / "pytorch_model.bin")
    (copy.path / "model.safetensors").unlink()
    truncate(copy.path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused"):
        open_checkpoint(copy.path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "mm_projector.bin"])
def test_a_git_lfs_pointer_is_named_as_one(name, copied):
    copy = copied("av-qwen2")
    (copy.path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer, .*run git lfs pull"):
        open_checkpoint(copy.path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_for_a_tokenizer(name, copied):
    copy = copied("av-qwen2")
    (copy.path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        collect_tokenizer(copy.path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_their_index(suffix, copied, opened):
    copy = copied("auroracap")
    shard(copy, suffix)
    next(copy.path.glob("*.index.json")).unlink()
    assert same(copy.path, opened("auroracap"))
    second = next(copy.path.glob(f"*-00002-of-00003{suffix}"))
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name} is missing beside"):
        open_checkpoint(copy.path)


def test_parameters_in_a_pickle_are_tensors(copied, opened):
    copy = copied("auroracap")
    with torch.enable_grad():
        tensors = {name: torch.nn.Parameter(value) for name, value in copy.tensors().items()}
    torch.save(tensors, copy.path / "pytorch_model.bin")
    (copy.path / "model.safetensors").unlink()
    assert same(copy.path, opened("auroracap"))
    checkpoint = open_checkpoint(copy.path)
    assert not checkpoint.tensor("decoder", "layers.0.self_attn.q_proj.weight").requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: torch.eye(4).to_sparse(), "sparse"),
        (lambda: torch.empty(4, device="meta"), "without values"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_tensors_that_are_no_plain_ones_are_refused_at_once(value, message, copied):
    copy = copied("auroracap")
    torch.save({**copy.tensors(), "extra": value()}, copy.path / "pytorch_model.bin")
    (copy.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin is refused.*{message}"):
        open_checkpoint(copy.path)


def test_a_pickle_that_unpacks_to_much_more(copied):
    copy = copied("auroracap")
    (copy.path / "model.safetensors").unlink()
    path = copy.path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pytorch_model/data.pkl", bytes(50 << 20))
        archive.writestr("pytorch_model/version", "3")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: its \d+ bytes unpack to 524"):
        open_checkpoint(copy.path)


def test_the_message_gives_no_advice_to_run_anything(copied):
    copy = copied("auroracap")
    (copy.path / "model.safetensors").unlink()
    path = copy.path / "pytorch_model.bin"
    for content, message in [(os.system, "it would call"), (b"no pickle", "refused")]:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save({"x": content}, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(copy.path)
        assert "weights_only" not in str(caught.value)
        assert "Re-running" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is not an object"),
        ({"added_tokens_decoder": "x"}, "added_tokens_decoder is not an object"),
        ({"added_tokens_decoder": {"1": "x"}}, "malformed entry"),
        ({"added_tokens_decoder": {"1": {"content": 3}}}, "malformed entry"),
        ({"added_tokens_decoder": {"9" * 300: {"content": "x"}}}, "tokenizer"),
        ({"additional_special_tokens": 3}, None),
        ({"additional_special_tokens": "abc"}, None),
        ({"additional_special_tokens": [1, None, {}]}, None),
    ],
)
def test_odd_tokenizer_settings(settings, message, copied):
    copy = copied("av-qwen2")
    copy.edit_json("tokenizer_config.json", **settings)
    if message is None:
        assert collect_tokenizer(copy.path).encode("a dog").ids
        return
    with pytest.raises(CheckpointError, match=message):
        collect_tokenizer(copy.path)


def test_settings_nested_deeply(copied):
    copy = copied("av-qwen2")
    (copy.path / "tokenizer_config.json").write_text('{"a": ' + "[" * 100_000)
    for read in (collect_tokenizer, open_checkpoint):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            read(copy.path)
