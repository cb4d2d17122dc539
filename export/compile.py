"""Checkpoint to bundle."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..errors import OptionError
from ..models import CaptionerCheckpoint, open_checkpoint
from ..models.config import CaptionerConfig
from ..runtime import bundle as schema
from ..runtime.preprocess.image import ImageSpec
from ..runtime.text import PromptSpec
from .components import (
    ComponentGraph,
    audio_signature,
    component_graph,
    connector_signature,
    decoder_signature,
    vision_signature,
)
from .graph_writer import WeightReader, payload_size, serialize, write_weights
from .targets import Target, get_target
from .tokenizer import collect_tokenizer
from .trace import Signature
from .writer import BundleWriter

#: ``(what is being done, bytes done, bytes in all)``; bytes in all are 0 until every component is traced.
Progress = Callable[[str, int, int], None]

#: The sound that the audio tower hears at once (FACTS 1.4).
_SAMPLE_RATE, _SOUND_SECONDS = 16000, 30

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
    visual_tokens: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a checkpoint in its released layout into a bundle.

    ``adapter``: a LoRA adapter (PEFT layout), merged in fp32. ``weights``: the decoder's format, the target's default
    when ``None``. ``visual_tokens``: the ratio of visual tokens that AuroraCap's merging keeps. ``overwrite``: replace
    a bundle that is there already. The bundle appears under ``output`` whole or not at all. Raises
    ``CheckpointError``, ``OptionError`` or ``TargetError``, and ``IntertitleError`` for a full disk.
    """
    record = get_target(target)
    weights = record.decoder_weights[0] if weights is None else weights
    if weights not in record.decoder_weights:
        raise OptionError(f"target '{target}' takes weights {' or '.join(record.decoder_weights)}, not '{weights}'")
    BundleWriter(output, overwrite=overwrite).check_place()
    report = progress or (lambda *_: None)
    report("reading the checkpoint", 0, 0)
    source = open_checkpoint(Path(checkpoint), None if adapter is None else Path(adapter), visual_tokens)
    tokenizer = collect_tokenizer(source.path).to_str().encode()
    shapes = _visual_shapes(source)
    graphs = []
    for name, signature in _signatures(source.config, shapes).items():
        report(f"tracing {name}", 0, 0)
        form = weights if name == "decoder" else "fp32"
        graphs.append(component_graph(name, source.module(name), signature, record, form))
    embedding = source.embedding()
    total = sum(payload_size(graph.traced) for graph in graphs) + embedding.nbytes + len(tokenizer)
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
                graph, source, record, writer, lambda label=label: report(label, min(writer.written, total), total)
            )
            sizes[graph.name] = writer.written - before
        writer.add_bytes(schema.TOKENIZER_FILE, tokenizer)
        report("closing", total, total)
        path = writer.commit(_manifest(source, record, weights, components, embedding_spec, shapes))
    sizes |= {"embedding": embedding_bytes, "tokenizer": len(tokenizer)}
    manifest = schema.parse_manifest((path / schema.MANIFEST_FILE).read_bytes(), str(path))
    return CompileResult(path, manifest, sizes)


@dataclass(frozen=True)
class _VisualShapes:
    """Tokens that leave the tower for one frame; blocks, and tokens per block, that the connector makes of a clip."""

    per_frame: int
    blocks: int
    per_block: int


def _visual_shapes(source: CaptionerCheckpoint) -> _VisualShapes:
    """Found by running the modules on the meta device, so that no connector and no token merging needs a formula."""
    vision, connector = source.config.vision, source.config.connector
    with torch.no_grad(), torch.device("meta"):
        features = source.module("vision").to("meta")(torch.zeros(1, 3, vision.image_size, vision.image_size))
        clip = torch.zeros(connector.num_frames, features.shape[1], connector.in_size)
        tokens = source.module("connector").to("meta")(clip)
    return _VisualShapes(features.shape[1], tokens.shape[0], tokens.shape[1])


def _signatures(config: CaptionerConfig, shapes: _VisualShapes) -> dict[str, Signature]:
    """By component, in the order in which data passes them."""
    signatures = {
        "vision": vision_signature(config.vision),
        "connector": connector_signature(config.connector, shapes.per_frame),
    }
    if config.audio is not None:
        signatures["audio"] = audio_signature(config.audio)
    return signatures | {"decoder": decoder_signature(config.decoder)}


def _write_component(
    graph: ComponentGraph,
    source: CaptionerCheckpoint,
    target: Target,
    writer: BundleWriter,
    report: Callable[[], None],
) -> schema.Component:
    graph_file = f"decoder.{target.dialect}.onnx" if graph.name == "decoder" else f"{graph.name}.onnx"
    data_file = f"{graph_file}.data"
    reader = WeightReader(lambda entry: source.tensor(graph.name, entry), target.block_size)
    report()
    with writer.create(data_file) as file:
        for _ in write_weights(graph.traced, file, data_file, reader):
            report()
    writer.add_bytes(graph_file, serialize(graph.traced))
    return schema.Component(
        graph=graph_file,
        data=data_file,
        weights=graph.weights,
        block_size=target.block_size if graph.weights == "int4" else None,
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
    components: dict[str, schema.Component],
    embedding: schema.Embedding,
    shapes: _VisualShapes,
) -> schema.Manifest:
    config, decoder = source.config, source.config.decoder
    return schema.Manifest(
        name=source.path.resolve().name,
        family=config.family,
        target=target.name,
        dialect=target.dialect,
        weights=weights,
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
        visual=schema.VisualSpec(
            blocks=shapes.blocks,
            tokens_per_block=shapes.per_block,
            per_frame=config.connector.per_frame,
            keep=config.vision.keep,
        ),
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
