"""Video and sound files: what is in one, and which readers it gets."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import MediaError, OptionError
from .container import audio_stream, close_input, has_unknown_video, open_input, video_stream
from .mp4 import check_samples
from .sound import ContainerSoundReader
from .source import Media, check_size, check_total
from .video import ContainerFrameReader

#: Who decodes video: ``pyav`` or ``gstreamer``. A setting of the machine, so it is in its environment.
DECODER_VARIABLE = "INTERTITLE_VIDEO_DECODER"


#: Frames that a decoder and the conversion to RGB hold at once, about.
_DECODING = 8


def _frame_reader() -> type[ContainerFrameReader]:
    name = os.environ.get(DECODER_VARIABLE) or "pyav"
    if name == "gstreamer":
        from .gstreamer import GStreamerFrameReader

        return GStreamerFrameReader
    if name != "pyav":
        raise OptionError(f"{DECODER_VARIABLE} is {name!r}; it can be pyav or gstreamer")
    return ContainerFrameReader


def open_container(path: Path, threads: int | None = None) -> Media:
    """A video, sound or animated GIF file as ``Media``. Pictures attached to a sound (cover art) are no video.

    ``threads``: as for ``open_media``.
    """
    check_samples(path)
    container = open_input(path)
    try:
        video, audio = video_stream(container), audio_stream(container)
        sound = ContainerSoundReader(path, container, audio) if audio is not None else None
        if video is None:
            if sound is None:
                if container.streams.video or container.streams.audio:
                    raise MediaError(f"{path}: its video or sound is in a codec that cannot be decoded here")
                raise MediaError(f"{path}: holds neither video nor sound")
            notes = ["its pictures are in a codec that cannot be decoded here"] if has_unknown_video(container) else []
            close_input(container)
            return Media(path, "audio", sound=sound, notes=notes)
        size = video.codec_context.width, video.codec_context.height
        check_size(str(path), *size)
        check_total(str(path), *size, _DECODING, path.stat().st_size)
        notes = []
        if sound is None and container.streams.audio:
            notes.append("its sound is in a codec that cannot be decoded here")
        frames = _frame_reader()(path, container, threads)
        if sound is not None:
            sound.origin = frames.origin
        return Media(path, "video", frames, sound, notes)
    except BaseException:
        close_input(container)
        raise
