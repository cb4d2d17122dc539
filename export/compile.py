"""Checkpoint to bundle."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..calibration.recipe import make_recipe
from ..contract.formats import Rule, block_size_of
from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models.config import CaptionerConfig, VisionConfig
from ..models.connectors import SpatialTemporalConnector
from ..models.vision import VisionTower
from ..runtime import bundle as schema
from ..runtime.preprocess.image import ImageSpec
from ..runtime.text import PromptSpec
from .components import ComponentGraph, captioner_parts, component_graph, vision_signature
from .dialects.fused import read_fused
from .graph_writer import DataFile, WeightReader, payload_size, serialize, write_weights
from .selection import SHORTLIST, Selection, selection_signature
from .targets import Target, get_target, matmul_dtype
from .tokenizer import collect_tokenizer
from .writer import BundleWriter

#: ``(what is being done, bytes done, bytes in all)``; bytes in all are 0 until every component is traced.
Progress = Callable[[str, int, int], None]

#: The sound that the audio tower hears at once (docs/facts.md 1.4).
_SAMPLE_RATE, _SOUND_SECONDS = 16000, 30

#: AuroraCap's ratios of merging that are compiled unless others are asked for. Each further one took 40 s of tracing
#: at the released size (32 layers, 378 pixels, 2 busy cores); the weights are there once.
DEFAULT_RATIOS = (1.0, 0.5, 0.25, 0.1)

_EMBEDDING_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_EMBEDDING_ROWS = 8192


@dataclass(frozen=True)
class CompileResult:
    """Where the bundle is and what each part of it weighs in bytes: the components, ``embedding``, ``tokenizer``."""

    path: Path
    manifest: schema.Manifest
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
    visual_tokens: float | Sequence[float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a checkpoint in its released layout into a bundle.

    ``adapter``: a LoRA adapter (PEFT layout), merged in fp32. ``weights``: the decoder's format, the target's default
    when ``None``, and ``encoder_weights`` that of vision, connector and audio; ``block_size``: int4 weights that share
    a scale (larger: faster, coarser, and a caption may come out otherwise in a batch than alone). ``visual_tokens``:
    the ratio of visual tokens that AuroraCap's merging keeps, or several of which the first is the default at run time
    (``DEFAULT_RATIOS`` when ``None``); they share the weights. ``overwrite``: replace a bundle that is there already.
    The bundle appears under ``output`` whole or not at all. Raises ``CheckpointError``, ``OptionError`` or
    ``TargetError``, and ``IntertitleError`` for a full disk.
    """
    record = get_target(target)
    weights, encoders = record.check_weights(weights, encoder_weights)
    block_size = record.check_block_size(weights, block_size)
    BundleWriter(output, overwrite=overwrite).check_place()
    report = progress or (lambda *_: None)
    report("reading the checkpoint", 0, 0)
    source, towers = _open(Path(checkpoint), None if adapter is None else Path(adapter), visual_tokens)
    record.check_heads(source.config.decoder.head_dim)
    tokenizer = collect_tokenizer(source.path).to_str().encode()
    visual, tokens_per_frame = _visual_spec(source, towers)
    recipe = make_recipe(source, record, weights, encoders, block_size)
    graphs: list[ComponentGraph] = []
    for part in captioner_parts(source, tokens_per_frame, matmul_dtype(record, weights)):
        report(f"tracing {part.name}", 0, 0)
        form = weights if part.name == "decoder" else encoders
        graphs.append(component_graph(part.name, part.module, part.signature, record, form, part.source, recipe))
    if record.selection:
        graphs.append(_selection(source.config.decoder.vocab_size, record))
    merging: list[tuple[str, ComponentGraph]] = []
    for ratio, tower in zip(visual.ratios[1:], towers[1:], strict=True):
        report(f"tracing vision, ratio {ratio.keep:g}", 0, 0)
        graph = component_graph("vision", _tower(tower), vision_signature(tower), record, encoders, recipe=recipe)
        merging.append((ratio.graph, graph))
    embedding = source.embedding()
    total = sum(payload_size(graph.traced) for graph in graphs) + embedding.nbytes + len(tokenizer)
    total += sum(payload_size(graph.traced, shared=True) for _, graph in merging)
    with BundleWriter(output, overwrite=overwrite, expected_bytes=total) as writer:
        # First, and then let go: at the released size a gigabyte that would add to the peak of all that follows.
        report("writing embedding", 0, total)
        embedding_spec, embedding_bytes = _write_embedding(embedding, writer), embedding.nbytes
        del embedding
        components: dict[str, schema.Component] = {}
        sizes: dict[str, int] = {}
        for graph in graphs:
            before, label = writer.written, f"writing {graph.name}"
            components[graph.name] = _write_component(
                graph,
                merging if graph.name == "vision" else [],
                source,
                record,
                recipe,
                writer,
                lambda label=label: report(label, min(writer.written, total), total),
            )
            sizes[graph.name] = writer.written - before
        writer.add_bytes(schema.TOKENIZER_FILE, tokenizer)
        report("closing", total, total)
        path = writer.commit(_manifest(source, record, weights, recipe, components, embedding_spec, visual))
    sizes |= {"embedding": embedding_bytes, "tokenizer": len(tokenizer)}
    manifest = schema.parse_manifest((path / schema.MANIFEST_FILE).read_bytes(), str(path))
    return CompileResult(path, manifest, sizes)


def _open(
    path: Path, adapter: Path | None, visual_tokens: float | Sequence[float] | None
) -> tuple[CaptionerCheckpoint, list[VisionConfig]]:
    """The checkpoint, and its tower with each of the asked ratios of merging (one where it does not merge)."""
    asked = (visual_tokens,) if isinstance(visual_tokens, float | int) else visual_tokens
    if asked is not None and not asked:
        raise OptionError("no ratio of visual tokens was given")
    source = open_checkpoint(path, adapter, None if asked is None else asked[0])
    if source.config.vision.keep is None:
        for ratio in asked or ():
            open_checkpoint(path, adapter, ratio)  # refuses it
        return source, [source.config.vision]
    ratios = DEFAULT_RATIOS if asked is None else asked
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise OptionError(f"the ratio of visual tokens must be above 0 and at most 1, not {ratio:g}")
    return source, [replace(source.config.vision, keep=float(ratio)) for ratio in dict.fromkeys(ratios)]


def _selection(vocab_size: int, target: Target) -> ComponentGraph:
    module = Selection(min(SHORTLIST, vocab_size))
    return component_graph("selection", module, selection_signature(vocab_size), target, "fp32")


def _tower(config: VisionConfig) -> VisionTower:
    with torch.device("meta"):
        return VisionTower(config).eval().requires_grad_(False)


def _visual_spec(source: CaptionerCheckpoint, towers: Sequence[VisionConfig]) -> tuple[schema.VisualSpec, int]:
    """What the connector gives for a clip, and the tokens that leave the (first) tower for one frame.

    Found by running the modules on the meta device, so that no connector and no token merging needs a formula.
    """
    spec, connector = source.config.connector, source.module("connector")
    with torch.no_grad(), torch.device("meta"):
        per_frame = [_tower(tower)(torch.zeros(1, 3, tower.image_size, tower.image_size)).shape[1] for tower in towers]
        clip = torch.zeros(spec.num_frames, per_frame[0], spec.in_size)
        blocks, tokens = connector.to("meta")(clip).shape[:2]
    windows = isinstance(connector, SpatialTemporalConnector)
    ratios = [
        schema.MergingRatio(
            keep=tower.keep, graph=f"vision.keep{tower.keep}.onnx" if index else "vision.onnx", tokens_per_block=count
        )
        for index, (tower, count) in enumerate(zip(towers, per_frame, strict=True))
        if tower.keep is not None
    ]
    visual = schema.VisualSpec(
        blocks=blocks,
        tokens_per_block=tokens,
        per_frame=spec.per_frame,
        pooled=not spec.per_frame and not windows,
        time_kernel=connector.time_kernel if windows else 1,
        time_padding=connector.time_padding if windows else 0,
        ratios=ratios,
    )
    return visual, per_frame[0]


def _write_component(
    graph: ComponentGraph,
    further: Sequence[tuple[str, ComponentGraph]],
    source: CaptionerCheckpoint,
    target: Target,
    recipe: Sequence[Rule],
    writer: BundleWriter,
    report: Callable[[], None],
) -> schema.Component:
    """One component; ``further`` graphs of the same weights go beside it, by the names of their files."""
    graph_file = target.forms.graph_file(graph.name)
    data_file = f"{graph_file}.data" if payload_size(graph.traced) else None
    reader = WeightReader(read_fused(lambda entry: source.tensor(graph.source, entry)), graph.stored)
    files, held = [(graph_file, graph), *further], DataFile()
    report()
    if data_file is not None:
        with writer.create(data_file) as file:
            for _, each in files:
                for _ in write_weights(each.traced, file, data_file, reader, held):
                    report()
    for name, each in files:
        writer.add_bytes(name, serialize(each.traced))
    return schema.Component(
        graph=graph_file,
        data=data_file,
        weights=graph.weights,
        block_size=block_size_of(recipe, graph.source),
        parameters=graph.parameters,
        inputs=[_tensor_spec(value) for value in graph.traced.model.graph.inputs],
        outputs=[_tensor_spec(value) for value in graph.traced.model.graph.outputs],
    )


def _tensor_spec(value) -> schema.TensorSpec:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return schema.TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _write_embedding(embedding: Tensor, writer: BundleWriter) -> schema.Embedding:
    name = "embedding.bin"
    with writer.create(name) as file:
        for start in range(0, len(embedding), _EMBEDDING_ROWS):
            rows = embedding[start : start + _EMBEDDING_ROWS].contiguous()
            file.write(rows.view(torch.uint8).numpy().reshape(-1).data)
    return schema.Embedding(name, _EMBEDDING_DTYPES[embedding.dtype], (embedding.shape[0], embedding.shape[1]))


def _manifest(
    source: CaptionerCheckpoint,
    target: Target,
    weights: str,
    recipe: list[Rule],
    components: dict[str, schema.Component],
    embedding: schema.Embedding,
    visual: schema.VisualSpec,
) -> schema.Manifest:
    config, decoder = source.config, source.config.decoder
    return schema.Manifest(
        name=source.path.resolve().name,
        family=config.family,
        target=target.name,
        dialect=target.dialect,
        weights=weights,
        recipe=recipe,
        components=components,
        embedding=embedding,
        decoder=schema.DecoderSpec(
            num_layers=decoder.num_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            context_length=decoder.context_length,
        ),
        preprocessing=_preprocessing(config),
        prompts={mode: PromptSpec(**asdict(template)) for mode, template in config.prompts.items()},
        default_instruction=config.default_instruction,
        generation=schema.GenerationSpec(**asdict(config.generation)),
        visual=visual,
        provenance=_provenance(source),
    )


def _preprocessing(config: CaptionerConfig) -> schema.Preprocessing:
    audio = config.audio and schema.AudioSpec(
        sample_rate=_SAMPLE_RATE,
        num_samples=_SAMPLE_RATE * _SOUND_SECONDS,
        num_mel_bins=config.audio.num_mel_bins,
        num_frames=config.audio.num_frames,
        num_tokens=config.audio.num_tokens,
    )
    return schema.Preprocessing(
        num_frames=config.num_frames,
        frame_rule=config.frame_rule,
        image=ImageSpec(**asdict(config.image)),
        audio=audio,
    )


def _provenance(source: CaptionerCheckpoint) -> schema.Provenance:
    tools = {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")}
    tools["python"] = platform.python_version()
    return schema.Provenance(
        checkpoint=source.path.resolve().name,
        checkpoint_sha256=source.checkpoint.fingerprint(),
        adapter=source.adapter.path.resolve().name if source.adapter else None,
        adapter_sha256=source.adapter.fingerprint() if source.adapter else None,
        intertitle=__version__,
        tools=tools,
    )
