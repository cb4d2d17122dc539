"""FFmpeg containers through PyAV: opening one, and choosing its streams."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import av
from av.error import FFmpegError
from av.format import Flags

from ...errors import MediaError, TransientMediaError
from .doors import media_errors

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

#: Streams of frames without a header that counts them.
_UNMEASURED = frozenset(("aac", "ac3", "amr", "amrnb", "amrwb", "dts", "eac3", "mp3"))

AnyStream = TypeVar("AnyStream")

#: The only formats that are tried: FFmpeg also takes text for ANSI art, and playlists that name other files or hosts.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,apng,asf,au,av1,avi,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,"
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,ogg,rm,tta,vc1,w64,wav,wv,"
    "yuv4mpegpipe"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
#: Titles that are no UTF-8 are no reason to fail. PyAV 19 has no such argument and always replaces what it cannot read.
_METADATA: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class _File(io.FileIO):
    """A file as FFmpeg reads it. ``failed``: the system's error that ended a read, which the demuxers hide.

    To FFmpeg the file then just ends.
    """

    failed: OSError | None = None

    def read(self, size: int | None = -1, /) -> bytes:  # type: ignore[override]
        try:
            return self._read(size)
        except OSError as error:
            self.failed = error
            return b""

    def _read(self, size: int | None) -> bytes:
        return super().read(size) or b""

    def __del__(self) -> None:
        self.close()


def open_input(path: Path) -> InputContainer:
    """The file as an FFmpeg container for ``close_input``. Log lines of the libraries stay off (PyAV's default).

    ``MediaError`` for what cannot be read, ``TransientMediaError`` where the system is the reason.
    """
    with media_errors(str(path)):
        file = _File(os.fspath(path.absolute()))
    try:
        container = av.open(file, "r", container_options=dict(_OPTIONS), **_METADATA)
    except (FFmpegError, OSError, ValueError, LookupError) as error:
        failed = file.failed
        file.close()
        if failed:
            raise _unread(str(path), failed) from error
        if isinstance(error, MemoryError):
            raise TransientMediaError(f"{path}: there is not enough memory to read it") from error
        raise MediaError(f"{path}: {_why_unreadable(path)}") from error
    _refuse_unread(container)
    return container


def close_input(container: InputContainer) -> None:
    """Close the container and its file."""
    container.close()
    _file_of(container).close()


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """``open_input``, closed at the end."""
    container = open_input(path)
    try:
        yield container
    finally:
        close_input(container)


def read_packets(
    container: InputContainer, stream: AudioStream | VideoStream, damaged: Callable[[], None] = lambda: None
) -> Iterator[Packet[Any]]:
    """The stream's packets, the empty one that flushes a decoder last.

    A file that breaks off just ends, after a call of ``damaged``. ``TransientMediaError`` where the
    system could not read on.
    """
    found: Iterator[Packet[Any]] = container.demux(stream)
    while True:
        try:
            packet = next(found, None)
        except FFmpegError:
            _refuse_unread(container)
            damaged()
            return
        except IndexError:
            # A packet of a stream that appeared after the file was opened, which PyAV does not know: on with the next.
            found = container.demux(stream)
            continue
        if packet is None or not packet.size:
            _refuse_unread(container)
        if packet is None:
            return
        yield packet


def _refuse_unread(container: InputContainer) -> None:
    file = _file_of(container)
    if file.failed:
        close_input(container)
        raise _unread(os.fsdecode(file.name), file.failed)


def _file_of(container: InputContainer) -> _File:
    # PyAV wraps it.
    return container.file.file


def _unread(name: str, error: OSError) -> TransientMediaError:
    return TransientMediaError(f"{name}: cannot be read ({error.strerror})")


def video_stream(container: InputContainer) -> VideoStream | None:
    """The video stream that FFmpeg would choose, if a decoder knows it; attached pictures are passed over."""
    streams = [s for s in container.streams.video if s.codec_context is not None and not _is_attached_picture(s)]
    return _best(container, "video", streams)


def has_unknown_video(container: InputContainer) -> bool:
    """Whether there are pictures, other than attached ones, that no decoder here knows."""
    return any(not _is_attached_picture(stream) for stream in container.streams.video) or any(
        stream.type == "video" for stream in container.streams if stream not in container.streams.video
    )


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound stream that FFmpeg would choose, if a decoder knows it."""
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    return _best(container, "audio", streams)


def _best(container: InputContainer, kind: Literal["video", "audio"], streams: list[AnyStream]) -> AnyStream | None:
    try:
        best = container.streams.best(kind)
    except IndexError:
        # FFmpeg chose a stream that appeared after the file was opened, which PyAV does not know.
        best = None
    return next((stream for stream in streams if stream is best), streams[0] if streams else None)


def refuse_encrypted(path: Path, packet: Packet) -> None:
    """``MediaError`` for a packet that FFmpeg has no key for (Common Encryption of MP4, WebM)."""
    # PyAV 15 and 16 do not show what lies beside a packet. Of Matroska, FFmpeg shows the key's name.
    beside = hasattr(packet, "has_sidedata") and packet.has_sidedata("encryption_info")
    if beside or "enc_key_id" in packet.stream.metadata:
        raise MediaError(f"{path}: is encrypted: it can be captioned only once it is decrypted")


def has_jumps(container: InputContainer) -> bool:
    """Whether the format's clock may jump, as where recordings were joined (MPEG-TS)."""
    return bool(container.format.flags & Flags.ts_discont.value)


def is_measured(container: InputContainer) -> bool:
    """Whether the format states how long its streams last. Elsewhere FFmpeg guesses from the bit rate, or from the
    first and the last timestamp."""
    return not has_jumps(container) and not _UNMEASURED.intersection(container.format.name.split(","))


def _is_attached_picture(stream: VideoStream) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _why_unreadable(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "HEIF images are not supported: convert it to JPEG or PNG"
    if head[4:8] in (b"ftyp", b"mdat", b"moov", b"free", b"wide"):
        return "an incomplete MP4 or MOV file: its index is missing or damaged (a cut-off recording or download?)"
    if head[257:262] == b"ustar" or head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        return "is an archive: unpack it first"
    return "not a video, sound or image file of a known format"
