"""The stages of a pipeline in PyTorch: how a module is called for its units, and how many tokens each gets.

What ``runtime.encoder`` does with graphs, without its shortcuts: equal frames and windows are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import msgspec
import torch
from torch import Tensor, nn

from ..contract.pipeline import PIXELS, SOUND, Pipeline, Stage, Variant, Window, variant_graph
from .config import CaptionerConfig, Part


def windows(x: Tensor, window: Window) -> Tensor:
    """Units ``[U, ...]`` in the windows of a convolution over time: ``[S, kernel, ...]``.

    Zero units are added in front and behind; what does not fill a window at the end is dropped.
    """
    empty = x.new_zeros(window.padding, *x.shape[1:])
    padded = torch.cat((empty, x, empty))
    starts = range(0, window.count(len(x)) * window.stride, window.stride)
    return torch.stack([padded[start : start + window.kernel] for start in starts])


def run_stage(stage: Stage, module: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """What a stage gives its units, ``[units, tokens, width]``, from the ``values`` of its sources by name."""
    inputs = [values[value.source] for value in stage.inputs]
    unit = stage.unit
    return module(*(windows(x, unit) if isinstance(unit, Window) else x for x in inputs))


def run_stages(
    stages: Iterable[Stage], module: Callable[[str], nn.Module], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``values`` with what each of the stages gives; ``module(name)`` is that of a stage."""
    found = dict(values)
    for stage in stages:
        found[stage.name] = run_stage(stage, module(stage.name), found)
    return found


def measured(config: CaptionerConfig, keeps: tuple[float, ...] = ()) -> Pipeline:
    """The pipeline with the tokens of each stage's units, and the variants that keep these shares of them.

    Found by running the modules without memory (on the meta device), so that no connector and no merging needs a
    formula.
    """
    base = _tokens(config)
    merging = config.merging
    forms = [_tokens(config.keeping(keep)) for keep in keeps] if merging is not None else []
    stages = []
    for part in config.parts:
        stage = part.stage
        tokens: int | None = base[stage.name]
        variants: tuple[Variant, ...] = ()
        if part is merging:
            variants = tuple(
                Variant(keep=keep, graph=variant_graph(stage.name, keep, place), tokens=form[stage.name])
                for place, (keep, form) in enumerate(zip(keeps, forms, strict=True))
            )
            tokens = variants[0].tokens if variants else tokens
        elif any(form[stage.name] != tokens for form in forms):
            tokens = None
        stages.append(msgspec.structs.replace(stage, tokens=tokens, variants=variants))
    return msgspec.structs.replace(config.pipeline, stages=tuple(stages))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, without memory (on the meta device), in eval mode, without gradients."""
    with torch.device("meta"):
        module = build()
    return module.eval().requires_grad_(False)


def build_on_meta(part: Part) -> nn.Module:
    """The module of a stage, as ``on_meta`` makes it."""
    return on_meta(partial(part.build, part.config))


def meta_values(config: CaptionerConfig) -> dict[str, Tensor]:
    """What each stage gives, and what the first ones take, on the meta device: their shapes without their numbers.

    For a clip of two places, or of as many as a window needs.
    """
    size, sound = config.image.output_size, config.sound
    places = max(2, config.pipeline.least_places())
    with torch.no_grad(), torch.device("meta"):
        values = {PIXELS: torch.zeros(places, 3, size, size)}
        if sound is not None:
            values[SOUND] = torch.zeros(1, sound.num_frames, sound.num_mel_bins)
        return run_stages(config.pipeline.stages, lambda name: build_on_meta(config.part(name)), values)


def _tokens(config: CaptionerConfig) -> dict[str, int]:
    """The tokens of one unit of each stage."""
    values = meta_values(config)
    return {part.stage.name: values[part.stage.name].shape[1] for part in config.parts}
