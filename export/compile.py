"""Checkpoint to bundle."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..calibration.recipe import make_recipe
from ..contract.dialects import graph_file
from ..contract.formats import Rule, block_size_of
from ..contract.manifest import MANIFEST_FILE, TOKENIZER_FILE, Component, Embedding, Manifest, Provenance
from ..contract.pipeline import DEFAULT_SHARES, Pipeline
from ..contract.records import TensorSpec
from ..contract.targets import Target, get_target
from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models.stages import measured
from ..runtime.bundle import parse_manifest
from ..runtime.viewing import Share
from .components import ComponentGraph, captioner_parts, component_graph
from .dialects.fused import read_fused
from .graph_writer import DataFile, WeightReader, payload_size, serialize, write_weights
from .selection import SHORTLIST, Selection, selection_signature
from .targets import matmul_dtype
from .tokenizer import collect_tokenizer
from .writer import BundleWriter

#: ``(what is being done, bytes done, bytes in all)``; bytes in all are 0 until every component is traced.
Progress = Callable[[str, int, int], None]

_EMBEDDING_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_EMBEDDING_ROWS = 8192


@dataclass(frozen=True)
class CompileResult:
    """Where the bundle is and what each part of it weighs in bytes: the components, ``embedding``, ``tokenizer``."""

    path: Path
    manifest: Manifest
    component_bytes: dict[str, int]


def compile_bundle(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    target: str = "cpu",
    weights: str | None = None,
    encoder_weights: str | None = None,
    block_size: int | None = None,
    visual_tokens: Share | Sequence[Share] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a checkpoint in its released layout into a bundle.

    ``adapter``: a LoRA adapter (PEFT layout), merged in fp32. ``weights``: the decoder's format, the target's default
    when ``None``, and ``encoder_weights`` that of all other components; ``block_size``: int4 weights that share a
    scale (larger: faster, coarser, and a caption may come out otherwise in a batch than alone). ``visual_tokens``:
    the share of visual tokens that AuroraCap's merging keeps, or several of which the first is the default at run time
    (``DEFAULT_SHARES`` when ``None``); they share the weights. ``overwrite``: replace a bundle that is there already.
    The bundle appears under ``output`` whole or not at all. Raises ``CheckpointError``, ``OptionError`` or
    ``TargetError``, and ``IntertitleError`` for a full disk.
    """
    record = get_target(target)
    weights, encoders = record.check_weights(weights, encoder_weights)
    block_size = record.check_block_size(weights, block_size)
    BundleWriter(output, overwrite=overwrite).check_place()
    report = progress or (lambda *_: None)
    report("reading the checkpoint", 0, 0)
    source, keeps = _open(Path(checkpoint), None if adapter is None else Path(adapter), visual_tokens)
    source = _positioned(source, record)
    tokenizer = collect_tokenizer(source.path).to_str().encode()
    pipeline = measured(source.config, keeps)
    recipe = make_recipe(source, record, weights, encoders, block_size)
    graphs: list[ComponentGraph] = []
    further: dict[str, list[tuple[str, ComponentGraph]]] = {}
    for part in captioner_parts(source, pipeline, matmul_dtype(record, weights)):
        beside = part.beside
        report(f"tracing {part.name}" if beside is None else f"tracing {part.name}, {Share(beside.keep)}", 0, 0)
        form = weights if part.name == "decoder" else encoders
        graph = component_graph(part.name, part.module, part.signature, record, form, recipe)
        if beside is None:
            graphs.append(graph)
        else:
            further.setdefault(part.name, []).append((beside.graph, graph))
    if record.selection:
        graphs.append(_selection(source.config.decoder.vocab_size, record))
    embedding = source.embedding()
    total = sum(payload_size(graph.traced) for graph in graphs) + embedding.nbytes + len(tokenizer)
    total += sum(payload_size(graph.traced, shared=True) for each in further.values() for _, graph in each)
    with BundleWriter(output, overwrite=overwrite, expected_bytes=total) as writer:
        # First, and then let go: at the released size a gigabyte that would add to the peak of all that follows.
        report("writing embedding", 0, total)
        embedding_spec, embedding_bytes = _write_embedding(embedding, writer), embedding.nbytes
        del embedding
        components: dict[str, Component] = {}
        sizes: dict[str, int] = {}
        for graph in graphs:
            before, label = writer.written, f"writing {graph.name}"
            components[graph.name] = _write_component(
                graph,
                further.get(graph.name, []),
                source,
                record,
                recipe,
                writer,
                lambda label=label: report(label, min(writer.written, total), total),
            )
            sizes[graph.name] = writer.written - before
        writer.add_bytes(TOKENIZER_FILE, tokenizer)
        report("closing", total, total)
        path = writer.commit(_manifest(source, record, weights, recipe, components, embedding_spec, pipeline))
    sizes |= {"embedding": embedding_bytes, "tokenizer": len(tokenizer)}
    manifest = parse_manifest((path / MANIFEST_FILE).read_bytes(), str(path))
    return CompileResult(path, manifest, sizes)


def _open(
    path: Path, adapter: Path | None, visual_tokens: Share | Sequence[Share] | None
) -> tuple[CaptionerCheckpoint, tuple[float, ...]]:
    """The checkpoint, and the shares of tokens that its merging stage is compiled for (none where it has no such)."""
    shares = visual_tokens if isinstance(visual_tokens, Sequence) or visual_tokens is None else (visual_tokens,)
    if shares is not None and not shares:
        raise OptionError("no share of visual tokens was given")
    for share in shares or ():
        if not isinstance(share, Share):
            raise OptionError(f"a bundle holds shares of visual tokens, such as Share(0.5), not {share!r}")
    asked = None if shares is None else [share.ratio for share in shares]
    source = open_checkpoint(path, adapter, None if asked is None else asked[0])
    for share in asked or ():
        source.config.keeping(share)  # refuses what cannot be
    if source.config.merging is None:
        return source, ()
    return source, tuple(dict.fromkeys(float(share) for share in (DEFAULT_SHARES if asked is None else asked)))


def _positioned(source: CaptionerCheckpoint, target: Target) -> CaptionerCheckpoint:
    """The checkpoint with a decoder that learns positions as the target needs it."""
    decoder = source.config.decoder
    positions = target.positions(decoder.positions, decoder.head_dim)
    if positions == decoder.positions:
        return source
    config = replace(source.config, decoder=replace(decoder, positions=positions))
    return CaptionerCheckpoint(source.checkpoint, config, source.adapter)


def _selection(vocab_size: int, target: Target) -> ComponentGraph:
    module = Selection(min(SHORTLIST, vocab_size))
    return component_graph("selection", module, selection_signature(vocab_size), target, "fp32")


def _write_component(
    graph: ComponentGraph,
    further: Sequence[tuple[str, ComponentGraph]],
    source: CaptionerCheckpoint,
    target: Target,
    recipe: Sequence[Rule],
    writer: BundleWriter,
    report: Callable[[], None],
) -> Component:
    """One component; ``further`` graphs of the same weights go beside it, by the names of their files."""
    file_name = graph_file(graph.name, target.dialect)
    data_file = f"{file_name}.data" if payload_size(graph.traced) else None
    reader = WeightReader(read_fused(lambda entry: source.tensor(graph.name, entry)), graph.stored)
    files, held = [(file_name, graph), *further], DataFile()
    report()
    if data_file is not None:
        with writer.create(data_file) as file:
            for _, each in files:
                for _ in write_weights(each.traced, file, data_file, reader, held):
                    report()
    for name, each in files:
        writer.add_bytes(name, serialize(each.traced))
    return Component(
        graph=file_name,
        data=data_file,
        weights=graph.weights,
        block_size=block_size_of(recipe, graph.name),
        parameters=graph.parameters,
        inputs=[_tensor_spec(value) for value in graph.traced.model.graph.inputs],
        outputs=[_tensor_spec(value) for value in graph.traced.model.graph.outputs],
    )


def _tensor_spec(value) -> TensorSpec:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _write_embedding(embedding: Tensor, writer: BundleWriter) -> Embedding:
    name = "embedding.bin"
    with writer.create(name) as file:
        for start in range(0, len(embedding), _EMBEDDING_ROWS):
            rows = embedding[start : start + _EMBEDDING_ROWS].contiguous()
            file.write(rows.view(torch.uint8).numpy().reshape(-1).data)
    return Embedding(name, _EMBEDDING_DTYPES[embedding.dtype], (embedding.shape[0], embedding.shape[1]))


def _manifest(
    source: CaptionerCheckpoint,
    target: Target,
    weights: str,
    recipe: list[Rule],
    components: dict[str, Component],
    embedding: Embedding,
    pipeline: Pipeline,
) -> Manifest:
    config = source.config
    return Manifest(
        name=source.path.resolve().name,
        family=config.family,
        target=target.name,
        dialect=target.dialect,
        weights=weights,
        recipe=recipe,
        components=components,
        embedding=embedding,
        decoder=config.decoder.shape,
        pipeline=pipeline,
        default_instruction=config.default_instruction,
        generation=config.generation,
        provenance=_provenance(source),
    )


def _provenance(source: CaptionerCheckpoint) -> Provenance:
    tools = {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")}
    tools["python"] = platform.python_version()
    return Provenance(
        checkpoint=source.path.resolve().name,
        checkpoint_sha256=source.checkpoint.fingerprint(),
        adapter=source.adapter.path.resolve().name if source.adapter else None,
        adapter_sha256=source.adapter.fingerprint() if source.adapter else None,
        intertitle=__version__,
        tools=tools,
    )
