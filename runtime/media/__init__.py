"""Opening media: video and sound files, still images, folders of images and arrays.

Nothing heavy is imported before a file is opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import MediaError
from .arrays import as_frames, as_waveform
from .doors import media_errors
from .image_files import PNG
from .source import FrameReader, Media, SoundReader, Waveform

#: A scheme of two letters or more: ``C:`` is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

__all__ = ["FrameReader", "Media", "SoundReader", "Waveform", "as_frames", "as_waveform", "open_media"]


def open_media(source: str | os.PathLike[str], threads: int | None = None) -> Media:
    """Open a video, sound or image file, an animated GIF or a folder of images; close it with ``with``.

    ``threads``: how many of the processor decode video, one a core when ``None``.
    What a file is, its content says, not its name. Only local files are opened, and nothing that a file refers to.
    ``MediaError`` (one line that names the file) for what is missing, empty, unreadable, of an unknown format, cut
    short before its index, without video and sound, without frames, or absurdly large.
    """
    if not isinstance(source, (str, os.PathLike)) or isinstance(os.fspath(source), bytes):
        raise MediaError(
            f"a clip is a path (str or pathlib.Path), not {type(source).__name__}: write it to a file first"
        )
    name = os.fspath(source)
    if _URL.match(name):
        raise MediaError(f"{name}: URLs are not read; download it and give the file")
    with media_errors(name):
        return _open(Path(name), threads)


def _open(path: Path, threads: int | None) -> Media:
    name = str(path)
    try:
        if path.is_dir():
            from .images import open_folder

            return open_folder(path)
        if path.exists() and not path.is_file():
            # Opening a pipe would wait for a writer, perhaps for ever.
            raise MediaError(f"{name}: is a pipe or a device; write it to a file first")
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file or folder") from None
    if not head:
        raise MediaError(f"{name}: the file is empty")
    from .image_files import is_animated
    from .images import is_still_image, open_image, open_webp_animation

    animated = is_animated(path, head)
    if is_still_image(head) and not animated:
        return open_image(path)
    if animated and not head.startswith(PNG):
        return open_webp_animation(path)
    from .files import open_container

    return open_container(path, threads)
