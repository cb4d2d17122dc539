"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB, WIDTH = 7, 4


def pytest_configure() -> None:
    """A shell makes what it starts in the background deaf to Ctrl-C, and with it the commands that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The fixture checkpoints with their expected numbers."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests leave nothing in the cache of the user who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def faults(repo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that read media do what the name of their file says: see ``faults/sitecustomize.py``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repo_dir / "tests" / "faults"), *sys.path]))


@pytest.fixture
def manifest_json() -> dict[str, Any]:
    """A ``bundle.json`` written by hand, still without files."""

    def tensor(name: str, *shape: int | str) -> dict[str, Any]:
        return {"name": name, "dtype": "float32", "shape": list(shape)}

    def caches(side: str) -> list[dict[str, Any]]:
        return [tensor(f"{side}.0.{part}", "rows", 1, "max_length", 2) for part in ("key", "value")]

    def component(graph: str, **more: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        tensors["inputs"], tensors["outputs"] = {
            "vision": (
                [tensor("pixel_values", "frames", 3, 8, 8)],
                [tensor("features", "frames", 5, WIDTH)],
            ),
            "connector": (
                [tensor("windows", "slots", 1, 5, WIDTH)],
                [tensor("visual_tokens", "slots", 5, WIDTH)],
            ),
            "audio": ([tensor("fbank", 1, 2998, 128)], [tensor("audio_tokens", 1, 1496, WIDTH)]),
            "decoder": (
                [tensor("inputs_embeds", "rows", "length", WIDTH), *caches("past")],
                [tensor("logits", "rows", "asked", VOCAB), *caches("present")],
            ),
        }[graph.split(".")[0]]
        return {
            "graph": graph,
            "data": None,
            "weights": "fp32",
            "block_size": None,
            "parameters": 10,
            **tensors,
            **more,
        }

    def prompt(*stages: str) -> dict[str, Any]:
        tokens = [{"type": "tokens", "stage": stage} for stage in stages]
        begin = [{"type": "ids", "ids": [1]}, {"type": "text", "text": "USER: "}]
        return {"pieces": [*begin, *tokens, {"type": "text", "text": "{instruction}"}]}

    def stage(name: str, source: str, unit: dict[str, Any], tokens: int) -> dict[str, Any]:
        graph = component(f"{name}.onnx")
        inputs = [{"name": graph["inputs"][0]["name"], "source": source}]
        return {"name": name, "unit": unit, "inputs": inputs, "output": graph["outputs"][0]["name"], "tokens": tokens}

    return {
        "schema_version": 3,
        "name": "tiny",
        "family": "videollama2",
        "target": "cpu",
        "dialect": "ort",
        "weights": "int4",
        "components": {
            "vision": component("vision.onnx"),
            "connector": component("connector.onnx", data="connector.onnx.data"),
            "audio": component("audio.onnx"),
            "decoder": component("decoder.ort.onnx", data="decoder.ort.onnx.data", weights="int4", block_size=32),
        },
        "embedding": {"file": "embedding.bin", "dtype": "bfloat16", "shape": [VOCAB, WIDTH]},
        "decoder": {
            "num_layers": 1,
            "num_kv_heads": 1,
            "head_dim": 2,
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "context_length": 64,
        },
        "pipeline": {
            "sampling": {"rule": "centered", "count": 8},
            "image": {"resize": "exact", "size": 8, "crop": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
            "sound": {"sample_rate": 16000, "num_samples": 480000, "num_mel_bins": 128, "num_frames": 2998},
            "stages": [
                stage("vision", "pixels", {"type": "frame"}, 5),
                stage("connector", "vision", {"type": "window", "kernel": 1, "stride": 1}, 5),
                stage("audio", "sound", {"type": "sound"}, 1496),
            ],
            "prompts": {
                "video": prompt("connector"),
                "audio": prompt("audio"),
                "audiovideo": prompt("connector", "audio"),
            },
        },
        "default_instruction": "Describe the video in detail.",
        "generation": {
            "eos_token_ids": [2],
            "repetition_penalty": 1.0,
            "temperature": 0.2,
            "top_p": 0.9,
            "top_k": 0,
            "max_new_tokens": 16,
        },
        "provenance": {
            "checkpoint": "tiny",
            "checkpoint_sha256": "0" * 64,
            "adapter": None,
            "adapter_sha256": None,
            "intertitle": "0",
            "tools": {"torch": "2"},
        },
        "files": {},
    }


def empty_graph(component: dict[str, Any]) -> bytes:
    """An ONNX model with the inputs and outputs of a component of ``bundle.json``."""
    import onnx

    kinds = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32, "int64": onnx.TensorProto.INT64}
    sides = [
        [onnx.helper.make_tensor_value_info(value["name"], kinds[value["dtype"]], value["shape"]) for value in values]
        for values in (component["inputs"], component["outputs"])
    ]
    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", *sides)).SerializeToString()


@pytest.fixture(scope="session")
def empty_graphs() -> Callable[[dict[str, Any]], dict[str, bytes]]:
    """``empty_graphs(manifest)``: the graphs that it names, with its inputs and outputs, but no nodes."""
    return lambda manifest: {part["graph"]: empty_graph(part) for part in manifest["components"].values()}


@pytest.fixture
def bundle_files(
    manifest_json: dict[str, Any], empty_graphs: Callable[[dict[str, Any]], dict[str, bytes]]
) -> dict[str, bytes]:
    """Contents for every file that ``manifest_json`` names; the graphs have inputs and outputs, but no nodes."""
    graphs = empty_graphs(manifest_json)
    table = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH) - 9
    return {
        **graphs,
        "connector.onnx.data": b"\x01" * 100,
        "decoder.ort.onnx.data": b"\x02" * 1000,
        # Small integers are exact in bfloat16, the upper half of a float32.
        "embedding.bin": (table.view("<u4") >> 16).astype("<u2").tobytes(),
        "tokenizer.json": b"{}",
    }


@pytest.fixture
def write_bundle(manifest_json: dict[str, Any], bundle_files: dict[str, bytes]) -> Callable[..., Path]:
    """``write_bundle(directory, manifest=..., files=...)``: a valid bundle, unless told otherwise."""

    def write(directory: Path, manifest: dict[str, Any] | None = None, files: dict[str, bytes] | None = None) -> Path:
        manifest = manifest_json if manifest is None else manifest
        files = bundle_files if files is None else files
        records = {n: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for n, data in files.items()}
        directory.mkdir()
        for name, data in files.items():
            (directory / name).write_bytes(data)
        (directory / "bundle.json").write_text(json.dumps({**manifest, "files": manifest["files"] or records}))
        return directory

    return write


@dataclass(frozen=True)
class Variant:
    """A fixture checkpoint and how it is compiled. ``explicit``: with positions as an input of the decoder."""

    checkpoint: str
    adapter: str | None = None
    keep: float | None = None
    explicit: bool = False


VARIANTS = {
    "av-qwen2": Variant("av-qwen2"),
    "clip-mistral": Variant("clip-mistral"),
    "clip-mistral-lora": Variant("clip-mistral", adapter="clip-mistral-lora"),
    "clip-mixtral": Variant("clip-mixtral"),
    "siglip-phi3": Variant("siglip-phi3"),
    "av-qwen2-explicit": Variant("av-qwen2", explicit=True),
    "clip-mistral-explicit": Variant("clip-mistral", explicit=True),
    "auroracap": Variant("auroracap"),
    "auroracap-keep": Variant("auroracap", keep=0.4),
    "llava-video": Variant("llava-video"),
    "llava-next-video": Variant("llava-next-video"),
    "internvl2": Variant("internvl2"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``every_variant`` runs for each of ``VARIANTS``: it gets the name."""
    if "every_variant" in metafunc.fixturenames:
        metafunc.parametrize("every_variant", VARIANTS)


@pytest.fixture
def open_variant(data_dir: Path) -> Callable[..., Any]:
    """``open_variant(name)``: the checkpoint that ``compiled(name)`` was compiled from."""
    from intertitle.models import open_checkpoint

    def open_it(name: str) -> Any:
        how = VARIANTS[name]
        adapter = None if how.adapter is None else data_dir / how.adapter
        return open_checkpoint(data_dir / how.checkpoint, adapter, how.keep)

    return open_it


@pytest.fixture(scope="session")
def compiled(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``compiled(variant, weights, target)``: the bundle of a fixture checkpoint, compiled once in a whole test run."""
    from filelock import FileLock
    from intertitle.export import compile as export
    from intertitle.runtime.viewing import Share

    # Workers of pytest-xdist have sibling base directories; they share what lies above.
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
    shared.mkdir(exist_ok=True)

    def compile_once(variant: str, weights: str = "fp32", target: str = "cpu") -> Path:
        how, bundle = VARIANTS[variant], shared / f"{variant}-{weights}-{target}"
        with FileLock(f"{bundle}.lock"), pytest.MonkeyPatch.context() as patch:
            if how.explicit:
                # A target whose kernel rotates no heads at all.
                record = dataclasses.replace(export.get_target(target), rotary_multiple=1 << 20)
                patch.setattr(export, "get_target", lambda _: record)
            if not bundle.exists():
                adapter = None if how.adapter is None else data_dir / how.adapter
                export.compile_bundle(
                    data_dir / how.checkpoint,
                    bundle,
                    weights=weights,
                    adapter=adapter,
                    target=target,
                    visual_tokens=None if how.keep is None else Share(how.keep),
                )
        return bundle

    return compile_once


@pytest.fixture(scope="session")
def expected(data_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """``expected(variant)``: what the original implementation computes; an adapter's numbers over its base's."""

    def load(variant: str) -> dict[str, np.ndarray]:
        how = VARIANTS[variant]
        numbers: dict[str, np.ndarray] = {}
        for folder in (how.checkpoint, how.adapter):
            if folder is not None:
                with np.load(data_dir / folder / "expected.npz") as archive:
                    numbers.update(archive)
        return numbers

    return load
