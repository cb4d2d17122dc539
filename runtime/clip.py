"""From a source (file, folder or arrays) to the frames and the sound that a captioner looks at and listens to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import MediaError, OptionError
from .bundle import AudioSpec, Preprocessing
from .inference import FloatArray
from .media import Media, as_frames, as_waveform, open_media
from .preprocess.audio import audio_policy, resample, video_policy
from .preprocess.frames import sample_indices
from .timing import Stages


@dataclass
class Clip:
    """What is left of a source after sampling.

    ``frames`` uint8 ``[U, H, W, 3]``, each distinct sampled frame once; ``order`` ``[T]`` says which of them stands at
    each of the T places the model looks at (short clips and images repeat frames). ``sound`` float32 ``[n]`` in
    [-1, 1] at the bundle's sample rate, after the audio policy. Either may be missing, not both. ``notes`` says in
    words what was substituted, ``seconds`` how long the source lasts, where it has a duration.
    """

    frames: npt.NDArray[np.uint8] | None = None
    order: npt.NDArray[np.int64] | None = None
    sound: FloatArray | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None

    @property
    def mode(self) -> str:
        """``video``, ``audio`` or ``audiovideo``: which prompt template applies."""
        if self.frames is None:
            return "audio"
        return "video" if self.sound is None else "audiovideo"


def read_clip(
    source: str | os.PathLike[str], spec: Preprocessing, per_frame: bool, audio: bool, stages: Stages
) -> Clip:
    """Open a file or folder and keep what the model needs of it.

    ``per_frame``: one block of tokens a frame (an image is then one frame; else it is repeated ``num_frames`` times,
    as VideoLLaMA2's ``process_image`` does). ``audio=False`` leaves the sound out. ``MediaError`` when nothing is left.
    """
    name = os.fspath(source)
    with stages.measure("open"):
        media = open_media(source)
    with media:
        clip = Clip(seconds=media.duration or None)
        if media.has_video:
            with stages.measure("read_frames"):
                _take_frames(clip, media, spec, per_frame)
        listens = spec.audio is not None and audio
        if media.has_audio and listens:
            assert spec.audio is not None
            with stages.measure("read_audio"):
                _take_sound(clip, media, spec.audio)
        elif media.kind == "video" and listens:
            clip.notes.append("no audio track: captioned from the pictures alone")
        if clip.frames is None and clip.sound is None:
            if not media.has_audio:
                raise MediaError(f"{name}: holds neither pictures nor sound")
            why = "sound was switched off" if spec.audio is not None else "this captioner has no audio branch"
            raise MediaError(f"{name}: holds only sound, and {why}")
        clip.notes.extend(media.notes)
    return clip


def array_clip(
    frames: npt.ArrayLike | None,
    waveform: npt.ArrayLike | None,
    sample_rate: int | None,
    spec: Preprocessing,
    per_frame: bool,
) -> Clip:
    """The same from arrays: frames ``[T, H, W, 3]`` uint8, waveform float or int16 mono or with channels.

    Exactly ``num_frames`` frames are taken as already sampled; otherwise the sampling rule picks from them.
    """
    clip = Clip()
    if frames is not None:
        array = as_frames(frames)
        count = len(array)
        image = count == 1
        order = np.arange(count) if count == spec.num_frames else _order(count, spec, image and per_frame)
        unique, clip.order = np.unique(order, return_inverse=True)
        clip.frames = array[unique]
    if waveform is not None:
        if spec.audio is None:
            raise OptionError("waveform= was given, but this captioner has no audio branch")
        if sample_rate is None:
            raise OptionError("waveform= needs sample_rate= (in Hz)")
        sound = as_waveform(waveform, sample_rate)
        if frames is None:
            _note_crop(clip, sound.samples.shape[-1] / sample_rate, spec.audio)
            clip.sound = audio_policy(sound.samples, sample_rate)
        else:
            clip.sound = video_policy(resample(sound.samples, sample_rate, spec.audio.sample_rate))
    return clip


def _take_frames(clip: Clip, media: Media, spec: Preprocessing, per_frame: bool) -> None:
    order = _order(media.num_frames, spec, media.kind == "image" and per_frame)
    unique, clip.order = np.unique(order, return_inverse=True)
    clip.frames = media.read_frames(unique)
    if 1 < media.num_frames < len(order):
        clip.notes.append(f"only {media.num_frames} frames for {len(order)} places: frames were repeated")


def _order(total: int, spec: Preprocessing, single: bool) -> npt.NDArray[np.int64]:
    return np.zeros(1, np.int64) if single else sample_indices(total, spec.num_frames, spec.frame_rule)


def _take_sound(clip: Clip, media: Media, spec: AudioSpec) -> None:
    if media.kind == "audio":
        _note_crop(clip, media.duration, spec)
        seconds = spec.num_samples / spec.sample_rate
        sound = media.read_audio(seconds=seconds)
        clip.sound = audio_policy(sound.samples, sound.sample_rate)
        return
    try:
        clip.sound = video_policy(media.read_audio(spec.sample_rate).samples)
    except MediaError as error:
        # The reference hears 30 s of silence here; the pictures alone say as much, at half the tokens.
        clip.notes.append(f"the sound cannot be used ({error}): captioned from the pictures alone")


def _note_crop(clip: Clip, seconds: float, spec: AudioSpec) -> None:
    limit = spec.num_samples / spec.sample_rate
    if seconds > limit:
        clip.notes.append(f"the sound lasts {seconds:.0f} s: its first {limit:.0f} s were heard")
