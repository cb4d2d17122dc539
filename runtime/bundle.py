"""A compiled captioner on disk: opening a bundle without trusting it (the schema is ``contract.manifest``).

A bundle is a directory of plain files, every one of them named by ``bundle.json`` with its size and sha256. See
``ARCHITECTURE.md``, "Bundle". Shapes: V vocabulary, H decoder width.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..contract.dialects import graph_file
from ..contract.formats import block_size_problem
from ..contract.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TOKENIZER_FILE,
    Component,
    Embedding,
    FileRecord,
    Manifest,
)
from ..contract.migration import MIGRATIONS
from ..errors import BundleError
from . import integrity
from .graph_check import MOST_GRAPH_BYTES, check_graph
from .integrity import FileState, Progress
from .manifest_check import pipeline_problem, signature_problem, size_problem

_MAX_MANIFEST_BYTES = 16 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


class _Version(msgspec.Struct):
    schema_version: int


class Bundle:
    """An opened bundle; every file of it is the one that ``bundle.json`` describes."""

    def __init__(self, path: Path, manifest: Manifest, sha256: str, states: Mapping[str, FileState]) -> None:
        """Use ``Bundle.open``."""
        self.path = path
        self._states = states
        self.manifest = manifest
        self.sha256 = sha256
        """sha256 of ``bundle.json``, and so of everything in the bundle."""
        shape = manifest.embedding.shape
        table = np.memmap(path / manifest.embedding.file, _stored_dtype(manifest.embedding), "r", shape=shape)
        self._rows = np.asarray(table)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: Literal["auto", "full", "sizes"] = "auto",
        progress: Progress | None = None,
    ) -> Bundle:
        """Check a bundle and open it.

        ``verify``: ``"full"`` hashes every file. ``"auto"`` hashes those not hashed before by this user, or changed
        since (by inode, size, modification and status change time; ``integrity`` says what that cannot notice).
        Both look into graphs that they have not seen before (``graph_check``). ``"sizes"``: names and sizes only.
        ``progress(done, total)`` counts the bytes hashed. Raises ``BundleError``, one line, for anything but a whole
        and unaltered bundle of a schema version that is known.
        """
        directory = Path(path)
        manifest_bytes = _read_manifest(directory)
        manifest = parse_manifest(manifest_bytes, str(directory / MANIFEST_FILE))
        sha256 = hashlib.sha256(manifest_bytes).hexdigest()
        states = _scan(directory, manifest.files)
        if verify != "sizes":
            known = integrity.remembered(directory, sha256) if verify == "auto" else {}
            unknown = [name for name, state in states.items() if known.get(name) != state]
            if unknown:
                settled = {name: state for name, state in states.items() if state.settled}
                digests = integrity.hash_files(directory, states, unknown, progress)
                wrong = sorted(name for name in unknown if digests[name] != manifest.files[name].sha256)
                if wrong:
                    raise BundleError(f"{directory}: {_listed(wrong)} differs from its sha256 in {MANIFEST_FILE}")
                for graph, component in _graphs(manifest):
                    _check_graph(directory, manifest, graph, component)
                integrity.remember(directory, sha256, settled)
        try:
            return cls(directory, manifest, sha256, states)
        except (OSError, ValueError) as error:
            raise BundleError(f"{directory}: '{manifest.embedding.file}' cannot be mapped: {error}") from error

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, to be opened at once.

        ``BundleError`` for a name that ``bundle.json`` does not have, and when any file of the bundle is no longer the
        one that was verified (by device, inode, size and modification time): graphs are opened long after that.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: there is no file {name!r} in the bundle")
        for each, before in self._states.items():
            try:
                now = FileState.of((self.path / each).lstat())
            except OSError as error:
                raise BundleError(f"{self.path}: '{each}' was removed while in use: {error.strerror}") from error
            # Not the status change time: whoever links to a file or copies the bundle by links moves it.
            if (now.device, now.inode, now.size, now.mtime_ns) != (
                before.device,
                before.inode,
                before.size,
                before.mtime_ns,
            ):
                raise BundleError(f"{self.path}: '{each}' was changed after it was verified; load the bundle again")
        return self.path / name

    def embed(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Embeddings float32 ``[n, H]`` of token ids ``[n]``; ``BundleError`` for an id outside the table."""
        ids = np.asarray(token_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= len(self._rows))]
        if outside.size:
            raise BundleError(
                f"{self.path}: the embedding table has {len(self._rows)} rows, but token id {outside[0]} was asked for"
            )
        rows = self._rows[ids]
        if self.manifest.embedding.dtype == "bfloat16":
            # The upper half of a float32, so this is exact.
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in a ``bundle.json``, of this schema version or an older one, checked in itself.

    ``BundleError`` begins with ``where``.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version == SCHEMA_VERSION:
            manifest = msgspec.json.decode(data, type=Manifest)
        else:
            manifest = _migrated(data, version, where)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: not a bundle manifest: {_one_line(error)}") from error
    problem = _inconsistency(manifest)
    if problem is not None:
        raise BundleError(f"{where}: {_one_line(problem)}")
    return manifest


def _migrated(data: bytes, version: int, where: str) -> Manifest:
    if version not in MIGRATIONS:
        remedy = "use a newer intertitle" if version > SCHEMA_VERSION else "compile the checkpoint again"
        known = ", ".join(map(str, (*sorted(MIGRATIONS), SCHEMA_VERSION)))
        raise BundleError(
            f"{where}: schema version {version} is not known, this intertitle reads versions {known}; {remedy}"
        )
    found = msgspec.json.decode(data)
    try:
        while version in MIGRATIONS:
            found, version = MIGRATIONS[version](found), version + 1
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BundleError(f"{where}: not a bundle manifest: {_one_line(error)} is missing or wrong") from error
    return msgspec.convert(found, Manifest)


def is_plain_name(name: str) -> bool:
    """Whether a file of a bundle may be called so: ASCII, one path component, not hidden, not ``bundle.json``."""
    return _PLAIN_NAME.fullmatch(name) is not None and name != MANIFEST_FILE


def embedding_bytes(embedding: Embedding) -> int:
    """The size of the embedding table's file."""
    return embedding.shape[0] * embedding.shape[1] * _stored_dtype(embedding).itemsize


def _stored_dtype(embedding: Embedding) -> np.dtype[Any]:
    return np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[embedding.dtype])


def _inconsistency(manifest: Manifest) -> str | None:
    """The first thing in which a manifest contradicts itself."""
    pipeline = manifest.pipeline
    problem = pipeline_problem(manifest)
    if problem is not None:
        return problem
    names, expected = set(manifest.components), {"decoder", *(stage.name for stage in pipeline.stages)}
    if names - {"selection"} != expected:
        return f"components are {_listed(sorted(names))}, expected {_listed(sorted(expected))}"
    variants = [variant.graph for stage in pipeline.stages for variant in stage.variants[1:]]
    roles = [TOKENIZER_FILE, manifest.embedding.file, *variants]
    for name, component in manifest.components.items():
        graph = graph_file(name, manifest.dialect)
        if component.graph != graph:
            return f"the graph of component '{name}' is {component.graph!r}, expected '{graph}'"
        if component.data not in (None, f"{graph}.data"):
            return f"the data of component '{name}' is {component.data!r}, expected '{graph}.data'"
        if wrong := block_size_problem(component.weights, component.block_size):
            return f"component '{name}' has {wrong}"
        for tensors in (component.inputs, component.outputs):
            if len({tensor.name for tensor in tensors}) != len(tensors) or not tensors:
                return f"component '{name}' has no inputs or outputs, or two of one name"
        roles += [component.graph, *([component.data] if component.data else [])]
    if manifest.components["decoder"].weights != manifest.weights:
        return f"weights are {manifest.weights}, but the decoder's are {manifest.components['decoder'].weights}"

    if strange := sorted({rule.component for rule in manifest.recipe} - expected):
        return f"recipe: there is no component {_listed(strange)}"

    for name in manifest.files:
        if not is_plain_name(name):
            return f"{_quoted(name)} is not a plain file name"
    if len(set(roles)) != len(roles):
        return "two roles share one file"
    if missing := sorted(set(roles) - set(manifest.files)):
        return f"files: {_listed(missing)} is not listed"
    if unused := sorted(set(manifest.files) - set(roles)):
        return f"files: {_listed(unused)} belongs to no component"

    decoder, embedding = manifest.decoder, manifest.embedding
    if embedding.shape[0] < decoder.vocab_size or embedding.shape[1] != decoder.hidden_size:
        return f"embedding table {list(embedding.shape)} for a decoder of {decoder.vocab_size} x {decoder.hidden_size}"
    size = manifest.files[embedding.file].size
    if size != embedding_bytes(embedding):
        return (
            f"'{embedding.file}' has {size} bytes, but {embedding.dtype} {list(embedding.shape)} "
            f"takes {embedding_bytes(embedding)}"
        )
    if not all(token < decoder.vocab_size for token in manifest.generation.eos_token_ids):
        return f"an EOS token id is outside the vocabulary of {decoder.vocab_size}"
    return size_problem(manifest) or signature_problem(manifest)


def _graphs(manifest: Manifest) -> list[tuple[str, Component]]:
    """Every graph with its component, those of the variants too."""
    components = manifest.components
    variants = [
        (variant.graph, components[stage.name]) for stage in manifest.pipeline.stages for variant in stage.variants[1:]
    ]
    return [(component.graph, component) for component in components.values()] + variants


def _check_graph(directory: Path, manifest: Manifest, graph: str, component: Component) -> None:
    """``BundleError`` unless a graph is harmless and has the inputs and outputs that the manifest says."""
    try:
        if manifest.files[graph].size > MOST_GRAPH_BYTES:
            raise BundleError(f"{manifest.files[graph].size} bytes are too many for a graph without its weights")
        data = integrity.read_file(directory, graph)
        # The bytes that are looked at are those that were hashed.
        if hashlib.sha256(data).hexdigest() != manifest.files[graph].sha256:
            raise BundleError("was changed while it was read; try again")
        facts = check_graph(data, component.data, manifest.files[component.data].size if component.data else 0)
        for side, found, listed in (
            ("inputs", facts.inputs, component.inputs),
            ("outputs", facts.outputs, component.outputs),
        ):
            has = {value.name: (value.dtype, value.shape) for value in found}
            # The graphs of the variants differ from the default's in how many tokens they give.
            ranks_only = side == "outputs" and graph != component.graph
            says = {value.name: (value.dtype, value.shape) for value in listed}
            if ranks_only:
                has, says = ({name: (kind, len(shape)) for name, (kind, shape) in d.items()} for d in (has, says))
            if has != says or len(found) != len(listed):
                wrong = next((name for name in says if has.get(name) != says[name]), "another one")
                raise BundleError(f"its {side} are not those in {MANIFEST_FILE} ({_quoted(wrong)})")
    except BundleError as error:
        raise BundleError(f"{directory}: '{graph}': {error}") from None


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST_FILE
    try:
        if not directory.is_dir():
            missing = "there is no such directory" if not directory.exists() else "not a directory"
            raise BundleError(f"{directory}: {missing}; a bundle is the directory that `intertitle compile` wrote")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: not a regular file; a bundle holds no links, directories or devices")
        if status.st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: {status.st_size} bytes is too large for a bundle manifest")
        return path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{directory}: not a bundle, there is no {MANIFEST_FILE} in it") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _scan(directory: Path, files: Mapping[str, FileRecord]) -> dict[str, FileState]:
    """The states of exactly the files listed; ``BundleError`` for any other thing in the directory."""
    states = {}
    try:
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=False)
                if entry.name != MANIFEST_FILE and entry.name not in files:
                    raise BundleError(f"{directory}: {_quoted(entry.name)} is not part of the bundle; remove it")
                if not stat.S_ISREG(status.st_mode):
                    kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                    raise BundleError(f"{directory}: '{entry.name}' is {kind}; a bundle holds regular files only")
                if entry.name != MANIFEST_FILE:
                    states[entry.name] = FileState.of(status)
    except OSError as error:
        raise BundleError(f"{directory}: cannot be read: {error.strerror}") from error
    if missing := sorted(set(files) - set(states)):
        raise BundleError(f"{directory}: {_listed(missing)} is missing; the bundle is incomplete")
    for name, state in states.items():
        if state.size != files[name].size:
            raise BundleError(f"{directory}: '{name}' has {state.size} bytes, expected {files[name].size}")
    return states


def _listed(names: list[str]) -> str:
    """A few names for a message."""
    shown = ", ".join(_quoted(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _quoted(name: str) -> str:
    return f"'{_one_line(name)}'"


def _one_line(text: object) -> str:
    """Text from a file that is not trusted, fit for a terminal: no line breaks, no control characters."""
    characters = [character if character.isprintable() else "?" for character in str(text)]
    return "".join(characters[:300])
