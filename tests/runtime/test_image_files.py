"""Images that would crash or fill a decoder, and animations."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.errors import MediaError
from intertitle.runtime.media import open_media
from intertitle.runtime.media.image_files import PNG, still_png

#: OpenCV 5.0.0 jumps into a stack frame that is gone when it decodes this (opencv/opencv#27744).
CRASH = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000400000004080200000026930929000000086163544c0000"
    "000200000000f38d93700000000e49444154789c636044020cc4710005140031bcdab80f0000001a666354"
    "4c00000001000000040000000400000000000000000001000a0000cc01e93500000000000000015643ef8a"
)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int = 1) -> bytes:
    """Black, in grey of ``depth`` bits."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def peak_of_refusal(path: Path) -> tuple[str, float]:
    """With which line a process refuses an image, and how many MB more than before it then held at most."""
    code = (
        "import resource, sys\n"
        "import numpy, cv2\n"
        "from intertitle.errors import MediaError\n"
        "from intertitle.runtime.media import open_media\n"
        "unit = 2**20 if sys.platform == 'darwin' else 2**10\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit\n"
        "before = peak()\n"
        "try:\n"
        "    open_media(sys.argv[1])\n"
        "except MediaError as error:\n"
        "    print(error)\n"
        "    print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    return message, float(grown)


def test_a_png_that_crashes_opencv(tmp_path: Path) -> None:
    path = tmp_path / "crash.png"
    path.write_bytes(CRASH)
    assert len(CRASH) == 129
    # FFmpeg reads it as the animation that it says it is; OpenCV sees it in a folder of stills.
    with open_media(path) as media, pytest.raises(MediaError, match="no frame"):
        media.read_frames([0])
    with pytest.raises(MediaError, match="damaged"):
        open_media(tmp_path)
    path.write_bytes(CRASH.replace(chunk(b"acTL", bytes([0, 0, 0, 2, 0, 0, 0, 0])), chunk(b"acTL", bytes(8))))
    assert "damaged" in peak_of_refusal(path)[0]
    # As the still that its first chunks are, it is whole.
    path.write_bytes(CRASH[:83] + chunk(b"IEND", b""))
    with open_media(path) as media:
        assert media.read_frames([0]).shape == (1, 4, 4, 3)


def test_a_chunk_of_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "chunk.png"
    path.write_bytes(png(64, 48)[:33] + bytes.fromhex("fffffff049444154"))
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="cut off"):
            open_media(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert peak_of_refusal(path)[1] < 50


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "avif"])
def test_pixels_are_counted_before_any_is_decoded(kind: str, tmp_path: Path, clips: Any) -> None:
    path = clips.image(f"image.{kind}", np.zeros((48, 64, 3), np.uint8))
    content = bytearray(path.read_bytes())
    width, height = 16_000, 15_000
    if kind == "png":
        content = bytearray(png(width, height))
    elif kind == "jpg":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "bmp":
        content[18:26] = struct.pack("<ii", width, -height)
    elif kind == "webp":
        place = content.index(b"\x9d\x01\x2a") + 3
        content[place : place + 4] = struct.pack("<HH", width, height)
    elif kind == "tiff":
        directory = struct.unpack_from("<I", content, 4)[0]
        for entry in range(directory + 2, directory + 2 + 24, 12):
            tag, form = struct.unpack_from("<HH", content, entry)
            if tag in (256, 257):
                struct.pack_into("<I" if form == 4 else "<H", content, entry + 8, width if tag == 256 else height)
    else:
        place = content.index(b"ispe") + 8
        content[place : place + 8] = struct.pack(">II", width, height)
    path.write_bytes(content)
    message, grown = peak_of_refusal(path)
    assert message == f"{path}: frames of {width}x{height} pixels (up to 134 million are read)"
    assert grown < 100


def test_a_file_too_large_for_an_image(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 33)
    with pytest.raises(MediaError, match="too large for an image"):
        open_media(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_left_of_a_png_has_whole_chunks_only(data: st.DataObject) -> None:
    names = st.sampled_from([b"acTL", b"fcTL", b"fdAT", b"IDAT", b"tEXt", b"\0\0\0\1", b"IHDR"])
    content = bytearray(png(4, 4)[:33])
    for name in data.draw(st.lists(names, max_size=6)):
        content += chunk(name, data.draw(st.binary(max_size=30)))
    for place in data.draw(st.lists(st.integers(8, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        still = still_png(bytes(content))
    except ValueError:
        return
    place = 8
    while place < len(still):
        length, name = struct.unpack_from(">I4s", still, place)
        assert name.isalpha()
        assert name not in (b"acTL", b"fcTL", b"fdAT")
        place += 12 + length
    assert place == len(still)


@pytest.mark.parametrize("kind", ["webp", "png"])
@pytest.mark.parametrize("seed", [0, 1])
def test_animations_are_pillows(kind: str, seed: int, tmp_path: Path, clips: Any) -> None:
    pil = pytest.importorskip("PIL.Image")
    path = tmp_path / f"animation.{kind}"
    times = [40, 80, 200, 120, 500, 60]
    # A square that moves over a picture: what changes from one frame to the next is a part of it.
    base = clips.picture(seed, 64, 48)
    frames = []
    for index in range(len(times)):
        frame = base.copy()
        frame[5 * index :, 7 * index :][:9, :9] = 40 * index
        frames.append(pil.fromarray(frame))
    how = {"lossless": True} if kind == "webp" else {"disposal": seed}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, **how)
    with open_media(path) as media:
        assert (media.kind, media.num_frames) == ("video", len(times))
        assert media.times is not None
        np.testing.assert_allclose(media.times, np.cumsum([0, *times[:-1]]) / 1000, atol=1e-6)
        assert media.duration == pytest.approx(1.0, abs=1e-6)
        assert media.fps == pytest.approx(6, rel=0.2)
        np.testing.assert_array_equal(media.read_frames(range(6)), np.stack([np.asarray(each) for each in frames]))
        np.testing.assert_array_equal(media.read_frames([4, 1, 4])[0], np.asarray(frames[4]))


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_one_frame_of_an_animation_is_a_still(kind: str, clips: Any) -> None:
    path = clips.image(f"one.{kind}", clips.picture(0, 40, 30), save_all=True)
    with open_media(path) as media:
        assert media.num_frames == 1


def test_a_damaged_animated_webp(tmp_path: Path, clips: Any) -> None:
    pil = pytest.importorskip("PIL.Image")
    frames = [pil.fromarray(clips.picture(index, 64, 48)) for index in range(4)]
    whole = tmp_path / "whole.webp"
    frames[0].save(whole, save_all=True, append_images=frames[1:], duration=100)
    content = bytearray(whole.read_bytes())
    for share in (0.02, 0.3, 0.8):
        cut = tmp_path / "cut.webp"
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(MediaError), open_media(cut) as media:
            media.read_frames([0])
    # A canvas of 16384 x 16384 is refused by its header.
    content[24:30] = (16_383).to_bytes(3, "little") * 2
    whole.write_bytes(content)
    with pytest.raises(MediaError, match="16384x16384"):
        open_media(whole)
