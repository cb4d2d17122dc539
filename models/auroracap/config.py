"""An AuroraCap checkpoint's JSON to ``CaptionerConfig`` (docs/facts.md 2.4)."""

from __future__ import annotations

from ...errors import CheckpointError, OptionError
from ..checkpoint import Checkpoint
from ..config import CaptionerConfig, ConnectorConfig
from ..fields import Fields
from ..hf_config import BUILTIN_TOWERS, read_decoder, read_generation, read_image_processing, read_vision
from ..sources import mlp_kind
from . import prompt, weights

#: Frames of the reference's quick start; a checkpoint does not say.
NUM_FRAMES = 8


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is one of this family: a Llama with the two folders beside it."""
    parts = set(checkpoint.part_names)
    return checkpoint.config.get("model_type") == "llama" and {"visual_encoder", "projector"} <= parts


def read_config(checkpoint: Checkpoint, keep: float | None = None) -> CaptionerConfig:
    """Everything but the weights. ``keep``: ratio of visual tokens that merging keeps, 1 (all of them) unless given.

    Raises CheckpointError for what is missing, malformed or not supported, OptionError for a ratio out of (0, 1].
    """
    keep = 1.0 if keep is None else keep
    if not 0 < keep <= 1:
        raise OptionError(f"the ratio of visual tokens must be above 0 and at most 1, not {keep:g}")
    decoder = read_decoder(Fields(checkpoint.config, "config.json"), qkv_bias=False, sliding_window=None)
    tower = checkpoint.json("visual_encoder/config.json")
    vision = read_vision(
        Fields(tower or BUILTIN_TOWERS["apple/DFN5B-CLIP-ViT-H-14-378"], "visual_encoder/config.json"), keep=keep
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
    return CaptionerConfig(
        family="auroracap",
        num_frames=NUM_FRAMES,
        frame_rule="linspace",
        image=read_image_processing(checkpoint.json(processor), processor, vision),
        vision=vision,
        connector=ConnectorConfig(
            kind=mlp_kind(checkpoint.tensors, weights.PROJECTOR),
            in_size=vision.hidden_size,
            out_size=decoder.hidden_size,
            grid=vision.grid,
            num_frames=NUM_FRAMES,
            per_frame=True,
        ),
        decoder=decoder,
        generation=read_generation(checkpoint, extra_eos=None),
        prompts=prompt.templates(checkpoint),
    )
