"""Opening media: video and sound files, still images, folders of images and arrays.

Nothing heavy is imported before a file is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import MediaError
from .arrays import as_frames, as_waveform
from .source import FrameReader, Media, SoundReader, Waveform

__all__ = ["FrameReader", "Media", "SoundReader", "Waveform", "as_frames", "as_waveform", "open_media"]


def open_media(source: str | os.PathLike[str]) -> Media:
    """Open a video, sound or image file, an animated GIF or a folder of images; close it with ``with``.

    What a file is, its content says, not its name. Only local files are opened, and nothing that a file refers to.
    ``MediaError`` (one line that names the file) for what is missing, empty, unreadable, of an unknown format, cut
    short before its index, without video and sound, without frames, or absurdly large.
    """
    name = os.fspath(source)
    path = Path(source)
    try:
        if path.is_dir():
            from .images import open_folder

            return open_folder(path)
        if path.exists() and not path.is_file():
            # Opening a pipe would wait for a writer, perhaps for ever.
            raise MediaError(f"{name}: is a pipe or a device; write it to a file first")
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not head:
        raise MediaError(f"{name}: the file is empty")
    from .images import is_still_image, open_image

    if is_still_image(head):
        return open_image(path)
    from .files import open_container

    return open_container(path)
