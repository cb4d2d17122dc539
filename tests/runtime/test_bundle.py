"""Opening bundles: every kind of damage and tampering is refused with one line, and nothing else is."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intertitle.contract.pipeline import Ids
from intertitle.errors import BundleError
from intertitle.runtime import integrity
from intertitle.runtime.bundle import Bundle, is_plain_name, parse_manifest

WriteBundle = Callable[..., Path]

# Fixtures that only build values are safe to share between examples.
shared = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path, verify: Any = "full") -> str:
    """The one line with which a bundle is refused."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify)
    message = str(caught.value)
    assert message
    assert message.isprintable()
    return message


@pytest.fixture
def bundle(tmp_path: Path, write_bundle: WriteBundle) -> Path:
    return write_bundle(tmp_path / "tiny")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as old enough to be remembered, without waiting two seconds."""
    monkeypatch.setattr(integrity, "_SETTLED_SECONDS", -1.0)
    # Wherever the tests' temporary folder lies.
    monkeypatch.setattr(integrity, "in_memory", lambda directory: False)


def hashed(path: Path, verify: Any = "auto") -> int:
    """How many bytes were hashed to open a bundle."""
    seen = [0]
    Bundle.open(path, verify, progress=lambda done, total: seen.append(total))
    return seen[-1]


# What is in a bundle


def test_open(bundle: Path, bundle_files: dict[str, bytes]):
    opened = Bundle.open(bundle)
    assert opened.path == bundle
    assert opened.sha256 == hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    assert opened.manifest.components["decoder"].block_size == 32
    assert opened.manifest.components["vision"].inputs[0].shape == ["frames", 3, 8, 8]
    assert opened.manifest.pipeline.image.mean == (0.5, 0.5, 0.5)
    assert opened.manifest.pipeline.prompts["video"].pieces[0] == Ids((1,))
    for name, data in bundle_files.items():
        assert opened.file(name).read_bytes() == data
    with pytest.raises(BundleError, match="no file"):
        opened.file("../tiny/bundle.json")


def test_open_through_a_link_to_the_directory(bundle: Path, tmp_path: Path):
    (tmp_path / "latest").symlink_to(bundle)
    assert Bundle.open(tmp_path / "latest").manifest.name == "tiny"


def test_embed(bundle: Path):
    opened = Bundle.open(bundle)
    rows = opened.embed([2, 0, 2])
    assert type(rows) is np.ndarray
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[-1, 0, 1, 2], [-9, -8, -7, -6], [-1, 0, 1, 2]])
    assert opened.embed([]).shape == (0, 4)


@pytest.mark.parametrize("token", [7, -1, 2**40])
def test_embed_refuses_ids_outside_the_table(bundle: Path, token: int):
    with pytest.raises(BundleError, match=f"7 rows, but token id {token}"):
        Bundle.open(bundle).embed(np.array([0, token]))


@pytest.mark.parametrize(("name", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_embed_widens_every_16_bit_value_exactly(
    tmp_path: Path,
    write_bundle: WriteBundle,
    manifest_json: dict[str, Any],
    bundle_files: dict[str, bytes],
    empty_graphs: Callable[[dict[str, Any]], dict[str, bytes]],
    name: str,
    torch_dtype: torch.dtype,
):
    bits = np.arange(65536, dtype="<u2").reshape(256, 256)
    manifest_json["embedding"] = {"file": "embedding.bin", "dtype": name, "shape": [256, 256]}
    manifest_json["decoder"].update(vocab_size=256, hidden_size=256)
    for component in manifest_json["components"].values():
        for tensor in (*component["inputs"], *component["outputs"]):
            tensor["shape"] = [256 if size in (4, 7) else size for size in tensor["shape"]]
    bundle_files |= empty_graphs(manifest_json)
    bundle_files["embedding.bin"] = bits.tobytes()
    opened = Bundle.open(write_bundle(tmp_path / "b"))
    expected = torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float().numpy()
    np.testing.assert_array_equal(opened.embed(np.arange(256)), expected)
    assert np.isnan(expected).any()


def test_embed_float32(
    tmp_path: Path, write_bundle: WriteBundle, manifest_json: dict[str, Any], bundle_files: dict[str, bytes]
):
    values = np.random.default_rng(0).standard_normal((7, 4)).astype("<f4")
    manifest_json["embedding"]["dtype"] = "float32"
    bundle_files["embedding.bin"] = values.tobytes()
    opened = Bundle.open(write_bundle(tmp_path / "b"))
    np.testing.assert_array_equal(opened.embed([6, 1]), values[[6, 1]])


# What is not a bundle


def test_paths_that_are_no_bundle(tmp_path: Path):
    assert "no such directory" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "not a directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "there is no bundle.json" in refusal(tmp_path / "empty")


def replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def to_link(path: Path) -> None:
    """The same contents, behind a symbolic link."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


STRUCTURAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda b: (b / "audio.onnx").unlink(), "'audio.onnx' is missing"),
    "extra file": (lambda b: (b / "model.engine").write_bytes(b"x"), "'model.engine' is not part of the bundle"),
    "hidden extra file": (lambda b: (b / ".x").write_bytes(b"x"), "'.x' is not part of the bundle"),
    "extra directory": (lambda b: (b / "sub").mkdir(), "'sub' is not part of the bundle"),
    "extra file of a nasty name": (lambda b: (b / "a\x1b[2J\nb").write_bytes(b""), "is not part of the bundle"),
    "longer file": (lambda b: replace(b / "tokenizer.json", b"{}!"), "'tokenizer.json' has 3 bytes, expected 2"),
    "shorter file": (lambda b: replace(b / "embedding.bin", b""), "'embedding.bin' has 0 bytes, expected 56"),
    "linked file": (lambda b: to_link(b / "tokenizer.json"), "'tokenizer.json' is a symbolic link"),
    "dangling link": (lambda b: (b / "x").symlink_to("nowhere"), "'x' is not part of the bundle"),
    "linked manifest": (lambda b: to_link(b / "bundle.json"), "bundle.json: not a regular file"),
    "directory for a file": (lambda b: to_directory(b / "vision.onnx"), "'vision.onnx' is not a regular file"),
    "fifo for a file": (lambda b: to_fifo(b / "vision.onnx"), "'vision.onnx' is not a regular file"),
    "fifo for the manifest": (lambda b: to_fifo(b / "bundle.json"), "bundle.json: not a regular file"),
    "huge manifest": (lambda b: os.truncate(b / "bundle.json", 1 << 30), "too large"),
    "empty manifest": (lambda b: replace(b / "bundle.json", b""), "not a bundle manifest"),
    "manifest of a list": (lambda b: replace(b / "bundle.json", b"[]"), "not a bundle manifest"),
    "manifest without version": (lambda b: replace(b / "bundle.json", b"{}"), "schema_version"),
    "manifest not in UTF-8": (
        lambda b: replace(b / "bundle.json", b'{"schema_version\xff": 1}'),
        "not a bundle manifest",
    ),
    "a value not in UTF-8": (
        lambda b: replace(b / "bundle.json", b'{"schema_version": 2, "name": "\xff"}'),
        "not a bundle manifest",
    ),
    "manifest nested deeply": (
        lambda b: replace(b / "bundle.json", b'{"schema_version": 2, "name":' + b"[" * 100_000),
        "not a bundle manifest",
    ),
}


@pytest.mark.parametrize("verify", ["full", "auto", "sizes"])
@pytest.mark.parametrize("damage", STRUCTURAL)
def test_damage_that_shows_without_reading(bundle: Path, settled: None, damage: str, verify: str):
    Bundle.open(bundle)  # remembered as whole
    harm, message = STRUCTURAL[damage]
    harm(bundle)
    assert message in refusal(bundle, verify)


@pytest.mark.parametrize("verify", ["full", "auto"])
def test_every_file_is_hashed(bundle: Path, bundle_files: dict[str, bytes], verify: str):
    for name, data in bundle_files.items():
        (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert refusal(bundle, verify) == f"{bundle}: '{name}' differs from its sha256 in bundle.json"
        assert Bundle.open(bundle, "sizes").manifest.name == "tiny"
        (bundle / name).write_bytes(data)
    Bundle.open(bundle, verify)


@shared
@given(data=st.data())
def test_any_flipped_byte_is_noticed(write_bundle: WriteBundle, bundle_files: dict[str, bytes], data: st.DataObject):
    path = data.draw(st.sampled_from(sorted(bundle_files)))
    contents = bundle_files[path]
    at = data.draw(st.integers(0, len(contents) - 1))
    flip = data.draw(st.integers(1, 255))
    directory = Path(os.environ["XDG_CACHE_HOME"]) / "flipped"
    shutil.rmtree(directory, ignore_errors=True)
    write_bundle(directory)
    (directory / path).write_bytes(contents[:at] + bytes([contents[at] ^ flip]) + contents[at + 1 :])
    assert f"'{path}' differs" in refusal(directory)


@pytest.mark.parametrize("name", ["vision.onnx", "connector.onnx.data", "embedding.bin"])
@pytest.mark.parametrize("change", ["overwritten", "replaced", "removed"])
def test_a_file_that_changes_after_it_was_verified(bundle: Path, name: str, change: str):
    opened, path = Bundle.open(bundle), bundle / name
    data = path.read_bytes()
    assert opened.file("audio.onnx") == bundle / "audio.onnx"
    os.link(path, bundle.parent / "linked")  # changes nothing
    assert opened.file("audio.onnx") == bundle / "audio.onnx"
    if change == "overwritten":
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    elif change == "replaced":
        (bundle.parent / "new").write_bytes(data)
        (bundle.parent / "new").rename(path)
    else:
        path.unlink()
    with pytest.raises(BundleError, match=f"'{name}' was (changed after it was verified|removed while in use)"):
        opened.file("audio.onnx")


def test_nothing_on_tmpfs_is_remembered(bundle: Path, settled: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrity, "in_memory", lambda directory: True)
    assert hashed(bundle) == hashed(bundle) > 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at its usual place")
def test_tmpfs_is_known(repo_dir: Path):
    assert integrity.in_memory(Path("/dev/shm"))
    assert not integrity.in_memory(Path("/proc"))


# The manifest by itself


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [node for key, value in items for node in [(*path, key), *nodes(value, (*path, key))]]


@pytest.fixture
def whole(manifest_json: dict[str, Any], bundle_files: dict[str, bytes]) -> dict[str, Any]:
    files = {n: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for n, data in bundle_files.items()}
    return {**manifest_json, "files": files}


def manifest_refusal(tree: Any) -> str:
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(tree).encode(), "bundle.json")
    message = str(caught.value)
    assert message.startswith("bundle.json: ")
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "compile the checkpoint again"), (4, "use a newer intertitle"), (99, "version 99")]
)
def test_other_schema_versions(whole: dict[str, Any], version: int, remedy: str):
    message = manifest_refusal({"schema_version": version, "whatever": 1})
    assert remedy in message
    assert "reads versions 2, 3" in message


def test_unknown_fields_are_refused_at_every_level(whole: dict[str, Any]):
    # These are dictionaries from names, not records of fields.
    free = {("components",), ("pipeline", "prompts"), ("files",), ("provenance", "tools")}
    records = [(), *(path for path in nodes(whole) if isinstance(at(whole, path), dict) and path not in free)]
    assert len(records) > 20
    for path in records:
        tree = copy.deepcopy(whole)
        at(tree, path)["surprise\n"] = 1
        assert "surprise" in manifest_refusal(tree), path


def test_fields_without_a_default_are_required(whole: dict[str, Any]):
    optional = {"data", "block_size", "adapter", "adapter_sha256", "sound", "tokens"}
    optional |= {"repetition_penalty", "temperature", "top_p", "top_k", "max_new_tokens"}
    for path in nodes(whole):
        if isinstance(path[-1], str) and path[-1] not in optional and path != ("provenance", "tools", "torch"):
            tree = copy.deepcopy(whole)
            del at(tree, path[:-1])[path[-1]]
            manifest_refusal(tree)


STAGES = ("pipeline", "stages")
VISION: dict[str, Any] = {
    "name": "vision",
    "unit": {"type": "frame"},
    "inputs": [{"name": "pixel_values", "source": "pixels"}],
    "output": "features",
    "tokens": 5,
}


def stage(name: str, unit: dict[str, Any], *sources: str) -> dict[str, Any]:
    inputs = [{"name": f"from_{source}", "source": source} for source in sources]
    return {"name": name, "unit": unit, "inputs": inputs, "output": "y", "tokens": 5}


def window(kernel: int, padding: int = 0, stride: int | None = None) -> dict[str, Any]:
    return {"type": "window", "kernel": kernel, "stride": stride or kernel, "padding": padding}


SHARE: dict[str, Any] = {"keep": 1, "graph": "vision.onnx", "tokens": 5}
HALF: dict[str, Any] = {"keep": 0.5, "graph": "vision.keep0.5.onnx", "tokens": 3}
VIDEO = ("pipeline", "prompts", "video", "pieces")
SAID = [{"type": "tokens", "stage": "connector"}]

CONTRADICTIONS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no decoder": (("components", "decoder"), None, "not a bundle manifest"),
    "unknown component": (("components", "extra"), "vision", "components are"),
    "graph of another name": (("components", "vision", "graph"), "audio.onnx", "graph of component 'vision'"),
    "graph elsewhere": (("components", "vision", "graph"), "/etc/passwd", "graph of component 'vision'"),
    "data of another name": (("components", "audio", "data"), "vision.onnx", "data of component 'audio'"),
    "data that is not listed": (("components", "audio", "data"), "audio.onnx.data", "'audio.onnx.data' is not listed"),
    "data without a role": (("components", "connector", "data"), None, "'connector.onnx.data' belongs to no component"),
    "other dialect": (("dialect",), "standard", "graph of component 'decoder'"),
    "other weights": (("weights",), "fp32", "weights are fp32, but the decoder's are int4"),
    "int4 without blocks": (("components", "decoder", "block_size"), None, "block size None"),
    "fp32 with blocks": (("components", "vision", "block_size"), 32, "block size 32"),
    "format that nobody knows": (("components", "vision", "weights"), "fp8", "fp32|fp16|int4|int8"),
    "rule of another component": (
        ("recipe",),
        [{"component": "tower", "pattern": "*", "format": "int4", "block_size": 32}],
        "recipe: there is no component 'tower'",
    ),
    "rule of another format": (
        ("recipe",),
        [{"component": "vision", "pattern": "*", "format": "int3"}],
        "fp32|fp16|int4|int8",
    ),
    "no inputs": (("components", "vision", "inputs"), [], "no inputs"),
    "embedding is another file": (("embedding", "file"), "vision.onnx", "two roles share one file"),
    "embedding outside": (("embedding", "file"), "../secret", "is not listed"),
    "embedding shape": (("embedding", "shape"), [4, 7], "embedding table [4, 7] for a decoder of 7 x 4"),
    "embedding type": (("embedding", "dtype"), "float32", "has 56 bytes, but float32 [7, 4] takes 112"),
    "vocabulary": (("decoder", "vocab_size"), 8, "for a decoder of 8 x 4"),
    "negative size": (("decoder", "num_layers"), -1, "num_layers"),
    "end token outside": (("generation", "eos_token_ids"), [7], "outside the vocabulary of 7"),
    "no end token": (("generation", "eos_token_ids"), [], "eos_token_ids"),
    "top_p": (("generation", "top_p"), 0, "top_p"),
    "hash of another kind": (("files", "vision.onnx", "sha256"), "md5", "sha256"),
    "image of no pixels": (("pipeline", "image", "size"), 0, "image: size 0"),
    "crop of no pixels": (("pipeline", "image", "crop"), -8, "crop -8"),
    "crop larger than the image": (
        ("pipeline", "image"),
        {"resize": "shortest_edge", "size": 8, "crop": 9, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "image: size 8, crop 9",
    ),
    "std of zero": (("pipeline", "image", "std"), [1, 0, 1], "std [1.0, 0.0, 1.0]"),
    "many layers": (("decoder", "num_layers"), 1 << 40, "num_layers 1099511627776 is above 1024"),
    "a layer without a cache": (("decoder", "num_layers"), 2, "'past.1.key' is not there"),
    "other heads": (("decoder", "num_kv_heads"), 2, "'past.0.key' is ['rows', 1, 'max_length', 2]"),
    "other head size": (("decoder", "head_dim"), 4, "'past.0.key'"),
    "endless context": (("decoder", "context_length"), 1 << 60, "context_length"),
    "endless caption": (("generation", "max_new_tokens"), 1 << 60, "max_new_tokens"),
    "a large image": (("pipeline", "image", "size"), 9000, "9000 x 9000 pixels are too many"),
    "another image": (("pipeline", "image", "size"), 16, "'pixel_values' is ['frames', 3, 8, 8]"),
    "std of a negative": (("pipeline", "image", "std"), [1, -1, 1], "std [1.0, -1.0, 1.0]"),
    "huge mean": (("pipeline", "image", "mean"), [1e300, 0, 0], "mean [1e+300, 0.0, 0.0]"),
    "a start token outside the table": ((*VIDEO, 0, "ids"), [7], "an id is outside the embedding table of 7 rows"),
    "no prompt for a mode": (("pipeline", "prompts"), {}, "expected audio, audiovideo, video"),
    "a prompt for sound without sound": (("pipeline", "sound"), None, "takes 'sound', which does not come before it"),
    "a prompt without the clip": (VIDEO, [{"type": "text", "text": "x"}], "no tokens of a stage"),
    "a prompt of an unknown stage": (VIDEO, [{"type": "tokens", "stage": "ears"}], "'ears', which is no stage"),
    "a prompt of another mode": (VIDEO, [{"type": "tokens", "stage": "audio"}], "its stages take sound"),
    "a stage twice in a prompt": (VIDEO, SAID * 2, "a stage is there twice"),
    "the units of a sound": (
        ("pipeline", "prompts", "audio", "pieces"),
        [{"type": "each", "stage": "audio"}],
        "the units of a sound apart",
    ),
    "the same variable again and again": ((*VIDEO, 1, "text"), "{times}" * 17, "name 18 variables"),
    "times of frames of a sound": (
        ("pipeline", "prompts", "audio", "pieces", 1, "text"),
        "{seconds}",
        "speaks of times of frames",
    ),
    "hardly a frame": (
        ("pipeline", "sampling"),
        {"rule": "rate", "count": 8, "fps": 5e-324},
        "frames of each second are too many or too few",
    ),
    "an output without axes": (("components", "vision", "outputs", 0, "shape"), [], "'features' is []"),
    "the question at each frame": (
        VIDEO,
        [{"type": "each", "stage": "connector", "before": "{instruction}"}],
        "names more than its number",
    ),
    "a long text at each frame": (
        VIDEO,
        [{"type": "each", "stage": "connector", "separator": "x" * 10000}],
        "'connector' are 80000 characters",
    ),
    "many pieces": (VIDEO, SAID + [{"type": "ids", "ids": []}] * 256, "too many pieces"),
    "an untimed form of nothing": (("pipeline", "prompts", "video", "untimed"), SAID, "untimed form"),
    "a long prompt": ((*VIDEO, 1, "text"), "x" * 70000, "a text of 70000 characters"),
    "a piece of another kind": ((*VIDEO, 1, "type"), "song", "not a bundle manifest"),
    "a stage before its input": ((*STAGES, 0, "inputs", 0, "source"), "connector", "does not come before it"),
    "a stage with a path for a name": ((*STAGES, 0, "name"), "../x", "its name is not plain"),
    "a stage that is the decoder": ((*STAGES, 0, "name"), "decoder", "its name is not plain, or taken"),
    "two stages of one name": ((*STAGES, 1, "name"), "vision", "its name is not plain, or taken"),
    "sound frame by frame": ((*STAGES, 2, "unit"), {"type": "frame"}, "sound is taken as one"),
    "a tower for all of a sound": ((*STAGES, 0, "unit"), {"type": "sound"}, "sound is taken as one"),
    "a unit of another kind": ((*STAGES, 0, "unit", "type"), "song", "not a bundle manifest"),
    "a tower of unknown tokens": ((*STAGES, 0, "tokens"), None, "the number of its tokens is missing"),
    "windows without frames": (
        (*STAGES, 1, "unit"),
        {"type": "window", "kernel": 9, "stride": 9},
        "8 places fill no window",
    ),
    "windows of windows without frames": (
        STAGES,
        [VISION, stage("fours", window(4), "vision"), stage("both", window(4), "fours")],
        "8 places fill no window",
    ),
    "windows of what is there once": (
        STAGES,
        [VISION, stage("mean", {"type": "clip"}, "vision"), stage("both", window(2), "mean")],
        "8 places fill no window",
    ),
    "frames beside pairs": (
        STAGES,
        [VISION, stage("pairs", window(2), "vision"), stage("sum", {"type": "frame"}, "vision", "pairs")],
        "stage 'sum': units of its inputs in a clip of 2 places: 'vision' 2, 'pairs' 1",
    ),
    # Of a whole clip both have four.
    "pairs beside others": (
        STAGES,
        [
            VISION,
            stage("pairs", window(2), "vision"),
            stage("centred", window(3, 1, 2), "vision"),
            stage("sum", {"type": "clip"}, "pairs", "centred"),
        ],
        "stage 'sum': units of its inputs in a clip of 3 places: 'pairs' 1, 'centred' 2",
    ),
    "long windows": (
        (*STAGES, 1, "unit"),
        {"type": "window", "kernel": 1, "stride": 1, "padding": 1 << 40},
        "1099511627776 of padding",
    ),
    "many tokens": ((*STAGES, 1, "tokens"), 1 << 40, "more than a context holds"),
    "tokens of another graph": ((*STAGES, 1, "tokens"), 6, "'visual_tokens' is ['slots', 5, 4]"),
    "another output": ((*STAGES, 0, "output"), "eyes", "'eyes' is not there"),
    "another input": ((*STAGES, 0, "inputs", 0, "name"), "eyes", "'eyes' is not there"),
    "two inputs of a tower": (
        ("components", "vision", "inputs"),
        [{"name": n, "dtype": "float32", "shape": ["frames", 3, 8, 8]} for n in ("pixel_values", "more")],
        "inputs or outputs that are not those of its stage",
    ),
    "shares of windows": ((*STAGES, 1, "variants"), [SHARE | {"graph": "connector.onnx"}], "do not belong to it"),
    "a share of nothing": ((*STAGES, 0), VISION | {"variants": [SHARE | {"keep": 0}]}, "keep"),
    "a share of other tokens": ((*STAGES, 0), VISION | {"variants": [SHARE | {"tokens": 4}]}, "do not belong to it"),
    "a share of another graph": ((*STAGES, 0), VISION | {"variants": [SHARE | {"graph": "audio.onnx"}]}, "variant 1"),
    "a share whose graph is not there": (
        (*STAGES, 0),
        VISION | {"variants": [SHARE, HALF]},
        "'vision.keep0.5.onnx' is not listed",
    ),
    "a share of another name": ((*STAGES, 0), VISION | {"variants": [SHARE, HALF | {"graph": "../x.onnx"}]}, "0.5 is"),
    "a share twice": ((*STAGES, 0), VISION | {"variants": [SHARE, SHARE]}, "variant 1 is 'vision.onnx'"),
    "a frame rule": (("pipeline", "sampling", "rule"), "random", "random"),
    "a rate without a rule": (("pipeline", "sampling", "fps"), 1, "belong to the rule 'rate'"),
    "a rule without a rate": (("pipeline", "sampling", "rule"), "rate", "belong to the rule 'rate'"),
    "many frames": (("pipeline", "sampling", "count"), 1 << 50, "frames are more than 4096"),
    "other sound": (("pipeline", "sound", "num_frames"), 2999, "'fbank' is [1, 2998, 128]"),
    "other rate": (("pipeline", "sound", "sample_rate"), 1, "480000 samples at 1 Hz"),
    "a hot temperature": (("generation", "temperature"), 1e30, "temperature 1e+30"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(whole: dict[str, Any], case: str):
    path, value, message = CONTRADICTIONS[case]
    at(whole, path[:-1])[path[-1]] = at(whole, ("components", value)) if case == "unknown component" else value
    assert message in manifest_refusal(whole)


BAD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "C:x",
    "a\nb",
    "a b",
    "a\0",
    "é",
    "bundle.json",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_not_plain(whole: dict[str, Any], name: str):
    assert not is_plain_name(name)
    whole["files"][name] = {"sha256": "0" * 64, "size": 1}
    assert "is not a plain file name" in manifest_refusal(whole)


@given(name=st.text(max_size=12) | st.text(alphabet="./\\ab~:\0\n ", max_size=6))
def test_plain_names_stay_inside_a_directory(name: str):
    if is_plain_name(name):
        assert Path("/bundle", name).parts == ("/", "bundle", name)
        assert os.path.normpath(f"/bundle/{name}") == f"/bundle/{name}"
        assert name.isascii()
        assert name.isprintable()
        assert not name.startswith(".")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(shared, max_examples=300)
@given(data=st.data(), value=json_values)
def test_a_manifest_with_anything_anywhere_parses_or_is_refused(whole: dict[str, Any], data: st.DataObject, value: Any):
    tree = copy.deepcopy(whole)
    path = data.draw(st.sampled_from(nodes(tree)))
    at(tree, path[:-1])[path[-1]] = value
    refused = ""
    try:
        parse_manifest(json.dumps(tree).encode(), "bundle.json")
    except BundleError as error:
        refused = str(error)
    assert refused == "" or refused.isprintable()


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest(data: bytes):
    with pytest.raises(BundleError):
        parse_manifest(data, "bundle.json")


# Hashing once


def test_what_was_hashed_is_not_hashed_again(bundle: Path, settled: None, bundle_files: dict[str, bytes]):
    total = sum(map(len, bundle_files.values()))
    assert hashed(bundle) == total
    assert hashed(bundle) == 0
    assert hashed(bundle, "full") == total
    assert hashed(bundle, "sizes") == 0


def test_only_the_changed_file_is_hashed_again(bundle: Path, settled: None, bundle_files: dict[str, bytes]):
    Bundle.open(bundle)
    os.utime(bundle / "vision.onnx")
    assert hashed(bundle) == len(bundle_files["vision.onnx"])
    assert hashed(bundle) == 0


def test_a_change_that_hides_behind_old_times_is_noticed(bundle: Path, settled: None):
    path = bundle / "decoder.ort.onnx.data"
    Bundle.open(bundle)
    before = path.stat()
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.write(b"\x03")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_size == before.st_size
    assert "'decoder.ort.onnx.data' differs" in refusal(bundle, "auto")
    assert "'decoder.ort.onnx.data' differs" in refusal(bundle, "auto")


def test_another_file_in_its_place_is_noticed(bundle: Path, settled: None):
    Bundle.open(bundle)
    other = bundle.parent / "other"
    other.write_bytes(bytes((bundle / "vision.onnx").stat().st_size))
    other.rename(bundle / "vision.onnx")
    assert "'vision.onnx' differs" in refusal(bundle, "auto")


def test_another_manifest_makes_the_record_worthless(bundle: Path, settled: None):
    Bundle.open(bundle)
    tree = json.loads((bundle / "bundle.json").read_text())
    tree["files"]["vision.onnx"]["sha256"] = "0" * 64
    (bundle / "bundle.json").write_text(json.dumps(tree))
    assert "'vision.onnx' differs" in refusal(bundle, "auto")


def test_a_file_just_written_is_not_remembered(bundle: Path, bundle_files: dict[str, bytes]):
    total = sum(map(len, bundle_files.values()))
    assert hashed(bundle) == total
    assert hashed(bundle) == total


@pytest.fixture
def record(bundle: Path, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The record of an opened bundle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Bundle.open(bundle)
    assert hashed(bundle) == 0
    (path,) = (tmp_path / "cache" / "intertitle" / "verified").iterdir()
    return path


def test_the_record_is_private(record: Path):
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(record.parent.parent.stat().st_mode) == 0o700


DISTRUSTED: dict[str, Callable[[Path], Any]] = {
    "writable by others": lambda record: record.chmod(0o622),
    "directory open to others": lambda record: record.parent.chmod(0o755),
    "cache open to others": lambda record: record.parent.parent.chmod(0o777),
    "a link": lambda record: (record.rename(record.parent / "x"), record.symlink_to("x")),
    "not JSON": lambda record: record.write_bytes(b"\xff"),
    "of another shape": lambda record: record.write_text("[]"),
    "a fifo": lambda record: (record.unlink(), os.mkfifo(record)),
    "a directory": lambda record: (record.unlink(), record.mkdir()),
}


@pytest.mark.parametrize("case", DISTRUSTED)
def test_a_record_that_others_could_have_written_is_not_used(
    bundle: Path, record: Path, bundle_files: dict[str, bytes], case: str
):
    DISTRUSTED[case](record)
    assert hashed(bundle) == sum(map(len, bundle_files.values()))


@pytest.mark.parametrize("cache", ["/dev/null/cache", "relative"])
def test_without_a_cache_every_opening_hashes(
    bundle: Path, settled: None, monkeypatch: pytest.MonkeyPatch, bundle_files: dict[str, bytes], cache: str
):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    for _ in range(2):
        assert hashed(bundle) == sum(map(len, bundle_files.values()))


def test_hashes_of_large_files(tmp_path: Path):
    data = np.random.default_rng(1).bytes((8 << 20) * 2 + 12345)
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    states = {path.name: integrity.FileState.of(path.stat()) for path in tmp_path.iterdir()}
    seen = []
    digests = integrity.hash_files(tmp_path, states, states, lambda done, total: seen.append((done, total)))
    assert digests["large"] == hashlib.sha256(data).hexdigest()
    # FIPS 180-2, appendix B.1; and the well-known hash of nothing.
    assert digests["small"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digests["empty"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert seen[-1] == (len(data) + 3, len(data) + 3)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    states = {"x": integrity.FileState.of((tmp_path / "x").stat())}
    (tmp_path / "x").write_bytes(b"abcd")
    with pytest.raises(BundleError, match="'x' was changed while it was read"):
        integrity.hash_files(tmp_path, states, ["x"])
    (tmp_path / "x").unlink()
    with pytest.raises(BundleError, match="'x' cannot be read"):
        integrity.hash_files(tmp_path, states, ["x"])


def test_an_interrupted_display_stops_the_hashing(tmp_path: Path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 40 << 30)  # a minute of hashing, no disk

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        integrity.hash_files(tmp_path, {"sparse": integrity.FileState.of(path.stat())}, ["sparse"], interrupt)
    assert time.monotonic() - started < 5
