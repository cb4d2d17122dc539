"""The fuzzer's originals: tiny whole media files of many formats, made here and not committed."""

from __future__ import annotations

import io
import os
import struct
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

_EXACT = {"fflags": "+bitexact"}
_PICTURES = 12
_RATE = 12


def make_corpus(folder: Path) -> list[Path]:
    """Write all originals that the libraries here can write into ``folder``; sorted paths of a few KB each.

    The content depends on nothing but the versions of the libraries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The AV1 encoder else tells its settings on stderr.
    os.environ.setdefault("SVT_LOG", "0")
    for name, make in _ORIGINALS.items():
        path = folder / name
        if path.exists():
            continue
        try:
            content = make(name)
        except (FFmpegError, ValueError, OSError, KeyError, ImportError):
            # An encoder or a muxer that this build lacks.
            continue
        path.write_bytes(content)
    return sorted(path for path in folder.iterdir() if path.name in _ORIGINALS and path.stat().st_size)


def _picture(index: int, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    # Half of the pictures look wholly different: there is a scene to cut.
    base = 150 if index >= _PICTURES // 2 else 0
    return np.stack([x * 2 + index * 5, y * 2 + base, x + y + index * 3], -1).astype(np.uint8)


def _tone(count: int, channels: int, rate: int) -> np.ndarray:
    """float32 ``[channels, count]``."""
    time = np.arange(count) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (300 + 50 * each) * time) for each in range(channels)]).astype(np.float32)


def _film(
    codec: str | None = "libx264",
    pix_fmt: str = "yuv420p",
    sound: str | None = None,
    *,
    size: tuple[int, int] = (48, 32),
    count: int = _PICTURES,
    rate: int = _RATE,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    sample_rate: int = 16_000,
    layout: str = "mono",
    sample_format: str | None = None,
    seconds: float = 1.0,
    form: str | None = None,
) -> Callable[[str], bytes]:
    def make(name: str) -> bytes:
        buffer = _Buffer(name)
        with av.open(buffer, "w", format=form, options={**_EXACT, **(container or {})}) as output:
            streams: list[tuple[Any, list[Any]]] = []
            if codec:
                video: Any = output.add_stream(codec, rate=rate, options={"flags": "+bitexact", **(options or {})})
                video.width, video.height, video.pix_fmt = *size, pix_fmt
                video.thread_count = 1
                pictures = []
                for index in range(count):
                    frame = av.VideoFrame.from_ndarray(_picture(index, *size), "rgb24").reformat(format=pix_fmt)
                    frame.pts, frame.time_base = index, Fraction(1, rate)
                    pictures.append(frame)
                streams.append((video, pictures))
            if sound:
                more = {"flags": "+bitexact", "strict": "experimental"}
                audio: Any = output.add_stream(sound, rate=sample_rate, options=more)
                audio.layout, audio.bit_rate = layout, 32_000
                if sample_format:
                    audio.format = sample_format
                channels = audio.layout.nb_channels
                samples = _tone(round(sample_rate * seconds), channels, sample_rate)
                # Packed: PyAV must not be asked for the planes of eight channels.
                packed = np.ascontiguousarray(samples.T).reshape(1, -1)
                whole = av.AudioFrame.from_ndarray(packed, "flt", layout)
                whole.sample_rate, whole.pts, whole.time_base = sample_rate, 0, Fraction(1, sample_rate)
                convert = av.AudioResampler(audio.format, audio.layout, sample_rate, audio.frame_size or 1024)
                streams.append((audio, [part for frame in (whole, None) for part in convert.resample(frame) if part]))
            packets = []
            for stream, frames in streams:
                for frame in [*frames, None]:
                    packets += stream.encode(frame)
            # By time, as a recorder writes them.
            for packet in sorted(packets, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
                output.mux(packet)
        return buffer.getvalue()

    return make


class _Buffer(io.BytesIO):
    """FFmpeg tells the format by the name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def _wave(channels: int, width: int, rate: int) -> Callable[[str], bytes]:
    def make(name: str) -> bytes:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((channels, width, rate, 0, "NONE", "not compressed"))
            tone = (_tone(rate // 4, channels, rate).T * 2**15).astype("<i2")
            file.writeframes(tone.tobytes() if width == 2 else tone.astype("<i4").tobytes())
        return buffer.getvalue()

    return make


def _pillow(count: int = 1, mode: str = "RGB", **options: Any) -> Callable[[str], bytes]:
    def make(name: str) -> bytes:
        from PIL import Image

        pictures = [Image.fromarray(_picture(index * 3, 40, 24)).convert(mode) for index in range(count)]
        buffer = io.BytesIO()
        more = {"save_all": True, "append_images": pictures[1:], "duration": 100} if count > 1 else {}
        form = {"jpg": "JPEG", "tif": "TIFF", "apng": "PNG"}.get(name.split(".")[-1], name.split(".")[-1].upper())
        pictures[0].save(buffer, form, **more, **options)
        return buffer.getvalue()

    return make


def _joined(*parts: Callable[[str], bytes]) -> Callable[[str], bytes]:
    return lambda name: b"".join(part(name) for part in parts)


def _turned(make: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """With the display matrix of a phone held upright (ISO 14496-12, 8.3.2)."""

    def turn(name: str) -> bytes:
        content = bytearray(make(name))
        place = content.index(b"tkhd") + 44
        content[place : place + 20] = struct.pack(">5i", 0, 1 << 16, 0, -1 << 16, 0)
        return bytes(content)

    return turn


_MUX = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_SMALL = {"crf": "35", "preset": "veryfast", "g": "6"}
_H264 = {"options": _SMALL}
_HEVC = {"options": {"crf": "35", "preset": "ultrafast", "x265-params": "log-level=none"}, "size": (64, 64)}
_VPX = {"options": {"b": "40k", "deadline": "realtime", "cpu-used": "8"}}

#: What is made, by file name.
_ORIGINALS: dict[str, Callable[[str], bytes]] = {
    "h264.mp4": _film(**_H264),
    "h264-aac.mp4": _film(sound="aac", **_H264),
    "fragmented.mp4": _film(sound="aac", container=_MUX, **_H264),
    "turned.mp4": _turned(_film(**_H264)),
    "pcm.mov": _film("mjpeg", "yuvj420p", "pcm_s16le", sample_rate=8000, count=4),
    "prores.mov": _film("prores", "yuv422p10le", count=3, size=(32, 16)),
    "h264-aac.mkv": _film(sound="aac", **_H264),
    "ffv1-flac.mkv": _film("ffv1", "yuv420p", "flac", count=4, size=(32, 16), sample_format="s16"),
    "hevc.mkv": _film("libx265", **_HEVC),
    "vp8-opus.webm": _film("libvpx", sound="libopus", sample_rate=48_000, seconds=0.4, **_VPX),
    "vp9-opus.webm": _film("libvpx-vp9", sound="libopus", sample_rate=48_000, seconds=0.4, **_VPX),
    "mpeg4-mp3.avi": _film("mpeg4", sound="libmp3lame"),
    "pcm.avi": _film("mjpeg", "yuvj420p", "pcm_s16le", sample_rate=8000, count=4),
    "flv-mp3.flv": _film("flv", sound="libmp3lame", sample_rate=22_050),
    "h264-aac.flv": _film(sound="aac", sample_rate=44_100, **_H264),
    "h264-aac.ts": _film(sound="aac", **_H264),
    "joined.ts": _joined(_film(count=6, **_H264), _film(count=6, sound="aac", **_H264)),
    "mpeg2-mp2.mpg": _film("mpeg2video", sound="mp2", rate=25, sample_rate=44_100),
    "mpeg2.m2v": _film("mpeg2video", rate=25, form="mpeg2video"),
    "vp8.ivf": _film("libvpx", **_VPX),
    "av1.ivf": _film("libsvtav1", size=(64, 64), options={"preset": "11", "crf": "60", "svtav1-params": "lp=1"}),
    "mpeg4-mp3.nut": _film("mpeg4", sound="libmp3lame"),
    "wmv2-wmav2.asf": _film("wmv2", sound="wmav2", sample_rate=22_050),
    "mpeg4-amr.3gp": _film("mpeg4", sound="aac"),
    "dv.dv": _film("dvvideo", "yuv411p", size=(720, 480), rate=30, count=1),
    "raw.h264": _film(form="h264", **_H264),
    "raw.hevc": _film("libx265", **_HEVC),
    "pictures.y4m": _film("rawvideo", size=(16, 16), count=4, form="yuv4mpegpipe"),
    "mxf.mxf": _film("mpeg2video", rate=25, count=3),
    "vorbis.ogg": _film(None, sound="vorbis", sample_rate=44_100, layout="stereo", seconds=0.5),
    "opus.ogg": _film(None, sound="libopus", sample_rate=48_000, seconds=0.4),
    "pcm.wav": _wave(2, 2, 8000),
    "pcm7.1.wav": _wave(8, 2, 4000),
    "float.wav": _film(None, sound="pcm_f32le", sample_rate=8000, seconds=0.25),
    "adpcm.wav": _film(None, sound="adpcm_ima_wav", sample_rate=16_000),
    "tone.flac": _film(None, sound="flac", sample_format="s16", seconds=0.3),
    "tone7.1.flac": _film(None, sound="flac", layout="7.1", sample_format="s16", seconds=0.1),
    "tone.mp3": _film(None, sound="libmp3lame", seconds=0.7),
    "noxing.mp3": _film(None, sound="libmp3lame", container={"write_xing": "0"}, seconds=0.7),
    "tone.aac": _film(None, sound="aac", seconds=0.7),
    "tone5.1.m4a": _film(None, sound="aac", layout="5.1", seconds=0.3, sample_rate=44_100),
    "tone7.1.m4a": _film(None, sound="aac", layout="7.1", seconds=0.3, sample_rate=44_100),
    "alac.m4a": _film(None, sound="alac", seconds=0.3),
    "tone.au": _film(None, sound="pcm_s16be", sample_rate=8000, seconds=0.3),
    "tone.aiff": _film(None, sound="pcm_s16be", sample_rate=8000, seconds=0.3),
    "tone.caf": _film(None, sound="pcm_s16be", sample_rate=8000, seconds=0.3),
    "tone.w64": _film(None, sound="pcm_s16le", sample_rate=8000, seconds=0.3),
    "tone.ac3": _film(None, sound="ac3", sample_rate=44_100, seconds=0.3),
    "tone.wma": _film(None, sound="wmav2", sample_rate=22_050, form="asf"),
    "tone.tta": _film(None, sound="tta", sample_format="s16", seconds=0.3),
    "tone.wv": _film(None, sound="wavpack", seconds=0.3),
    "moving.gif": _pillow(5, "P"),
    "still.gif": _pillow(1, "P"),
    "moving.apng": _pillow(4),
    "still.png": _pillow(),
    "grey.png": _pillow(mode="L"),
    "still.jpg": _pillow(),
    "progressive.jpg": _pillow(progressive=True),
    "still.bmp": _pillow(),
    "still.tif": _pillow(),
    "packed.tif": _pillow(compression="tiff_lzw"),
    "still.webp": _pillow(),
    "lossless.webp": _pillow(lossless=True),
    "moving.webp": _pillow(4),
    "still.avif": _pillow(),
}
