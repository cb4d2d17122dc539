"""Scenes as arrays on disk: what a captioner sees and hears of each, rendered once for many epochs.

A folder holds ``frames.npy`` uint8 ``[N, T, S, S, 3]``, ``fbank.npy`` float16 ``[N, F, 128]`` (the filter bank of the
part that carries sound; bfloat16 values, which float16 holds exactly) and ``states.npy`` float32 ``[N, T, 3, 6]``:
where and what the things are in every frame, for the towers' training. Chunks are rendered by several processes; a
chunk that is done is not rendered again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import OptionError
from ..runtime.preprocess.audio import SAMPLE_RATE, video_policy
from ..runtime.preprocess.fbank import FRAME_LENGTH, FRAME_SHIFT, kaldi_fbank
from ..runtime.preprocess.frames import sample_indices
from .scenes import FPS, NUM_FRAMES, Scene, draw_scene, render_frames, render_sound
from .scenes.layout import layout
from .scenes.scene import COLORS, SHAPES, SIZES

Progress = Callable[[int, int], None]

SOUND_SAMPLES = 16 * SAMPLE_RATE
"""Eight clips of 2 s: everything behind them is silence (``video_policy``)."""
FBANK_FRAMES = SOUND_SAMPLES // FRAME_SHIFT
SILENCE = -15.9375
"""Log of float32's epsilon as bfloat16: the filter bank of silence (docs/facts.md 1.4)."""
MOST_THINGS = 3
STATE = ("x", "y", "radius", "color", "shape", "size")
"""Of a thing in a frame: centre and radius as shares of the side (radius 0: not there), and its indices."""
_CHUNK = 256


def seen(scene: Scene, num_frames: int, size: int) -> npt.NDArray[np.uint8]:
    """The frames that the captioner samples of the clip, uint8 ``[T, S, S, 3]``."""
    return render_frames(scene, _times(num_frames), size)


def heard(scene: Scene) -> npt.NDArray[np.float32]:
    """The filter bank of the clip's sound, its first ``FBANK_FRAMES`` frames: float32 ``[F, 128]``."""
    pcm = np.rint(render_sound(scene, SAMPLE_RATE) * (1 << 15)) / np.float32(1 << 15)
    sound = video_policy(pcm.astype(np.float32))
    return kaldi_fbank(sound[: SOUND_SAMPLES + FRAME_LENGTH])[:FBANK_FRAMES]


def whole_fbank(part: Tensor, num_frames: int) -> Tensor:
    """``heard`` of a batch ``[B, F, 128]`` with the silence behind it: ``[B, num_frames, 128]``."""
    silence = part.new_full((len(part), num_frames - part.shape[1], part.shape[2]), SILENCE)
    return torch.cat((part, silence), 1)


def states(scene: Scene, num_frames: int) -> npt.NDArray[np.float32]:
    """``STATE`` of every thing in every sampled frame: float32 ``[T, 3, 6]``."""
    times, plan = _times(num_frames), layout(scene)
    out = np.zeros((num_frames, MOST_THINGS, len(STATE)), np.float32)
    shift = plan.shift(times)
    for at, track in enumerate(plan.tracks):
        thing = track.thing
        out[:, at, :2] = track.centers(times)
        out[:, at, 0] += shift
        out[:, at, 2] = track.radii(times)
        out[:, at, 3] = COLORS.index(thing.color)
        if thing.to:
            out[track.progress(times) > 0, at, 3] = COLORS.index(thing.to)
        out[:, at, 4], out[:, at, 5] = SHAPES.index(thing.shape), SIZES.index(thing.size)
    return out


def _times(num_frames: int) -> npt.NDArray[np.float64]:
    return sample_indices(NUM_FRAMES, num_frames, "centered") / FPS


@dataclass(frozen=True)
class Clips:
    """A folder of rendered scenes; arrays are mapped, not read."""

    split: str
    frames: npt.NDArray[np.uint8]
    fbank: npt.NDArray[np.float16]
    states: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)

    def scene(self, index: int) -> Scene:
        """The scene of a row."""
        return draw_scene(self.split, index)


def render_clips(
    folder: Path,
    split: str,
    count: int,
    *,
    num_frames: int = 8,
    size: int = 96,
    workers: int = 2,
    progress: Progress | None = None,
) -> Clips:
    """Render the first ``count`` scenes of a split into ``folder``, or go on where an earlier run stopped.

    Raises ``OptionError`` where the folder holds clips of other dimensions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"split": split, "count": count, "num_frames": num_frames, "size": size}
    note = folder / "clips.json"
    if not note.exists():
        note.write_text(json.dumps(about))
    elif json.loads(note.read_text()) != about:
        raise OptionError(f"{folder} holds other clips than those asked for: give a new folder, or remove it first")
    shapes = {
        "frames": ((count, num_frames, size, size, 3), np.uint8),
        "fbank": ((count, FBANK_FRAMES, 128), np.float16),
        "states": ((count, num_frames, MOST_THINGS, len(STATE)), np.float32),
    }
    for name, (shape, dtype) in shapes.items():
        if not (folder / f"{name}.npy").exists():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
    chunks = range(0, count, _CHUNK)
    waiting = [start for start in chunks if not (folder / f"chunk-{start}.done").exists()]
    finished = len(chunks) - len(waiting)
    if waiting:
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(_render_chunk, folder, split, start, min(start + _CHUNK, count)) for start in waiting]
            for job in as_completed(jobs):
                job.result()
                finished += 1
                if progress is not None:
                    progress(min(finished * _CHUNK, count), count)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
    return Clips(split, **arrays)


def _render_chunk(folder: Path, split: str, start: int, stop: int) -> None:
    frames, fbank, state = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("frames", "fbank", "states"))
    num_frames, size = frames.shape[1:3]
    for index in range(start, stop):
        scene = draw_scene(split, index)
        frames[index] = seen(scene, num_frames, size)
        fbank[index] = heard(scene)
        state[index] = states(scene, num_frames)
    for array in (frames, fbank, state):
        array.flush()
    (folder / f"chunk-{start}.done").touch()
