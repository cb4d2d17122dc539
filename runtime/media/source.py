"""An opened source, and the two seams behind it: something that reads frames and something that reads sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import MediaError

FrameArray = npt.NDArray[np.uint8]
#: From a number of samples to parts of them, (first, last) each.
Choice = Callable[[int], list[tuple[int, int]]]

#: The largest width or height that is taken for real (8K video is 7680 wide).
MAX_SIDE = 16_384
#: The most pixels of a frame: a photo of 100 megapixels, four frames of 8K.
MAX_PIXELS = 1 << 27
#: Bytes that the frames of a clip may take together: 16 frames of 8K are 1.6 GB.
MAX_FRAME_BYTES = 1 << 31
#: What the frames of any file may take: 16 frames of 4K are 0.4 GB. A decoder holds some frames besides.
_ALWAYS = 1 << 29
#: Bytes of frames beyond that for each byte of the file. Video of 8K has some megabytes a second; a damaged header of a
#: few kilobytes may state any size.
_PER_BYTE = 4096


@dataclass(frozen=True, eq=False)
class Waveform:
    """Sound as float32 in [-1, 1]: ``samples [n]`` (mono) or ``[channels, n]``, at ``sample_rate`` Hz."""

    samples: npt.NDArray[np.float32]
    sample_rate: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples.shape[-1] / self.sample_rate


class FrameReader(Protocol):
    """The pictures of one source. Another way to decode (GStreamer, NVDEC) is another class with these members.

    ``num_frames`` counts the frames that there are to read, ``fps`` is their average rate (0.0 where there is none),
    ``duration`` in seconds. ``times`` float64 ``[num_frames]``: when each is shown, in seconds from the first one on;
    ``None`` where the file does not say. ``notes`` grows by a line for whatever was substituted.
    """

    num_frames: int
    fps: float
    duration: float
    notes: list[str]

    @property
    def times(self) -> npt.NDArray[np.float64] | None: ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames as read, after any rotation."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, FrameArray]]:
        """Each of ``indices`` (distinct, ascending, in range) once, with its frame uint8 ``[H, W, 3]`` RGB.

        In any order. A frame that cannot be decoded is replaced by the nearest earlier one that can, and ``notes``
        says so; ``MediaError`` when none can.
        """
        ...

    def close(self) -> None: ...


class SoundReader(Protocol):
    """The sound of one source: ``sample_rate`` and ``num_channels`` as stored, ``duration`` in seconds."""

    sample_rate: int
    num_channels: int
    notes: list[str]

    @property
    def duration(self) -> float: ...

    def read(
        self, rate: int | None = None, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> Waveform:
        """See ``Media.read_audio``."""
        ...

    def read_parts(
        self, rate: int, choose: Choice, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> list[npt.NDArray[np.float32]]:
        """See ``Media.read_audio_parts``."""
        ...


class Media:
    """What ``open_media`` returns. ``kind`` is ``video`` (with or without sound), ``image`` or ``audio``.

    ``num_frames`` counts frames that can be read (1 for an image, 0 for a sound), ``fps`` is their average rate (0.0
    without), ``times`` when each is shown (``FrameReader``), ``duration`` is in seconds (0.0 for an image). ``notes``
    says what was substituted so far.
    """

    def __init__(
        self,
        path: Path,
        kind: Literal["video", "image", "audio"],
        frames: FrameReader | None = None,
        sound: SoundReader | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._notes = tuple(notes)
        self.kind: Literal["video", "image", "audio"] = kind
        self._frames, self._sound = frames, sound
        self.has_video = frames is not None
        self.has_audio = sound is not None
        self.num_frames = frames.num_frames if frames else 0
        self.fps = frames.fps if frames else 0.0
        self.times = frames.times if frames else None
        self.duration = frames.duration if frames else sound.duration if sound else 0.0

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *(note for reader in (self._frames, self._sound) if reader for note in reader.notes)]

    @property
    def width(self) -> int:
        """Pixels of a frame as read, rotation included; 0 for a sound."""
        return self._frames.size[0] if self._frames else 0

    @property
    def height(self) -> int:
        """Pixels of a frame as read, rotation included; 0 for a sound."""
        return self._frames.size[1] if self._frames else 0

    def read_frames(self, indices: npt.ArrayLike) -> FrameArray:
        """RGB frames uint8 ``[T, H, W, 3]`` at ``indices [T]`` in presentation order; indices may repeat.

        A frame of a damaged video that cannot be decoded is replaced by the nearest earlier one that can, and
        ``notes`` says so. ``MediaError`` when none can, or there is no video; ``IndexError`` outside ``num_frames``.
        """
        reader = self._reader()
        wanted, unique, places = self._checked(indices)
        frames: FrameArray | None = None
        for index, frame in reader.read(unique.tolist()):
            if frames is None:
                held = self.path.stat().st_size if self.path.is_file() else None
                check_total(str(self.path), frame.shape[1], frame.shape[0], len(wanted), held)
                frames = np.empty((len(wanted), *frame.shape), np.uint8)
            if frame.shape != frames.shape[1:]:
                raise MediaError(f"{self.path}: its frames are turned by 90 degrees midway, which is not read")
            frames[places == np.searchsorted(unique, index)] = frame
        return np.empty((0, self.height, self.width, 3), np.uint8) if frames is None else frames

    def read_audio(
        self, rate: int | None = None, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> Waveform:
        """The sound: as stored (float32 ``[channels, n]`` at its own rate), or mono ``[n]`` at ``rate`` Hz.

        With a ``rate`` the samples are the 16-bit ones that ``ffmpeg -ac 1 -ar RATE -f s16le`` writes, over 2**15 (the
        reference's way for video files). ``start`` (seconds) leaves out what comes before, ``seconds`` stops after so
        much: the samples are those of a slice of the whole sound, little more than which is decoded. ``timed``: seconds
        are those of the pictures, by the timestamps, and there is silence where the file has no sound; else the samples
        are put end to end, as the reference does. ``MediaError`` without sound, or when it ends before ``start``.
        """
        if self._sound is None:
            raise MediaError(f"{self.path}: has no sound")
        return self._sound.read(rate, seconds, start, timed=timed)

    def read_audio_parts(
        self, rate: int, choose: Choice, seconds: float | None = None, start: float = 0.0, *, timed: bool = False
    ) -> list[npt.NDArray[np.float32]]:
        """Parts of what ``read_audio`` gives for the same arguments, float32 ``[last - first]`` each.

        ``choose`` is told how many samples there are and says which it wants, as pairs (first, last) in their range.
        Of a long sound little more than these is held in memory.
        """
        if self._sound is None:
            raise MediaError(f"{self.path}: has no sound")
        return self._sound.read_parts(rate, choose, seconds, start, timed=timed)

    def close(self) -> None:
        if self._frames:
            self._frames.close()

    def __enter__(self) -> Media:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reader(self) -> FrameReader:
        if self._frames is None:
            raise MediaError(f"{self.path}: holds only sound, no video")
        return self._frames

    def _checked(self, indices: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray]:
        """``indices`` as int64, the distinct ones ascending, and the place of each among these."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_frames:
            raise IndexError(
                f"frame indices {wanted.min()}..{wanted.max()} of {self.path}, which has {self.num_frames}"
            )
        unique, places = np.unique(wanted, return_inverse=True)
        return wanted, unique, places


def check_size(name: str, width: int, height: int) -> None:
    """``MediaError`` for pictures without an area or larger than any real one."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{name}: frames of {width}x{height} pixels (each side must be 1 to {MAX_SIDE})")
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: frames of {width}x{height} pixels (up to {MAX_PIXELS / 1e6:.0f} million are read)")


def check_total(name: str, width: int, height: int, count: float, held: int | None = None) -> None:
    """``MediaError`` for more pictures of this size than are held at once, or than a file of ``held`` bytes has."""
    limit = MAX_FRAME_BYTES if held is None else min(MAX_FRAME_BYTES, max(_ALWAYS, held * _PER_BYTE))
    if width * height * 3 * count > limit:
        raise MediaError(
            f"{name}: {count:.0f} frames of {width}x{height} pixels take {width * height * 3 * count / 2**30:.1f} GiB; "
            f"of {'arrays' if held is None else 'a file of this size'} up to {limit / 2**30:.3g} GiB are held"
        )
