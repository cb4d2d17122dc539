"""Still images, and folders of them taken as the frames of a clip.

OpenCV decodes them: its pixels are those of Pillow, which the reference reads images with; FFmpeg interpolates the
chroma of JPEG and WebP in another way. An animated WebP is a video, which OpenCV decodes as well (an animated PNG is
one for FFmpeg). A rotation that a photo's EXIF data ask for is applied, as for video (the reference leaves it out).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from ...errors import MediaError
from .image_files import PNG, image_size, read_image_file, still_png, webp_animation
from .source import MAX_PIXELS, FrameArray, Media, check_size, check_total

#: VideoLLaMA2 mm_utils.py: a folder of images is a video of 3 frames a second.
FOLDER_FPS = 3.0

_JPEG = b"\xff\xd8\xff"
_SIGNATURES = (_JPEG, PNG, b"BM", b"II*\0", b"MM\0*")
#: Milliseconds of a frame of an animation that states less than 11: what browsers show.
_SHORT, _USUAL = 10, 100


def is_still_image(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (16 bytes) is a JPEG, PNG, BMP, TIFF, WebP or AVIF image."""
    boxed = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return head.startswith(_SIGNATURES) or boxed or head[4:12] == b"ftypavif"


def open_image(path: Path) -> Media:
    """A still image as ``Media`` of one frame."""
    return Media(path, "image", ImageReader([path], 0.0))


def open_folder(path: Path) -> Media:
    """The images in a folder (other files are passed over), in natural order: ``frame2`` before ``frame10``."""
    files = sorted((file for file in path.iterdir() if _is_image_file(file)), key=_natural_order)
    if not files:
        raise MediaError(f"{path}: the folder holds no images")
    return Media(path, "video", ImageReader(files, FOLDER_FPS))


class ImageReader:
    """A ``FrameReader`` over image files of one size, one frame each."""

    def __init__(self, files: list[Path], fps: float) -> None:
        self._files = files
        self.num_frames = len(files)
        self.fps = fps
        self.duration = len(files) / fps if fps else 0.0
        self.times = None
        self.notes: list[str] = []
        self._first = _decode(files[0])

    @property
    def size(self) -> tuple[int, int]:
        return self._first.shape[1], self._first.shape[0]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, FrameArray]]:
        for index in indices:
            frame = self._first if index == 0 else _decode(self._files[index])
            if frame.shape != self._first.shape:
                width, height = self.size
                raise MediaError(
                    f"{self._files[index]}: {frame.shape[1]}x{frame.shape[0]} pixels among images of {width}x{height}"
                )
            yield index, frame

    def close(self) -> None:
        pass


def open_webp_animation(path: Path) -> Media:
    """An animated WebP as ``Media``; ``MediaError`` for a damaged one."""
    return Media(path, "video", WebpReader(path))


class WebpReader:
    """A ``FrameReader`` over an animated WebP file, all of whose frames are decoded at once."""

    def __init__(self, path: Path) -> None:
        content = read_image_file(path)
        try:
            width, height, count = webp_animation(content)
        except ValueError as error:
            raise MediaError(f"{path}: the image {error}") from None
        check_size(str(path), width, height)
        check_total(str(path), width, height, count * 4 / 3, len(content))
        cv2 = _opencv()
        with _silent(cv2):
            try:
                done, animation = cv2.imdecodeanimation(np.frombuffer(content, np.uint8))
            except cv2.error:
                done, animation = False, cv2.Animation()
        if not done or not animation.frames:
            raise MediaError(f"{path}: the image is damaged or of an unknown kind")
        self._images: Sequence[FrameArray] = animation.frames
        lasting = [_USUAL if time <= _SHORT else time for time in map(int, animation.durations)]
        self.num_frames = len(self._images)
        self.times = np.cumsum([0, *lasting[:-1]]) / 1000
        self.duration = sum(lasting) / 1000
        self.fps = self.num_frames / self.duration
        self.notes: list[str] = []

    @property
    def size(self) -> tuple[int, int]:
        return self._images[0].shape[1], self._images[0].shape[0]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, FrameArray]]:
        for index in indices:
            yield index, np.ascontiguousarray(self._images[index][:, :, 2::-1])

    def close(self) -> None:
        self._images = ()


def _is_image_file(file: Path) -> bool:
    if file.name.startswith(".") or not file.is_file():
        return False
    try:
        with file.open("rb") as stream:
            return is_still_image(stream.read(16))
    except OSError:
        return False


def _natural_order(file: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", file.name)
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _decode(path: Path) -> FrameArray:
    """RGB uint8 ``[H, W, 3]``: alpha dropped, grey and palettes expanded, 16 bits cut to 8."""
    content = read_image_file(path)
    if content.startswith(PNG):
        try:
            content = still_png(content)
        except ValueError as error:
            raise MediaError(f"{path}: the image {error}") from None
    try:
        stated = image_size(content)
    except ValueError as error:
        raise MediaError(f"{path}: the image {error}") from None
    if stated is not None:
        check_size(str(path), *stated)
    cv2 = _opencv()
    with _silent(cv2):
        try:
            bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            bgr = None
    # Before version 5, OpenCV fills the missing part of a JPEG with grey: is there an end after the start of the scan?
    ends = not content.startswith(_JPEG) or content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    if bgr is None or not ends:
        raise MediaError(f"{path}: the image is damaged, too large or of an unknown kind")
    check_size(str(path), bgr.shape[1], bgr.shape[0])
    return np.ascontiguousarray(bgr[:, :, ::-1])


@contextmanager
def _silent(cv2: ModuleType) -> Iterator[None]:
    """OpenCV without its log lines."""
    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 5, OpenCV 4
    level = logging.getLogLevel()
    logging.setLogLevel(0)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _opencv() -> ModuleType:
    # Read when OpenCV is loaded: it then refuses larger images by their headers.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    try:
        import cv2
    except ImportError as error:
        raise MediaError(
            f"images need OpenCV, which does not load here ({error}); opencv-python-headless needs no display libraries"
        ) from error
    return cv2
