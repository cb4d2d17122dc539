"""Checkpoint to bundle."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

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

#: ``(what is being done, bytes done, bytes in all)``; bytes in all are known once every component is traced.
Progress = Callable[[str, int, int], None]

_EMBEDDING_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_EMBEDDING_ROWS = 8192


@dataclass(frozen=True)
class CompileResult:
    """Where the bundle is and what each part of it weighs in bytes."""

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
    when ``None``. ``visual_tokens``: the ratio of visual tokens that AuroraCap's merging keeps. The bundle appears
    under ``output`` whole or not at all. Raises ``CheckpointError``, ``OptionError`` or ``TargetError``.
    """
    record = get_target(target)
    weights = weights or record.decoder_weights[0]
    if weights not in record.decoder_weights:
        raise OptionError(f"target '{target}' takes weights {' or '.join(record.decoder_weights)}, not '{weights}'")
    report = progress or (lambda *_: None)
    report("reading the checkpoint", 0, 0)
    source = open_checkpoint(Path(checkpoint), None if adapter is None else Path(adapter), visual_tokens)
    tokenizer = collect_tokenizer(source.path).to_str().encode()
    graphs = []
    for name, signature in _signatures(source).items():
        report(f"tracing {name}", 0, 0)
        form = weights if name == "decoder" else "fp32"
        graphs.append(component_graph(name, source.module(name), signature, record, form))
    # Read now only for its size: the pages of a mapped file cost no memory until they are written out below.
    embedding = source.embedding()
    embedding_bytes = embedding.numel() * embedding.element_size()
    total = sum(payload_size(graph.traced) for graph in graphs) + embedding_bytes + len(tokenizer)
    with BundleWriter(output, overwrite=overwrite, expected_bytes=total) as writer:
        done = 0
        components: dict[str, schema.Component] = {}
        sizes: dict[str, int] = {}
        for graph in graphs:
            components[graph.name], sizes[graph.name], done = _write_component(
                graph,
                source,
                record,
                writer,
                lambda count, label=graph.name: report(f"writing {label}", count, total),
                done,
            )
        report("writing embedding", done, total)
        _write_embedding(embedding, writer)
        sizes["embedding"] = embedding_bytes
        writer.add_bytes("tokenizer.json", tokenizer)
        sizes["tokenizer"] = len(tokenizer)
        report("closing", total, total)
        path = writer.commit(_manifest(source, record, weights, components, embedding))
    manifest = schema.parse_manifest((path / schema.MANIFEST_FILE).read_bytes(), str(path))
    return CompileResult(path, manifest, sizes)


def _signatures(source: CaptionerCheckpoint) -> dict[str, Signature]:
    config = source.config
    signatures = {
        "vision": vision_signature(config),
        "connector": connector_signature(config, _tokens_per_frame(source)),
        "audio": audio_signature(config) if config.audio is not None else None,
        "decoder": decoder_signature(config),
    }
    return {name: signatures[name] for name in source.components}  # type: ignore[misc]


def _tokens_per_frame(source: CaptionerCheckpoint) -> int:
    """Tokens that leave the tower for one frame; fewer than its patches where it merges them."""
    return _run_on_meta(source, "vision", (1, 3, source.config.vision.image_size, source.config.vision.image_size))[1]


def _visual_shape(source: CaptionerCheckpoint) -> tuple[int, int]:
    """Blocks and tokens per block that the connector makes of one clip."""
    connector = source.config.connector
    shape = _run_on_meta(source, "connector", (connector.num_frames, _tokens_per_frame(source), connector.in_size))
    return shape[0], shape[1]


def _run_on_meta(source: CaptionerCheckpoint, component: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad(), torch.device("meta"):
        return tuple(source.module(component).to("meta")(torch.zeros(shape)).shape)


def _write_component(
    graph: ComponentGraph,
    source: CaptionerCheckpoint,
    target: Target,
    writer: BundleWriter,
    report: Callable[[int], None],
    done: int,
) -> tuple[schema.Component, int, int]:
    stem = f"decoder.{target.dialect}" if graph.name == "decoder" else graph.name
    graph_file, data_file = f"{stem}.onnx", f"{stem}.onnx.data"
    reader = WeightReader(lambda entry: source.tensor(graph.name, entry), target.block_size)
    size = 0
    report(done)
    with writer.create(data_file) as file:
        for count in write_weights(graph.traced, file, data_file, reader):
            size += count
            report(done + size)
    proto = serialize(graph.traced)
    writer.add_bytes(graph_file, proto)
    model_graph = graph.traced.model.graph
    component = schema.Component(
        graph=graph_file,
        data=data_file,
        weights=graph.weights,  # type: ignore[arg-type]
        block_size=target.block_size if graph.weights == "int4" else None,
        parameters=graph.parameters,
        inputs=[_tensor_spec(value) for value in model_graph.inputs],
        outputs=[_tensor_spec(value) for value in model_graph.outputs],
    )
    return component, size + len(proto), done + size


def _tensor_spec(value) -> schema.TensorSpec:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return schema.TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _write_embedding(embedding: Tensor, writer: BundleWriter) -> None:
    with writer.create("embedding.bin") as file:
        for start in range(0, len(embedding), _EMBEDDING_ROWS):
            rows = embedding[start : start + _EMBEDDING_ROWS].contiguous()
            file.write(rows.view(torch.uint8).numpy().reshape(-1).data)


def _manifest(
    source: CaptionerCheckpoint,
    target: Target,
    weights: str,
    components: dict[str, schema.Component],
    embedding: Tensor,
) -> schema.Manifest:
    config, decoder = source.config, source.config.decoder
    blocks, tokens = _visual_shape(source)
    return schema.Manifest(
        name=source.path.resolve().name,
        family=config.family,
        target=target.name,
        dialect=target.dialect,
        weights=weights,  # type: ignore[arg-type]
        components=components,
        embedding=schema.Embedding(
            "embedding.bin", _EMBEDDING_DTYPES[embedding.dtype], (embedding.shape[0], embedding.shape[1])
        ),
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
            blocks=blocks,
            tokens_per_block=tokens,
            per_frame=config.connector.per_frame,
            keep=config.vision.keep,
        ),
        provenance=_provenance(source),
        files={},
    )


def _preprocessing(config: CaptionerConfig) -> schema.Preprocessing:
    audio = config.audio
    return schema.Preprocessing(
        num_frames=config.num_frames,
        frame_rule=config.frame_rule,
        image=ImageSpec(**asdict(config.image)),
        audio=None
        if audio is None
        else schema.AudioSpec(
            sample_rate=16000,
            num_samples=480000,
            num_mel_bins=audio.num_mel_bins,
            num_frames=audio.num_frames,
            num_tokens=audio.num_tokens,
        ),
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
