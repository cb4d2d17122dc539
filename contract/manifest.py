"""``bundle.json``: the schema of a compiled captioner."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from .formats import FormatName, Rule
from .pipeline import Pipeline
from .records import DecoderShape, Generation, Name, NonNegative, Positive, Record, Sha256, TensorSpec

SCHEMA_VERSION = 3
MANIFEST_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"


class Component(Record, frozen=True, kw_only=True):
    """One graph. ``data`` is its external data, ``block_size`` the weights that share a scale, if quantized."""

    graph: str
    data: str | None = None
    weights: FormatName
    block_size: Positive | None = None
    parameters: NonNegative
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Embedding(Record, frozen=True):
    """The table of token embeddings ``[V or more, H]``: a raw file, row by row, little-endian.

    Rows behind the vocabulary are learned vectors that a prompt may hold and no caption: see ``pipeline.Ids``.
    """

    file: str
    dtype: Annotated[str, Meta(pattern="^(float32|float16|bfloat16)$")]
    shape: tuple[Positive, Positive]


class Provenance(Record, frozen=True, kw_only=True):
    """What the bundle was made from, and with what."""

    checkpoint: str
    checkpoint_sha256: Sha256
    adapter: str | None = None
    adapter_sha256: Sha256 | None = None
    intertitle: str
    tools: dict[str, str]


class FileRecord(Record, frozen=True):
    """A file of the bundle, ``bundle.json`` itself aside."""

    sha256: Sha256
    size: NonNegative


class Manifest(Record, frozen=True, kw_only=True):
    """``bundle.json``. ``files`` is filled in by the writer; every file must have a role in the other fields.

    ``components`` has those of the pipeline's stages, by their names, ``decoder``, and where candidates are found on
    the device ``selection``. ``weights`` is the format of the decoder, ``recipe`` the format of each linear layer. The
    recipe is empty in bundles of schema version 2, which have the default one.
    """

    schema_version: int = SCHEMA_VERSION
    name: Name
    family: Name
    target: Name
    dialect: Name
    weights: FormatName
    recipe: list[Rule] = field(default_factory=list)
    components: dict[str, Component]
    embedding: Embedding
    decoder: DecoderShape
    pipeline: Pipeline
    default_instruction: str
    generation: Generation
    provenance: Provenance
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def shortlist(self) -> int:
        """Tokens of each row that the component ``selection`` gives; 0 without it."""
        selection = self.components.get("selection")
        size = next((value.shape[-1] for value in selection.outputs if value.name == "ids"), 0) if selection else 0
        return size if isinstance(size, int) else 0

    @property
    def cache_dtype(self) -> str:
        """Of the decoder's keys and values."""
        inputs = self.components["decoder"].inputs
        return next((value.dtype for value in inputs if value.name.startswith("past.")), "float32")

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values for one token."""
        decoder, size = self.decoder, 4 if self.cache_dtype == "float32" else 2
        return 2 * size * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
