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
from .media.doors import media_errors
from .media.source import check_total
from .preprocess.audio import audio_policy, clip_bounds, join_clips, resample, video_policy
from .preprocess.duplicates import distinct_frames
from .preprocess.frames import sample_indices, span_frames
from .timing import Stages
from .viewing import Viewing


@dataclass
class Clip:
    """What is left of a source after sampling.

    ``frames`` uint8 ``[U, H, W, 3]``, each distinct sampled frame once; ``order`` ``[T]`` says which of them stands at
    each of the T places the model looks at (short clips, images and dropped near-duplicates repeat frames). ``sound``
    float32 ``[n]`` in [-1, 1] at the bundle's sample rate, after the audio policy. Either may be missing, not both.
    ``notes`` says in words what was substituted, ``seconds`` how long the source lasts, or the span of it that was
    taken, where it has a duration; ``start`` where in the source that span begins, in seconds.
    """

    frames: npt.NDArray[np.uint8] | None = None
    order: npt.NDArray[np.int64] | None = None
    sound: FloatArray | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    start: float = 0.0

    @property
    def mode(self) -> str:
        """``video``, ``audio`` or ``audiovideo``: which prompt template applies."""
        if self.frames is None:
            return "audio"
        return "video" if self.sound is None else "audiovideo"


@dataclass(frozen=True)
class _Span:
    """What is asked of a source's time, in seconds; ``None``: from its beginning, to its end."""

    start: float | None
    end: float | None

    @property
    def whole(self) -> bool:
        return self.start is None and self.end is None

    @property
    def offset(self) -> float:
        return self.start or 0.0

    @property
    def length(self) -> float | None:
        return None if self.end is None else self.end - self.offset


def read_clip(
    source: str | os.PathLike[str],
    spec: Preprocessing,
    per_frame: bool,
    viewing: Viewing,
    stages: Stages,
    *,
    threads: int | None = None,
) -> Clip:
    """Open a file or folder and keep what the model needs of it.

    ``per_frame``: one block of tokens a frame (an image is then one frame; else it is repeated ``num_frames`` times,
    as VideoLLaMA2's ``process_image`` does). ``viewing``: which span of the pictures and the sound, with the sound or
    without; the places of near-duplicate frames (``distinct_frames``) show the kept one, or with ``per_frame`` are
    dropped too. ``threads`` decode video (``open_media``). ``MediaError`` when nothing is left or the source ends
    before the span, ``OptionError`` for a span of images.
    """
    span = _Span(viewing.start, viewing.end)
    with stages.measure("open"):
        media = open_media(source, threads)
    name = os.fspath(source)
    with media_errors(name), media:
        clip = Clip(seconds=media.duration or None, start=span.offset)
        if not span.whole:
            clip.seconds = _span_seconds(media, span)
        if media.has_video:
            with stages.measure("read_frames"):
                _take_frames(clip, media, spec, per_frame, span)
        listens = spec.audio is not None and viewing.audio
        if media.has_audio and listens:
            assert spec.audio is not None
            with stages.measure("read_audio"):
                _take_sound(clip, media, spec.audio, span)
        elif media.kind == "video" and listens:
            clip.notes.append("no audio track: captioned from the pictures alone")
        if clip.frames is None and clip.sound is None:
            if not media.has_audio:
                raise MediaError(f"{name}: holds neither pictures nor sound")
            why = "sound was switched off" if spec.audio is not None else "this captioner has no audio branch"
            raise MediaError(f"{name}: holds only sound, and {why}")
        clip.notes.extend(media.notes)
    if viewing.duplicates is not None:
        _drop_duplicates(clip, viewing.duplicates, per_frame)
    return clip


def array_clip(
    frames: npt.ArrayLike | None,
    waveform: npt.ArrayLike | None,
    sample_rate: int | None,
    spec: Preprocessing,
    per_frame: bool,
    *,
    frame_times: npt.ArrayLike | None = None,
    seconds: float | None = None,
    duplicates: float | None = None,
) -> Clip:
    """The same from arrays: frames ``[T, H, W, 3]`` uint8, waveform float or int16 mono or with channels.

    Exactly ``num_frames`` frames, and those of ``frame_times`` (seconds of each), are taken as already sampled;
    otherwise the sampling rule picks from them. ``seconds``: how long the clip lasts.
    """
    clip = Clip(seconds=seconds)
    if frames is not None:
        array = as_frames(frames)
        count = len(array)
        image = count == 1
        sampled = count == spec.num_frames or frame_times is not None
        order = np.arange(count) if sampled else _order(count, spec, image and per_frame)
        unique, clip.order = np.unique(order, return_inverse=True)
        check_total("frames", array.shape[2], array.shape[1], len(unique))
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
    if duplicates is not None:
        _drop_duplicates(clip, duplicates, per_frame)
    return clip


def _span_seconds(media: Media, span: _Span) -> float | None:
    """How long the span lasts in this source, which may end before it does."""
    name = media.path
    if media.kind == "image" or name.is_dir():
        raise OptionError(f"{name}: images have no time, so no span can be taken from them")
    if not media.duration:
        return span.length
    if span.offset >= media.duration:
        raise MediaError(f"{name}: lasts {media.duration:.2f} s, the span starts at {span.offset:g} s")
    end = media.duration if span.end is None else min(span.end, media.duration)
    return end - span.offset


def _take_frames(clip: Clip, media: Media, spec: Preprocessing, per_frame: bool, span: _Span) -> None:
    try:
        first, last = span_frames(
            media.num_frames, media.fps, span.start, span.end, spec.frame_rule, media.times, media.duration
        )
    except MediaError as error:
        raise MediaError(f"{media.path}: {error}") from None
    total = last - first + 1
    order = _order(total, spec, media.kind == "image" and per_frame)
    unique, clip.order = np.unique(order, return_inverse=True)
    clip.frames = media.read_frames(first + unique)
    if total < len(order) and media.num_frames > 1:
        clip.notes.append(f"only {total} frames for {len(order)} places: frames were repeated")


def _drop_duplicates(clip: Clip, threshold: float, per_frame: bool) -> None:
    if clip.frames is None or clip.order is None:
        return
    stands = distinct_frames(clip.frames, threshold)
    kept, places = np.unique(stands, return_inverse=True)
    dropped = len(stands) - len(kept)
    clip.frames = clip.frames[kept]
    clip.order = places[clip.order]
    if per_frame:
        # A frame that a short clip repeats is its own duplicate.
        dropped = len(clip.order) - len(kept)
        clip.order = np.arange(len(kept))
    if dropped:
        what = "dropped" if per_frame else "replaced by the one before"
        clip.notes.append(f"{dropped} near-duplicate frames were {what}")


def _order(total: int, spec: Preprocessing, single: bool) -> npt.NDArray[np.int64]:
    return np.zeros(1, np.int64) if single else sample_indices(total, spec.num_frames, spec.frame_rule)


def _take_sound(clip: Clip, media: Media, spec: AudioSpec, span: _Span) -> None:
    if media.kind == "audio":
        _note_crop(clip, clip.seconds or 0.0, spec)
        limit = spec.num_samples / spec.sample_rate
        seconds = limit if span.length is None else min(limit, span.length)
        sound = media.read_audio(seconds=seconds, start=span.offset, timed=not span.whole)
        try:
            clip.sound = audio_policy(sound.samples, sound.sample_rate)
        except MediaError as error:
            raise MediaError(f"{media.path}: {error}") from None
        return
    try:
        clips = media.read_audio_parts(spec.sample_rate, clip_bounds, span.length, span.offset, timed=not span.whole)
        clip.sound = join_clips(clips)
    except MediaError as error:
        # The reference hears 30 s of silence here; the pictures alone say as much, at half the tokens.
        clip.notes.append(f"the sound cannot be used ({error}): captioned from the pictures alone")


def _note_crop(clip: Clip, seconds: float, spec: AudioSpec) -> None:
    limit = spec.num_samples / spec.sample_rate
    if seconds > limit:
        clip.notes.append(f"the sound lasts {seconds:.0f} s: its first {limit:.0f} s were heard")
