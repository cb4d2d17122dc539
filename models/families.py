"""The families that can be compiled: an explicit list, so that no name in a checkpoint chooses what is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .auroracap import config as auroracap_config
from .auroracap import weights as auroracap_weights
from .checkpoint import Checkpoint
from .config import CaptionerConfig
from .fields import shown
from .sources import Shape, Translation
from .videollama2 import config as videollama2_config
from .videollama2 import weights as videollama2_weights


@dataclass(frozen=True)
class Family:
    """What a family's folder provides."""

    matches: Callable[[Checkpoint], bool]
    read_config: Callable[[Checkpoint], CaptionerConfig]
    translate: Callable[[Checkpoint, CaptionerConfig, Mapping[str, Mapping[str, Shape]]], Translation]


FAMILIES = {
    "videollama2": Family(videollama2_config.matches, videollama2_config.read_config, videollama2_weights.translate),
    "auroracap": Family(auroracap_config.matches, auroracap_config.read_config, auroracap_weights.translate),
}


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises CheckpointError where there is none."""
    for family in FAMILIES.values():
        if family.matches(checkpoint):
            return family
    kind = checkpoint.config.get("model_type")
    raise CheckpointError(
        f"{checkpoint.path}: model_type {shown(kind)} is not a captioner of a known family; known are VideoLLaMA2 "
        "(videollama2_mistral, videollama2_qwen2) and AuroraCap (llama with visual_encoder/ and projector/)"
    )
