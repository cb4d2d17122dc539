"""An AuroraCap checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 2.4)."""

from __future__ import annotations

from ...contract.pipeline import Sampling
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import CaptionerConfig, ConnectorConfig
from ..connectors import mlp_part
from ..fields import Fields
from ..hf_config import BUILTIN_TOWERS, read_decoder, read_generation, read_image_processing, read_vision
from ..sources import mlp_kind
from ..vision import tower_part
from . import prompt, weights

KNOWN_AS = "AuroraCap (llama with visual_encoder/ and projector/)"
#: Frames of the reference's quick start; a checkpoint does not say.
NUM_FRAMES = 8
#: The longest answer in the reference's quick start (rese1f/aurora README). Its captions are detailed, of hundreds of
#: words; the limit stops one that repeats itself.
MAX_NEW_TOKENS = 2048


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family: a Llama with the two folders beside it."""
    parts = set(checkpoint.part_names)
    return checkpoint.config.get("model_type") == "llama" and {"visual_encoder", "projector"} <= parts


def read_config(checkpoint: Checkpoint) -> CaptionerConfig:
    """Everything but the weights; merging keeps all visual tokens (``CaptionerConfig.keeping`` for fewer).

    Raises CheckpointError for what is missing, malformed or not supported.
    """
    decoder = read_decoder(Fields(checkpoint.config, "config.json"), qkv_bias=False, sliding_window=None)
    tower = checkpoint.json("visual_encoder/config.json")
    vision = read_vision(
        Fields(tower or BUILTIN_TOWERS["apple/DFN5B-CLIP-ViT-H-14-378"], "visual_encoder/config.json"), keep=1.0
    )
    if vision.kind != "clip":
        raise CheckpointError("visual_encoder/config.json: AuroraCap merges the tokens of a CLIP tower, not of SigLIP")
    projector = Fields(checkpoint.json("projector/config.json") or {}, "projector/config.json")
    if projector.text("hidden_act", "gelu") != "gelu" or not projector.flag("bias", True):
        raise CheckpointError(f"{projector.where}: only a projector with gelu and biases is supported")
    processor = next(
        (
            name
            for name in ("preprocessor_config.json", "visual_encoder/preprocessor_config.json")
            if checkpoint.json(name)
        ),
        "preprocessor_config.json",
    )
    connector = ConnectorConfig(
        kind=mlp_kind(checkpoint.tensors, weights.PROJECTOR),
        in_size=vision.hidden_size,
        out_size=decoder.hidden_size,
        grid=vision.grid,
    )
    return CaptionerConfig(
        family="auroracap",
        sampling=Sampling(rule="linspace", count=NUM_FRAMES),
        image=read_image_processing(checkpoint.json(processor), processor, vision),
        parts=(tower_part(vision, merges=True), mlp_part(connector)),
        decoder=decoder,
        generation=read_generation(checkpoint, MAX_NEW_TOKENS, extra_eos=None),
        prompts=prompt.layouts(checkpoint),
    )
