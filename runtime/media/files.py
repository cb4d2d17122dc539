"""Video and sound files: what is in one, and which readers it gets."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import MediaError, OptionError
from .container import audio_stream, open_input, video_stream
from .sound import ContainerSoundReader
from .source import Media, check_size
from .video import ContainerFrameReader

#: Who decodes video: ``pyav`` or ``gstreamer``. A setting of the machine, so it is in its environment.
DECODER_VARIABLE = "INTERTITLE_VIDEO_DECODER"


def _frame_reader() -> type[ContainerFrameReader]:
    name = os.environ.get(DECODER_VARIABLE) or "pyav"
    if name == "gstreamer":
        from .gstreamer import GStreamerFrameReader

        return GStreamerFrameReader
    if name != "pyav":
        raise OptionError(f"{DECODER_VARIABLE} is {name!r}; it can be pyav or gstreamer")
    return ContainerFrameReader


def open_container(path: Path) -> Media:
    """A video, sound or animated GIF file as ``Media``. Pictures attached to a sound (cover art) are no video."""
    container = open_input(path)
    try:
        video, audio = video_stream(container), audio_stream(container)
        sound = ContainerSoundReader(path, container, audio) if audio is not None else None
        if video is None:
            if sound is None:
                if container.streams.video or container.streams.audio:
                    raise MediaError(f"{path}: its video or sound is in a codec that cannot be decoded here")
                raise MediaError(f"{path}: holds neither video nor sound")
            container.close()
            return Media(path, "audio", sound=sound)
        check_size(str(path), video.codec_context.width, video.codec_context.height)
        return Media(path, "video", _frame_reader()(path, container), sound)
    except BaseException:
        container.close()
        raise
