"""Cutting a long video into spans that are captioned one by one: by length, or where the scene changes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MediaError, OptionError
from .container import close_input, open_input, video_stream
from .doors import media_errors
from .rgb import RgbConverter
from .video import ContainerFrameReader

Span = tuple[float, float]

#: The shortest piece that is cut, in seconds.
SHORTEST = 0.1
#: The most segments of one file: a day in pieces of less than a second.
MOST_SEGMENTS = 100_000
#: So many segments are cut even of a film of fewer frames (a slide show).
_FEW_SEGMENTS = 1_000
#: Scene detection looks at frames of about this width; PySceneDetect's own ``auto_downscale`` aims at 256.
_WIDTH = 256


def fixed_spans(duration: float, seconds: float) -> list[Span]:
    """``(start, end)`` in seconds of the pieces of ``seconds`` that ``duration`` is cut into, end to end.

    What is left over is a piece of its own, or, when shorter than a quarter of ``seconds``, joins the piece before.
    ``OptionError`` for pieces of less than 0.1 s, ``MediaError`` for a source that has no duration.
    """
    if not (math.isfinite(seconds) and seconds >= SHORTEST):
        raise OptionError(f"segments are {SHORTEST} s or longer, not {seconds:g} s")
    if not (math.isfinite(duration) and duration > 0):
        raise MediaError("a source without a duration cannot be cut into segments")
    whole = int(duration / seconds)
    # Of ten pieces of 0.1 s nothing is left, whatever the rounding of their sum.
    left = duration - whole * seconds
    count = max(whole + (left >= seconds / 4), 1)
    bounds = [piece * seconds for piece in range(count)] + [duration]
    return list(itertools.pairwise(bounds))


def media_duration(path: str | os.PathLike[str]) -> float | None:
    """Seconds that a video or a sound lasts; ``None`` for an image and where nobody knows."""
    from . import open_media

    with open_media(path) as media:
        return None if media.kind == "image" else media.duration or None


def media_spans(path: str | os.PathLike[str], segments: float | None) -> list[Span]:
    """The segments of a file: of ``segments`` seconds, or (``None``) its scenes. None where it stays whole.

    An image stays whole, and so does a sound or an animated WebP that was to be cut into scenes. ``MediaError`` for a
    file that would give more segments than it has frames or, without pictures, than ``MOST_SEGMENTS``: its duration
    cannot be real.
    """
    from . import open_media

    with open_media(path) as media:
        kind, duration, frames = media.kind, media.duration, media.num_frames
        has_scenes = isinstance(media._frames, ContainerFrameReader)
    if kind == "image" or (segments is None and not has_scenes and Path(path).is_file()):
        return []
    if segments is None:
        return scene_spans(path)
    count = duration / segments
    if count > MOST_SEGMENTS or (kind == "video" and count > frames + 1 and count > _FEW_SEGMENTS):
        held = f"{frames} frames" if kind == "video" else "sound"
        raise MediaError(f"{os.fspath(path)}: lasts {duration:.6g} s with {held}: not cut into {count:.0f} segments")
    return fixed_spans(duration, segments)


def scene_spans(path: str | os.PathLike[str], threshold: float = 27.0, min_seconds: float = 1.0) -> list[Span]:
    """``(start, end)`` in seconds of the scenes of a video, end to end; one span where there is no cut.

    By PySceneDetect's ``ContentDetector``: a cut is where hue, saturation and brightness of one frame differ from the
    last by ``threshold`` (0 to 255, its default 27) on average; scenes shorter than ``min_seconds`` are joined. Decodes
    the whole video. ``OptionError`` without the library or for settings that cannot be, ``MediaError`` for a file
    without video.
    """
    if not 0 < threshold <= 255:
        raise OptionError(f"the threshold for a cut is more than 0 and up to 255, not {threshold:g}")
    if not (math.isfinite(min_seconds) and min_seconds >= 0):
        raise OptionError(f"scenes last 0 s or longer, not {min_seconds:g} s")
    detector, timecode = _detector(threshold, min_seconds)
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: no such file" if not path.exists() else f"{path}: is no video file")
    end = 0.0
    cuts: list[float] = []
    with media_errors(str(path)):
        # Cuts are told by the true time of a frame, not by counting at an average rate.
        for time, stop, image in _small_frames(path):
            end = stop
            cuts += [cut.seconds for cut in detector.process_frame(timecode(time), image)]
    if not end:
        raise MediaError(f"{path}: no frame of the video can be decoded")
    # Times of millions of years are so far apart that a cut may fall on the end.
    bounds = [0.0, *(cut for cut in cuts if 0 < cut < end), end]
    return list(itertools.pairwise(bounds))


def _detector(threshold: float, min_seconds: float) -> tuple[Any, Any]:
    """A ``ContentDetector``, and what makes its time of a number of seconds."""
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import ContentDetector
    except ImportError as error:
        raise OptionError(
            f"cutting at scenes needs PySceneDetect ({error}): pip install 'intertitle[scenes]'"
        ) from None
    # In milliseconds, finer than any frame rate: what counts is when a frame is shown.
    return ContentDetector(threshold, float(min_seconds)), lambda seconds: FrameTimecode(round(seconds * 1000), 1000.0)


def _small_frames(path: Path) -> Iterator[tuple[float, float, np.ndarray]]:
    """When each frame that can be decoded is shown, when the video ends, and BGR uint8 ``[H, W, 3]``, scaled down.

    In seconds from the first frame on. All are of one size, whatever becomes of the video's.
    """
    container = open_input(path)
    try:
        if video_stream(container) is None:
            raise MediaError(f"{path}: holds no video that can be cut into scenes")
        reader = ContainerFrameReader(path, container)
    except BaseException:
        close_input(container)
        raise
    convert = RgbConverter(reader.notes)
    size: tuple[int, int] | None = None
    try:
        for time, frame in reader.walk():
            if size is None:
                width = min(frame.width, _WIDTH)
                size = width, max(frame.height * width // frame.width, 1)
            yield time, max(reader.duration, time), convert.small(frame, *size).to_ndarray()
    finally:
        reader.close()
