"""FFmpeg containers through PyAV: opening one, and choosing its streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.error import FFmpegError

from ...errors import MediaError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

#: The only formats that are tried: FFmpeg also takes text for ANSI art, and playlists that name other files or hosts.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,apng,asf,au,av1,avi,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,"
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,ogg,rm,tta,vc1,w64,wav,wv,"
    "yuv4mpegpipe"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


def open_input(path: Path) -> InputContainer:
    """The file as an FFmpeg container, or ``MediaError``. Log lines of the libraries stay off (PyAV's default)."""
    try:
        # With "file:", a colon or a % in the name is nothing special.
        return av.open(f"file:{path.absolute()}", "r", container_options=dict(_OPTIONS), metadata_errors="replace")
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: {_why_unreadable(path, error)}") from error


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets, the empty one that flushes a decoder last; a file that breaks off just ends."""
    found = container.demux(stream)
    while True:
        try:
            packet = next(found, None)
        except FFmpegError:
            return
        if packet is None:
            return
        yield packet


def video_stream(container: InputContainer) -> VideoStream | None:
    """The video stream that FFmpeg would choose, if a decoder knows it; attached pictures are passed over."""
    streams = [s for s in container.streams.video if s.codec_context is not None and not _is_attached_picture(s)]
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0] if streams else None)


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound stream that FFmpeg would choose, if a decoder knows it."""
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    best = container.streams.best("audio")
    return next((stream for stream in streams if stream is best), streams[0] if streams else None)


def _is_attached_picture(stream: VideoStream) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        head = b""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "HEIF images are not supported: convert it to JPEG or PNG"
    if head[4:8] in (b"ftyp", b"mdat", b"moov", b"free", b"wide"):
        return "an incomplete MP4 or MOV file: its index is missing or damaged (a cut-off recording or download?)"
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied)"
    return "not a video, sound or image file of a known format"
