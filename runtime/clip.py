"""From a source (file, folder or arrays) to the frames and the sound that a captioner looks at and listens to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..contract.pipeline import Mode, Pipeline, SoundPlan
from ..errors import MediaError, OptionError
from .inference import FloatArray
from .media import Media, as_frames, as_waveform, open_media
from .media.doors import media_errors
from .media.source import check_total
from .preprocess.audio import POLICIES, join_clips, resample
from .preprocess.duplicates import distinct_frames
from .preprocess.frames import Places, is_constant, sample_places, span_frames
from .prompt import Timing, speaks_of_time
from .timing import Stages
from .viewing import Viewing, as_float


@dataclass
class Clip:
    """What is left of a source after sampling.

    ``frames`` uint8 ``[U, H, W, 3]``, each distinct sampled frame once; ``order`` ``[T]`` says which of them stands at
    each of the T places the model looks at (short clips, images and dropped near-duplicates repeat frames). ``sound``
    float32 ``[n]`` in [-1, 1] at the bundle's sample rate, after the audio policy. Either may be missing, not both.
    ``notes`` says in words what was substituted, ``seconds`` how long the source lasts, or the span of it that was
    taken, where it has a duration; ``start`` where in the source that span begins, in seconds. ``timing``: what a
    prompt may say of the places' times, counted from the beginning of the span; ``None`` for images.
    """

    frames: npt.NDArray[np.uint8] | None = None
    order: npt.NDArray[np.int64] | None = None
    sound: FloatArray | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    start: float = 0.0
    timing: Timing | None = None

    @property
    def mode(self) -> Mode:
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
    pipeline: Pipeline,
    viewing: Viewing,
    stages: Stages,
    *,
    threads: int | None = None,
) -> Clip:
    """Open a file or folder and keep what the model needs of it.

    An image is one frame where the pipeline is framewise; else it stands at every place, as in VideoLLaMA2's
    ``process_image``. ``viewing``: which span of the pictures and the sound, and whether the sound counts; the places
    of near-duplicate frames (``distinct_frames``) show the kept one, or are dropped too where the pipeline is
    framewise. ``threads`` decode video (``open_media``). ``MediaError`` when nothing is left or the source ends before
    the span, ``OptionError`` for a span of images.
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
                _take_frames(clip, media, pipeline, span)
        plan = pipeline.sound if viewing.audio else None
        if media.has_audio and plan is not None:
            with stages.measure("read_audio"):
                _take_sound(clip, media, plan, span)
        elif media.kind == "video" and plan is not None:
            clip.notes.append("no audio track: captioned from the pictures alone")
        if clip.frames is None and clip.sound is None:
            if not media.has_audio:
                raise MediaError(f"{name}: holds neither pictures nor sound")
            why = "sound was switched off" if pipeline.sound is not None else "this captioner has no audio branch"
            raise MediaError(f"{name}: holds only sound, and {why}")
        clip.notes.extend(media.notes)
    if viewing.duplicates is not None:
        _drop_duplicates(clip, viewing.duplicates, pipeline.framewise)
    return clip


def array_clip(
    frames: npt.ArrayLike | None,
    waveform: npt.ArrayLike | None,
    sample_rate: int | None,
    pipeline: Pipeline,
    *,
    frame_times: npt.ArrayLike | None = None,
    seconds: float | None = None,
    duplicates: float | None = None,
) -> Clip:
    """The same from arrays: frames ``[T, H, W, 3]`` uint8, waveform float or int16 mono or with channels.

    With ``frame_times`` (seconds of each frame, ascending) the frames are taken as already sampled: no more than the
    pipeline has places, and exactly as many where its stages join frames. Otherwise the sampling rule picks from them.
    ``seconds``: how long the clip lasts, by default until its last frame. ``OptionError`` for arrays and numbers that
    do not fit each other.
    """
    clip = Clip(seconds=_given_seconds(seconds))
    if frames is not None:
        array, plan = as_frames(frames), pipeline.sampling
        times = None if frame_times is None else _given_times(frame_times, len(array), clip.seconds)
        places = _array_places(len(array), pipeline) if times is None else np.arange(len(array))
        enough = _enough(len(places), pipeline)
        places = places[enough]
        if times is not None:
            # The count of the rule "rate" is the most that it takes.
            fewest = 1 if pipeline.framewise or plan.rule == "rate" else plan.count
            if not fewest <= len(array) <= plan.count:
                raise OptionError(f"frame_times= is for {len(array)} frames, this captioner looks at {plan.count}")
            clip.timing = Timing(float(times[-1]) if clip.seconds is None else clip.seconds, times[enough])
        unique, clip.order = np.unique(places, return_inverse=True)
        check_total("frames", array.shape[2], array.shape[1], len(unique))
        clip.frames = array[unique]
    elif frame_times is not None:
        raise OptionError("frame_times= needs frames=")
    if waveform is not None:
        sound_plan = pipeline.sound
        if sound_plan is None:
            raise OptionError("waveform= was given, but this captioner has no audio branch")
        if sample_rate is None:
            raise OptionError("waveform= needs sample_rate= (in Hz)")
        sound, policy = as_waveform(waveform, sample_rate), POLICIES[sound_plan.policy]
        if frames is None:
            _note_crop(clip, sound.samples.shape[-1] / sample_rate, sound_plan)
            clip.sound = policy.alone(sound.samples, sample_rate, sound_plan.num_samples)
        else:
            heard = resample(sound.samples, sample_rate, sound_plan.sample_rate)
            clip.sound = policy.of_video(heard, sound_plan.num_samples)
    layout = pipeline.prompts.get(clip.mode)
    if clip.seconds is not None and clip.timing is None and layout is not None and speaks_of_time(layout.pieces):
        clip.notes.append("the prompt does not speak of time: frame_times= is missing, seconds= alone does not do")
    if duplicates is not None:
        _drop_duplicates(clip, duplicates, pipeline.framewise)
    return clip


def _given_seconds(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    given = as_float("seconds", seconds)
    if not 0 <= given < float("inf"):
        raise OptionError(f"seconds must be a number from 0 on, not {given!r}")
    return given


def _given_times(given: npt.ArrayLike, count: int, seconds: float | None) -> npt.NDArray[np.float64]:
    try:
        times = np.asarray(given)
        # Objects are numbers of Python's that NumPy has no type for. What is no real number is not converted.
        if times.dtype.kind not in "iufO":
            raise TypeError
        times = times.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise OptionError("frame_times must be the seconds of each frame") from None
    if times.shape != (count,):
        raise OptionError(f"frame_times must be one number for each of the {count} frames, not {list(times.shape)}")
    if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
        raise OptionError("frame_times must be seconds from 0 on in ascending order")
    if seconds is not None and times[-1] > seconds:
        raise OptionError(f"the last of frame_times is {times[-1]:g} s, but the clip lasts {seconds:g} s")
    return times


def _array_places(count: int, pipeline: Pipeline) -> npt.NDArray[np.int64]:
    """The places of frames whose times are not known."""
    if count == pipeline.sampling.count:
        return np.arange(count)
    if count == 1:
        return _image_places(pipeline)
    return sample_places(count, 0.0, pipeline.sampling).index


def _image_places(pipeline: Pipeline) -> npt.NDArray[np.int64]:
    """The places of an image. Of a pipeline that is not framewise, it stands at all of them."""
    return np.zeros(1 if pipeline.framewise else pipeline.sampling.count, np.int64)


def _enough(count: int, pipeline: Pipeline) -> npt.NDArray[np.int64]:
    """Which of ``count`` sampled frames stands at each place: each at one, or at some where the stages need more."""
    places = max(count, pipeline.least_places())
    return np.arange(places) * count // places


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


def _take_frames(clip: Clip, media: Media, pipeline: Pipeline, span: _Span) -> None:
    plan = pipeline.sampling
    try:
        first, last = span_frames(
            media.num_frames, media.fps, span.start, span.end, plan.rule, media.times, media.duration
        )
        total = last - first + 1
        places = Places(_image_places(pipeline)) if media.kind == "image" else sample_places(total, media.fps, plan)
    except MediaError as error:
        raise MediaError(f"{media.path}: {error}") from None
    sampled = len(places.index)
    enough = _enough(sampled, pipeline)
    index = places.index[enough]
    unique, clip.order = np.unique(index, return_inverse=True)
    clip.frames = media.read_frames(first + unique)
    if media.times is not None and not is_constant(media.times, media.fps):
        # No rate says when these are shown. One that began before the span is there from its beginning on.
        times = np.maximum(media.times[first + index] - span.offset, 0.0)
        clip.timing = Timing(float(times[-1]) if clip.seconds is None else clip.seconds, times)
    elif places.times is not None and places.seconds is not None:
        clip.timing = Timing(places.seconds, places.times[enough])
    if (fewer := min(total, sampled)) < len(index) and media.num_frames > 1:
        clip.notes.append(f"only {fewer} frames for {len(index)} places: frames were repeated")


def _drop_duplicates(clip: Clip, threshold: float, framewise: bool) -> None:
    if clip.frames is None or clip.order is None:
        return
    stands = distinct_frames(clip.frames, threshold)
    kept, places = np.unique(stands, return_inverse=True)
    dropped = len(stands) - len(kept)
    clip.frames = clip.frames[kept]
    clip.order = places[clip.order]
    if framewise:
        # A frame that a short clip repeats is its own duplicate.
        dropped = len(clip.order) - len(kept)
        clip.order, left = np.unique(clip.order, return_index=True)
        if clip.timing is not None:
            clip.timing = Timing(clip.timing.seconds, clip.timing.times[left])
    if dropped:
        what = "dropped" if framewise else "replaced by the one before"
        clip.notes.append(f"{dropped} near-duplicate frames were {what}")


def _take_sound(clip: Clip, media: Media, plan: SoundPlan, span: _Span) -> None:
    policy = POLICIES[plan.policy]
    if media.kind == "audio":
        _note_crop(clip, clip.seconds or 0.0, plan)
        seconds = plan.seconds if span.length is None else min(plan.seconds, span.length)
        sound = media.read_audio(seconds=seconds, start=span.offset, timed=not span.whole)
        try:
            clip.sound = policy.alone(sound.samples, sound.sample_rate, plan.num_samples)
        except MediaError as error:
            raise MediaError(f"{media.path}: {error}") from None
        return
    try:
        clips = media.read_audio_parts(plan.sample_rate, policy.bounds, span.length, span.offset, timed=not span.whole)
        clip.sound = join_clips(clips, plan.num_samples)
    except MediaError as error:
        # The reference hears 30 s of silence here; the pictures alone say as much, at half the tokens.
        clip.notes.append(f"the sound cannot be used ({error}): captioned from the pictures alone")


def _note_crop(clip: Clip, seconds: float, plan: SoundPlan) -> None:
    if seconds > plan.seconds:
        clip.notes.append(f"the sound lasts {seconds:.0f} s: its first {plan.seconds:.0f} s were heard")
