"""Video files that are refused in one line, or read for what they hold, whatever their headers say."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from intertitle.errors import MediaError, TransientMediaError
from intertitle.runtime.media import container, open_media
from intertitle.runtime.media.doors import media_errors
from intertitle.runtime.media.segments import scene_spans
from intertitle.runtime.media.source import Media, check_total

from .test_clip import read

KEY = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}
#: Colour matrices that swscale does not know.
MATRICES = ["YCgCo", "ICtCp", "bt2020c", "smpte2085", "chroma-derived-nc", "chroma-derived-c"]


def refused(source: Any) -> str:
    with pytest.raises(MediaError) as caught:
        read(source)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("matrix", MATRICES)
def test_an_unknown_colour_matrix(matrix: str, clips: Any) -> None:
    """As on the ffmpeg command line, the colours are those of the same samples without a matrix."""
    lossless = {"qp": "0", "preset": "ultrafast"}
    plain = clips.decode(clips.encode("plain.mp4", 8, options=lossless))
    path = clips.encode("clip.mp4", 8, options={**lossless, "x264-params": f"colormatrix={matrix}"})
    clip = read(path)
    assert clip.frames is not None
    # FFmpeg 7 (PyAV 15) has rules of its own, and tells nobody.
    if int(av.__version__.split(".")[0]) >= 18:
        np.testing.assert_array_equal(clip.frames[clip.order], plain)
        assert "its colours are in a matrix that is not known here: they were taken for BT.601" in clip.notes
    pytest.importorskip("scenedetect")
    assert scene_spans(path) == [(0.0, pytest.approx(0.32))]


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_bt_709_and_deep_colours(pix_fmt: str, clips: Any) -> None:
    options = {"x264-params": "colormatrix=bt709", "crf": "10", "preset": "ultrafast"}
    path = clips.encode("clip.mp4", 8, pix_fmt=pix_fmt, options=options)
    clips.assert_exact(path)


@pytest.mark.skipif(not hasattr(av.Packet, "has_sidedata"), reason="PyAV 15 does not show it")
@pytest.mark.parametrize("track", ["video", "audio"])
def test_encrypted(track: str, clips: Any) -> None:
    path = clips.encode("plain.mp4", 30, tone=1.0)
    locked = clips.folder / "locked.mp4"
    with av.open(str(path)) as source, av.open(str(locked), "w", options=KEY) as copy:
        stream = getattr(source.streams, track)[0]
        other: Any = copy.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = other
                copy.mux(packet)
    assert refused(locked) == f"{locked}: is encrypted: it can be captioned only once it is decrypted"


def element(name: str, *parts: bytes) -> bytes:
    """An element of Matroska (RFC 8794) by the hexadecimal of its ID."""
    content = b"".join(parts)
    return bytes.fromhex(name) + (len(content) | 1 << 56).to_bytes(8, "big") + content


@pytest.mark.parametrize("locked", [True, False])
def test_encrypted_webm(locked: bool, clips: Any) -> None:
    """Written by hand, as no muxer of FFmpeg encrypts WebM (RFC 9559, ContentEncodings)."""
    with av.open(str(clips.encode("clip.webm", 8, codec="libvpx"))) as source:
        contents = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    key = element("47e1", b"\5") + element("47e2", bytes(range(16)))
    encodings = element("6d80", element("6240", element("5033", b"\1"), element("5035", key))) if locked else b""
    size = element("e0", element("b0", b"\x60"), element("ba", b"\x40"))
    track = element("d7", b"\1"), element("73c5", b"\1"), element("83", b"\1"), element("86", b"V_VP8"), size, encodings
    blocks = [
        element("a3", b"\x81", struct.pack(">h", 40 * number), b"\0" if number else b"\x80", content)
        for number, content in enumerate(contents)
    ]
    path = clips.folder / "locked.webm"
    path.write_bytes(
        element("1a45dfa3", element("4282", b"webm"))
        + element(
            "18538067", element("1654ae6b", element("ae", *track)), element("1f43b675", element("e7", b"\0"), *blocks)
        )
    )
    if locked:
        assert refused(path) == f"{path}: is encrypted: it can be captioned only once it is decrypted"
    else:
        assert read(path).frames is not None


@pytest.mark.parametrize(
    ("change", "mode", "note"),
    [
        ({b"avc1": b"zzz1", b"avcC": b"zzzC"}, "audio", "its pictures are in a codec that cannot be decoded here"),
        ({b"mp4a": b"zzz2", b"esds": b"zzz3"}, "video", "its sound is in a codec that cannot be decoded here"),
    ],
)
def test_an_unknown_codec(change: dict[bytes, bytes], mode: str, note: str, clips: Any) -> None:
    path = clips.encode("clip.mp4", 30, tone=1.0)
    content = path.read_bytes()
    for old, new in change.items():
        content = content.replace(old, new)
    path.write_bytes(content)
    clip = read(path)
    assert clip.mode == mode
    assert note in clip.notes


def gif(path: Path, width: int, height: int, count: int) -> Path:
    """A canvas of this size with ``count`` frames of one pixel."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + struct.pack("<BHHHHB", 0x2C, 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    header = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    path.write_bytes(header + frame * count + b"\x3b")
    return path


def test_pixels_are_bounded(tmp_path: Path) -> None:
    with open_media(gif(tmp_path / "small.gif", 64, 32, 16)) as media:
        assert (media.num_frames, media.width, media.height) == (16, 64, 32)
    assert "frames of 16000x16000 pixels" in refused(gif(tmp_path / "a.gif", 16_000, 16_000, 16))
    # One such frame is fine, but not sixteen.
    line = refused(gif(tmp_path / "b.gif", 12_000, 8_000, 16))
    assert line.endswith("8 frames of 12000x8000 pixels take 2.1 GiB; of a file of this size up to 0.5 GiB are held")


def test_what_a_file_may_hold_depends_on_its_size() -> None:
    check_total("sixteen of 4K", 3840, 2160, 16, 1000)
    check_total("eight of 8K in a fifth of a megabyte", 7680, 4320, 8, 200_000)
    check_total("sixteen of 8K in half a megabyte", 7680, 4320, 16, 500_000)
    check_total("sixteen of 8K in an array", 7680, 4320, 16)
    for count, held in ((8, 100_000), (16, 300_000), (22, 1 << 40), (22, None)):
        with pytest.raises(MediaError, match="frames of 7680x4320 pixels take"):
            check_total("too much", 7680, 4320, count, held)


def test_a_size_that_grows_midway(clips: Any) -> None:
    """Is scaled to the first one, also where scenes are looked for."""
    parts = [clips.encode(f"{number}.h264", 30, (64 + 32 * number, 64)).read_bytes() for number in range(2)]
    path = clips.folder / "clip.h264"
    path.write_bytes(b"".join(parts))
    clip = read(path)
    assert clip.frames is not None
    assert clip.frames.shape[1:] == (64, 64, 3)
    pytest.importorskip("scenedetect")
    assert scene_spans(path)[-1][1] == pytest.approx(2.4)


def test_more_frames_than_bytes(clips: Any) -> None:
    """Samples of one size take no table: 50 million were 1.8 GB of memory."""
    path = clips.encode("clip.mp4", 30, tone=1.0)
    content = path.read_bytes()
    place = content.index(b"stsz") + 8
    path.write_bytes(content[:place] + struct.pack(">II", 1, 50_000_000) + content[place + 8 :])
    assert refused(path) == f"{path}: claims 50000000 frames in {len(content)} bytes"


def test_a_fragment_of_more_frames_than_bytes(clips: Any) -> None:
    path = clips.remux(clips.encode("clip.mp4", 30), "parts.mp4", movflags="frag_keyframe+empty_moov")
    content = path.read_bytes()
    place = content.index(b"trun") + 4
    path.write_bytes(content[:place] + struct.pack(">II", 1, 60_000_000) + content[place + 8 :])
    assert refused(path) == f"{path}: claims 60000000 frames in {len(content)} bytes"


def test_sound_of_single_samples_is_not_counted_as_frames(clips: Any) -> None:
    """MOV counts each sample of PCM; of IMA 4:1 there are about two in each byte."""
    path = clips.folder / "sound.mov"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("adpcm_ima_qt", rate=44_100, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 200_000), np.int16), "s16p", "mono")
        samples.sample_rate = 44_100
        fifo = av.AudioFifo()
        fifo.write(samples)
        for block in fifo.read_many(64):
            file.mux(stream.encode(block))
    with open_media(path) as media:
        assert media.duration == pytest.approx(200_000 / 44_100, abs=0.01)


@pytest.mark.parametrize(
    "url", ["http://host/a.mp4", "https://host/a", "rtsp://host/a", "s3://bucket/a.mp4", "data://x"]
)
def test_urls(url: str) -> None:
    assert refused(url) == f"{url}: URLs are not read; download it and give the file"


@pytest.mark.parametrize("source", [b"clip.mp4", None, ["a.mp4", "b.mp4"], 3])
def test_what_is_no_path(source: Any) -> None:
    assert refused(source).startswith(f"a clip is a path (str or pathlib.Path), not {type(source).__name__}")


def test_a_file_object(clips: Any) -> None:
    with clips.encode("clip.mp4", 8).open("rb") as file:
        assert refused(file).startswith("a clip is a path (str or pathlib.Path), not BufferedReader")


def test_a_name_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="null"):
        read(str(tmp_path / "a\0b.mp4"))


@pytest.mark.parametrize("kind", ["tar", "zip", "gztar"])
def test_archives(kind: str, clips: Any) -> None:
    (clips.folder / "inside").mkdir()
    (clips.folder / "inside" / "a.txt").write_text("text " * 1000)
    archive = shutil.make_archive(str(clips.folder / "clips"), kind, clips.folder / "inside")
    assert refused(archive) == f"{archive}: is an archive: unpack it first"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ZeroDivisionError("float division by zero"), MediaError, "ZeroDivisionError: float division by zero"),
        (IndexError("list index out of range"), MediaError, "IndexError: list index out of range"),
        (ValueError("array is too big"), MediaError, "ValueError: array is too big"),
        (AssertionError(), MediaError, "AssertionError"),
        (av.error.InvalidDataError(1094995529, "Invalid data"), MediaError, "InvalidDataError: Invalid data"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), TransientMediaError, "Input/output error"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), TransientMediaError, "Too many open files"),
        (OSError(errno.EISDIR, os.strerror(errno.EISDIR)), MediaError, "Is a directory"),
    ],
)
def test_what_libraries_raise(error: Exception, kind: type[MediaError], said: str) -> None:
    with pytest.raises(MediaError) as caught, media_errors("a.mp4"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value) == f"a.mp4: cannot be read ({said})"


def test_memory_that_is_missing() -> None:
    with pytest.raises(TransientMediaError, match=r"a\.mp4: there is not enough memory"), media_errors("a.mp4"):
        raise MemoryError


def test_our_own_faults_pass() -> None:
    with pytest.raises(TypeError), media_errors("a.mp4"):
        raise TypeError


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files by /proc")
def test_too_many_open_files(clips: Any) -> None:
    path = clips.encode("clip.mp4", 8)
    read(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(numbers) + 2 - len(numbers))]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
        with pytest.raises(TransientMediaError, match="Too many open files"):
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)
    assert read(path).frames is not None


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_a_read_that_fails_is_not_the_end_of_the_file(
    name: str, place: float, clips: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read at this part of the file fails, once. FFmpeg's demuxers take that for the end."""
    path = clips.encode(name, 60, (320, 240), options={"crf": "10", "preset": "ultrafast"})
    failed: list[int] = []

    class Failing(container._File):
        def _read(self, size: int | None) -> bytes:
            if self.tell() >= place * path.stat().st_size and not failed:
                failed.append(self.tell())
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super()._read(size)

    monkeypatch.setattr(container, "_File", Failing)
    with pytest.raises(TransientMediaError, match=rf"{name}: cannot be read \(Input/output error\)"):
        read(path)
    assert len(failed) == 1
    assert read(path).frames is not None


def test_frames_that_turn_midway(tmp_path: Path) -> None:
    """H.264 may say of any frame how it is to be turned."""

    class Turning:
        num_frames, fps, duration, times, notes, size = 2, 1.0, 2.0, None, [], (48, 32)

        def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            for index in indices:
                yield index, np.zeros((32, 48, 3) if index == 0 else (48, 32, 3), np.uint8)

        def close(self) -> None: ...

    media = Media(tmp_path / "turning.h264", "video", Turning())
    assert media.read_frames([0, 0]).shape == (2, 32, 48, 3)
    with pytest.raises(MediaError, match="turned by 90 degrees midway"):
        media.read_frames([0, 1])
