"""The families that can be compiled: an explicit list, so that no name in a checkpoint chooses what is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .config import CaptionerConfig
from .fields import shown
from .random_layout import Size
from .sources import Shape, Translation

#: The folders of the families beside this file, in the order in which they are asked. A new family is a line here.
FOLDERS = (
    "videollama2",
    "auroracap",
    "llava_video",
    "llava_next_video",
    "internvl2",
)


@dataclass(frozen=True)
class Family:
    """What a family's folder provides: ``KNOWN_AS``, ``matches`` and ``read_config`` of its ``config.py``,
    ``translate`` of its ``weights.py``, and ``SIZES`` of its ``sizes.py``.

    ``known_as``: its name and the ``model_type`` of its checkpoints, for the user. ``sizes``: of random checkpoints, by
    name (``random_checkpoint.py``).
    """

    known_as: str
    matches: Callable[[Checkpoint], bool]
    read_config: Callable[[Checkpoint], CaptionerConfig]
    translate: Callable[[Checkpoint, CaptionerConfig, Mapping[str, Mapping[str, Shape]]], Translation]
    sizes: Mapping[str, Size]


def _family(folder: str) -> Family:
    config, weights, sizes = (
        import_module(f".{folder}.{name}", __package__) for name in ("config", "weights", "sizes")
    )
    return Family(config.KNOWN_AS, config.matches, config.read_config, weights.translate, sizes.SIZES)


FAMILIES = {folder: _family(folder) for folder in FOLDERS}


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises CheckpointError where there is none."""
    for family in FAMILIES.values():
        if family.matches(checkpoint):
            return family
    kind = checkpoint.config.get("model_type")
    known = ", ".join(family.known_as for family in FAMILIES.values())
    raise CheckpointError(
        f"{checkpoint.path}: model_type {shown(kind)} is not a captioner of a known family; known are {known}"
    )
