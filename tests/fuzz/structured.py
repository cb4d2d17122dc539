"""Mutants of bundles, manifests, record files, checkpoints and adapters through the doors that read them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from intertitle import Captioner, Decoding
from intertitle.runtime.batch.inputs import read_inputs
from intertitle.runtime.batch.records import RecordFile, Settings

from .json_mutants import mutate_json, to_bytes
from .mutate import mutate

_DATA = Path(__file__).parents[1] / "data"
_BASE, _ADAPTED, _ADAPTER = (_DATA / name for name in ("av-qwen2", "clip-mistral", "clip-mistral-lora"))
_SETTINGS = {"bundle": "0" * 64, "max_new_tokens": 16}


class StructuredTarget:
    """What the structured fuzzer does with a seed. ``folder / "bundle"`` is compiled where it is missing.

    The name of a mutant is the door that it goes through and the file that was changed, its content that of the file.
    ``expected`` as of ``MediaTarget``: the readers here turn whatever a library raises into one line.
    """

    expected = (Exception,)

    def __init__(self, folder: Path) -> None:
        self._folder, self._bundle = folder, folder / "bundle"
        # What is known of verified files must not grow in the user's own cache.
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if not (self._bundle / "bundle.json").is_file():
            from intertitle.export.compile import compile_bundle

            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._bundle, ignore_errors=True)
            compile_bundle(_BASE, self._bundle, weights="int4")
        self._doors: list[tuple[int, str, Callable[[random.Random], tuple[str, bytes]], Callable[..., None]]] = [
            (21, "bundle", self._make_bundle_json, self._open_bundle),
            (8, "bundle", self._make_tokenizer, self._open_bundle),
            (8, "bundle", self._make_bundle_file, self._open_bundle),
            (14, "manifest", self._make_csv, self._read_manifest),
            (12, "manifest", self._make_jsonl, self._read_manifest),
            (14, "records", self._make_records, self._read_records),
            (8, "pairs", self._make_pairs, self._read_pairs),
            (8, "checkpoint", self._make_checkpoint, self._open_checkpoint),
            (7, "adapter", self._make_adapter, self._open_adapter),
        ]

    def make(self, seed: int) -> tuple[str, bytes]:
        """Name (``door-file``) and content of the mutant of ``seed``."""
        rng = random.Random(f"structured {seed}")
        _, door, make, _ = rng.choices(self._doors, [each[0] for each in self._doors])[0]
        file, content = make(rng)
        return f"{door}-{file}", content

    def run(self, seed: int, name: str, content: bytes) -> None:
        """Put the mutant in place and open it. Raises what the doors raise."""
        door, _, file = name.partition("-")
        here = self._folder / f"{os.getpid()}"
        here.mkdir(exist_ok=True)
        try:
            open_door = next(each[3] for each in self._doors if each[1] == door)
            open_door(here, file, content, random.Random(f"open {seed}"))
        finally:
            shutil.rmtree(here)

    def _make_bundle_json(self, rng: random.Random) -> tuple[str, bytes]:
        content = (self._bundle / "bundle.json").read_bytes()
        if rng.random() < 0.1:
            return "bundle.json", mutate(content, [content], rng)
        manifest = json.loads(content)
        changed = mutate_json({name: value for name, value in manifest.items() if name != "files"}, rng)
        if isinstance(changed, dict):
            changed["files"] = manifest["files"] if rng.random() < 0.9 else mutate_json(manifest["files"], rng)
        return "bundle.json", to_bytes(changed, rng)

    def _make_tokenizer(self, rng: random.Random) -> tuple[str, bytes]:
        return "tokenizer.json", _json_file(self._bundle / "tokenizer.json", rng)

    def _make_bundle_file(self, rng: random.Random) -> tuple[str, bytes]:
        files = sorted(path for path in self._bundle.iterdir() if path.suffix in (".onnx", ".bin", ".data"))
        # Graphs more often than weights: any weights are some weights.
        path = rng.choice([path for path in files if path.suffix == ".onnx"] if rng.random() < 0.8 else files)
        content = path.read_bytes()
        changed = mutate(content[: 1 << 18], [b"\0" * 64], rng) + content[1 << 18 :]
        return path.name, changed

    def _open_bundle(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        bundle = here / "bundle"
        bundle.mkdir()
        for path in self._bundle.iterdir():
            if path.name not in (file, "bundle.json"):
                os.link(path, bundle / path.name)
        if file != "bundle.json":
            (bundle / file).write_bytes(content)
            manifest = json.loads((self._bundle / "bundle.json").read_bytes())
            # A liar's hashes are right.
            manifest["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            content = json.dumps(manifest).encode()
        (bundle / "bundle.json").write_bytes(content)
        captioner = Captioner.load(bundle, "cpu", 1)
        if file.endswith((".onnx", ".data", ".bin")) or rng.random() < 0.3:
            frames = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3), np.uint8)
            sound = {} if captioner.manifest.pipeline.sound is None else {"waveform": np.ones(8000, np.float32) / 9}
            captioner.caption(frames=frames, **sound, sample_rate=16_000, decoding=Decoding(max_new_tokens=2))  # type: ignore[arg-type]

    def _make_csv(self, rng: random.Random) -> tuple[str, bytes]:
        head = rng.choice(
            ("file,prompt,start,end,id", "video,start", "path", "file,other,id", "file;prompt", "", "file")
        )
        cells = (
            "a.mp4",
            '"a,b.mp4"',
            "",
            "1",
            "0.5",
            "-1",
            "nan",
            "1e400",
            '"',
            "x\0",
            "ü",
            "\ud800",
            '"two\nlines"',
            "1,",
        )
        rows = [",".join(rng.choice(cells) for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(6))]
        content = rng.choice(("\n", "\n", "\r\n", "\r")).join([head, *rows]).encode("utf-8", "surrogatepass")
        return "list.csv", mutate(content, [content, b"\xef\xbb\xbf"], rng) if rng.random() < 0.7 else content

    def _make_jsonl(self, rng: random.Random) -> tuple[str, bytes]:
        row = {"file": "a.mp4", "prompt": "What?", "start": 0.5, "end": 2, "id": "one", "more": {"a": [1]}}
        content = b"\n".join(to_bytes(mutate_json(row, rng), rng) for _ in range(rng.randrange(1, 5)))
        return "list.jsonl", mutate(content, [content], rng) if rng.random() < 0.4 else content

    def _read_manifest(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        path = here / file
        path.write_bytes(content)
        for entry in read_inputs([path]):
            assert isinstance(entry.id, str)

    def _make_records(self, rng: random.Random) -> tuple[str, bytes]:
        settings = Settings(_SETTINGS).record
        lines = []
        for number in range(rng.randrange(1, 5)):
            record = {"id": f"item{number}", "file": f"{number}.mp4", "size": 9, "mtime_ns": 8, "sha256": "0" * 64}
            record |= (
                {"text": "A dog.", "tokens": 3} if rng.random() < 0.7 else {"error": {"kind": "media", "reason": "x"}}
            )
            record |= {"start": 0.0, "end": 1.0, "part_of": "item0", "segments": 3} if rng.random() < 0.3 else {}
            record |= settings
            changed = mutate_json(record, rng) if rng.random() < 0.6 else record
            lines.append(to_bytes(changed, rng).replace(b"\n", b" "))
        content = b"\n".join(lines) + b"\n"
        return "out.jsonl", mutate(content, [content, bytes(600)], rng) if rng.random() < 0.5 else content

    def _read_records(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        path = here / file
        path.write_bytes(content)
        flag = rng.choice(("", "", "overwrite", "retry_failed"))
        with RecordFile(path, Settings(_SETTINGS), **({flag: True} if flag else {})) as records:  # type: ignore[arg-type]
            for known in list(records.known):
                records.read(known)
                records.captioned_like(("0" * 64, None, None, None))
            records.append({"id": "new", "file": "new.mp4", "text": "A cat."})
            records.finish(["item1", "item0", "new"], ["item0"])
            assert records.read("new")["text"] == "A cat."

    def _make_pairs(self, rng: random.Random) -> tuple[str, bytes]:
        scores = {"factuality": 0.9, "fluency": 0.5, "consistency": 0.4, "total": 1.8}
        texts = [{"text": text, "origins": ["greedy"], "scores": scores} for text in ("A dog.", "A cat.")]
        texts[1]["scores"] = {**scores, "factuality": 0.1, "total": 1.0}
        record = {"key": "k", "source": "a.mp4", "candidates": texts, "chosen": "A dog.", "rejected": "A cat."}
        record |= {"gap": 0.8, "kept": True, **Settings(_SETTINGS).record}
        lines = [to_bytes(mutate_json(record, rng), rng).replace(b"\n", b" ") for _ in range(rng.randrange(1, 4))]
        content = b"\n".join(lines) + b"\n"
        return "pairs.jsonl", mutate(content, [content], rng) if rng.random() < 0.3 else content

    def _read_pairs(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        from intertitle.align.preference.pairs import read_pairs

        path = here / file
        path.write_bytes(content)
        list(read_pairs(path, rng.choice((None, 0.5))))

    def _make_checkpoint(self, rng: random.Random) -> tuple[str, bytes]:
        files = (
            "config.json",
            "tokenizer_config.json",
            "tokenizer.json",
            "special_tokens_map.json",
            "model.safetensors",
        )
        file = rng.choice((*files, "config.json", "tiny-siglip/config.json", "tiny-siglip/preprocessor_config.json"))
        return file.replace("/", "+"), self._changed(_BASE / file, rng)

    def _make_adapter(self, rng: random.Random) -> tuple[str, bytes]:
        names = ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json")
        file = rng.choice((*names, "adapter_config.json", "adapter_model.bin"))
        if file == "adapter_model.bin":
            return file, mutate(_pickled(), [b"\0" * 64], rng)
        return file, self._changed(_ADAPTER / file, rng)

    def _changed(self, path: Path, rng: random.Random) -> bytes:
        if path.suffix == ".json":
            return _json_file(path, rng)
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            return mutate(content, [b"\0" * 64], rng)
        size = int.from_bytes(content[:8], "little")
        head, rest = content[8 : 8 + size], content[8 + size :]
        if rng.random() < 0.7:
            head = to_bytes(mutate_json(json.loads(head), rng), rng)
            return len(head).to_bytes(8, "little") + head + rest
        return mutate(content[: 8 + size], [b"\0" * 64], rng) + rest

    def _open_checkpoint(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        from intertitle.export.tokenizer import collect_tokenizer
        from intertitle.models import open_checkpoint

        folder = _copy(_BASE, here / "checkpoint", file.replace("+", "/"), content)
        collect_tokenizer(folder)
        open_checkpoint(folder)

    def _open_adapter(self, here: Path, file: str, content: bytes, rng: random.Random) -> None:
        from intertitle.models import open_checkpoint

        folder = _copy(_ADAPTER, here / "adapter", file, content)
        if file == "adapter_model.bin":
            (folder / "adapter_model.safetensors").unlink()
        open_checkpoint(_ADAPTED, folder)


def _json_file(path: Path, rng: random.Random) -> bytes:
    content = path.read_bytes()
    if rng.random() < 0.15:
        return mutate(content, [content], rng)
    return to_bytes(mutate_json(json.loads(content), rng), rng)


def _pickled() -> bytes:
    import torch

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.zeros(4, 64), f"{prefix}.lora_B.weight": torch.zeros(64, 4)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _copy(source: Path, target: Path, changed: str, content: bytes) -> Path:
    """``source`` with one file changed; the others are links to it."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and str(name) != changed and path.name != "expected.npz":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(path)
    (target / changed).parent.mkdir(parents=True, exist_ok=True)
    (target / changed).write_bytes(content)
    return target
