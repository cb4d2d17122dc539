"""What ``open_media`` makes of every kind of source, and the one line with which it refuses the rest."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from intertitle.errors import MediaError
from intertitle.runtime.media import as_frames, as_waveform, open_media
from intertitle.runtime.preprocess.audio import resample


def test_a_video_with_sound(clips: Any) -> None:
    with open_media(clips.encode("clip.mp4", 50, tone=2.0)) as media:
        assert (media.kind, media.has_video, media.has_audio) == ("video", True, True)
        assert (media.num_frames, media.fps, media.duration) == (50, 25.0, pytest.approx(2.0))
        assert (media.width, media.height) == (96, 64)
        stored = media.read_audio()
        assert stored.sample_rate == 44_100
        assert stored.samples.shape[0] == 2
        heard = media.read_audio(16_000)
        assert heard.samples.dtype == np.float32
        assert heard.duration == pytest.approx(2.0, abs=0.05)
        # Mixed down to the mean of 0.5 and 0.25, in steps of 16 bits.
        assert np.abs(heard.samples[4000:28_000]).max() == pytest.approx(0.375, abs=0.02)
        np.testing.assert_array_equal(heard.samples * 32768, np.rint(heard.samples * 32768))
        np.testing.assert_array_equal(media.read_audio(16_000, seconds=0.5).samples, heard.samples[:8000])
        np.testing.assert_array_equal(media.read_audio(seconds=0.5).samples, stored.samples[:, :22_050])


def test_sound_of_arrays_and_files_is_the_same(clips: Any) -> None:
    with open_media(clips.encode("clip.mp4", 5, tone=1.0)) as media:
        stored = media.read_audio()
        heard = media.read_audio(16_000).samples
    np.testing.assert_array_equal(resample(stored.samples, stored.sample_rate, 16_000), heard)


def test_a_video_without_sound(clips: Any) -> None:
    with open_media(clips.encode("clip.mp4", 3)) as media:
        assert not media.has_audio
        with pytest.raises(MediaError, match="no sound"):
            media.read_audio()


def test_a_sound_file_is_read_as_stored(clips: Any) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (12_345, 2)).astype(np.int16)
    with open_media(clips.wave("sound.wav", samples, 22_050)) as media:
        assert (media.kind, media.has_video, media.num_frames, media.width) == ("audio", False, 0, 0)
        assert media.duration == pytest.approx(12_345 / 22_050)
        stored = media.read_audio()
        assert stored.sample_rate == 22_050
        np.testing.assert_array_equal(stored.samples, samples.T / np.float32(32768))
        with pytest.raises(MediaError, match="only sound"):
            media.read_frames([0])


def test_cover_art_is_no_video(clips: Any) -> None:
    samples = np.random.default_rng(0).integers(-9999, 9999, (44_100, 1)).astype(np.int16)
    path = clips.folder / "song.flac"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("flac", rate=44_100, layout="mono")
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = int(type(cover.disposition).attached_pic)
        image = av.VideoFrame.from_ndarray(clips.picture(0, 32, 32), format="rgb24").reformat(format="yuvj420p")
        image.pts = 0
        container.mux(cover.encode(image))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(samples.T, "s16", "mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with open_media(path) as media:
        assert (media.kind, media.has_video, media.has_audio) == ("audio", False, True)
        np.testing.assert_array_equal(media.read_audio().samples, samples.T / np.float32(32768))


def test_special_characters_in_names(clips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clips.folder / "a:b %03d"
    folder.mkdir()
    path = clips.encode("clip.mp4", 3).rename(folder / "c:d%03d?*[x] é.mp4")
    with open_media(path) as media:
        assert media.read_frames([2]).shape == (1, 64, 96, 3)
    # To FFmpeg, what stands before a colon is a protocol.
    monkeypatch.chdir(folder)
    with open_media(path.name) as media:
        assert media.num_frames == 3


def test_indices_are_checked(clips: Any) -> None:
    with open_media(clips.encode("clip.mp4", 3)) as media:
        for wrong in ([3], [-1], [0, 7]):
            with pytest.raises(IndexError):
                media.read_frames(wrong)
        assert media.read_frames([]).shape == (0, 64, 96, 3)


def test_files_are_let_go(clips: Any) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("no /proc here")
    path = clips.encode("clip.mp4", 3, tone=0.2)
    broken = clips.cut(path, 0.5)

    def count() -> int:
        return sum(1 for _ in open_files.iterdir())

    before = count()
    for _ in range(3):
        with open_media(path) as media:
            media.read_frames([1])
            media.read_audio()
        clips.refusal(broken)
    assert count() == before


# --- images


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tiff", "a.webp", "wrongly-named.mp4"])
@pytest.mark.parametrize("size", [(160, 96), (161, 91)])
def test_images_are_pillows(name: str, size: tuple[int, int], clips: Any) -> None:
    kind = {"format": "JPEG"} if name.endswith("mp4") else {}
    path = clips.image(name, clips.picture(1, *size), **kind)
    with pytest.importorskip("PIL.Image").open(path) as image:
        reference = np.asarray(image.convert("RGB"))
    with open_media(path) as media:
        assert (media.kind, media.num_frames, media.duration) == ("image", 1, 0.0)
        assert (media.width, media.height) == size
        np.testing.assert_array_equal(media.read_frames([0, 0])[1], reference)


def test_palettes_grey_and_alpha(clips: Any) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(clips.picture(1, 40, 30))
    transparent = image.copy()
    transparent.putalpha(pil.fromarray(clips.picture(2, 40, 30)[..., 0]))
    for number, variant in enumerate([image.convert("L"), image.convert("P"), image.convert("1"), transparent]):
        path = clips.folder / f"{number}.png"
        variant.save(path)
        with open_media(path) as media:
            np.testing.assert_array_equal(media.read_frames([0])[0], np.asarray(variant.convert("RGB")))


def test_a_photo_is_turned_as_its_exif_data_say(clips: Any) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = clips.picture(1, 48, 32)
    exif = pil.fromarray(image).getexif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to view
    turned, plain = clips.image("turned.jpg", image, exif=exif), clips.image("plain.jpg", image)
    with open_media(turned) as media, open_media(plain) as upright:
        np.testing.assert_array_equal(media.read_frames([0])[0], np.rot90(upright.read_frames([0])[0], -1))


def test_a_folder_is_a_clip_in_natural_order(clips: Any) -> None:
    for number, name in enumerate(["frame2.png", "frame10.png", "frame1.png", "Frame3.jpg"]):
        clips.image(name, np.full((8, 10, 3), 10 * number, np.uint8))
    clips.image(".hidden.png", np.zeros((8, 10, 3), np.uint8))
    (clips.folder / "notes.txt").write_text("not a frame")
    with open_media(clips.folder) as media:
        assert (media.kind, media.num_frames, media.fps, media.has_audio) == ("video", 4, 3.0, False)
        assert media.duration == pytest.approx(4 / 3)
        # Frame3, frame1, frame2, frame10.
        assert media.read_frames([0, 1, 2, 3])[:, 0, 0, 0].tolist() == [30, 20, 0, 10]


def test_images_of_a_folder_must_be_of_one_size(clips: Any) -> None:
    clips.image("1.png", np.zeros((8, 10, 3), np.uint8))
    clips.image("2.png", np.zeros((9, 10, 3), np.uint8))
    with open_media(clips.folder) as media, pytest.raises(MediaError, match=r"2\.png: 10x9 .* 10x8"):
        media.read_frames([0, 1])


# --- refusals


def test_missing_file(clips: Any) -> None:
    assert "no such file" in clips.refusal(clips.folder / "nothing.mp4")
    assert "URLs are not read" in clips.refusal("http://localhost/clip.mp4")


def test_folder_without_images(clips: Any) -> None:
    (clips.folder / "notes.txt").write_text("no image")
    assert "holds no images" in clips.refusal(clips.folder)


def test_empty_file(clips: Any) -> None:
    path = clips.folder / "clip.mp4"
    path.touch()
    assert "empty" in clips.refusal(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.txt", "clip.srt", "clip.m3u8", "clip.ffconcat"])
def test_text_is_no_media(name: str, clips: Any) -> None:
    target = clips.encode("target.ts", 3)
    texts = {
        "clip.srt": "1\n00:00:01,000 --> 00:00:02,000\nhello\n\n",
        "clip.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        "clip.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
    }
    path = clips.folder / name
    path.write_text(texts.get(name, "hello world\n" * 500))
    assert "not a video, sound or image file" in clips.refusal(path)


def test_noise_is_no_media(clips: Any) -> None:
    path = clips.folder / "clip.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(20_000))
    assert "not a video, sound or image file" in clips.refusal(path)


def test_video_cut_off_before_its_index(clips: Any) -> None:
    assert "incomplete MP4" in clips.refusal(clips.cut(clips.encode(), 0.6))


def test_neither_video_nor_sound(clips: Any) -> None:
    # An MP4 file of a header without tracks (ISO 14496-12, 8.2).
    header = struct.pack(">5I", 0, 0, 0, 1000, 0) + struct.pack(">I", 0x10000) + bytes(76)
    movie = struct.pack(">I4s", 8 + len(header), b"mvhd") + header
    path = clips.folder / "clip.mp4"
    brand = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 512, b"isom")
    path.write_bytes(brand + struct.pack(">I4s", 8 + len(movie), b"moov") + movie)
    assert "neither video nor sound" in clips.refusal(path)


def test_video_without_frames(clips: Any) -> None:
    path = clips.folder / "clip.y4m"
    path.write_bytes(b"YUV4MPEG2 W16 H16 F25:1 C420jpeg\n")
    assert "has no frames" in clips.refusal(path)


def test_sound_without_samples(clips: Any) -> None:
    with (
        open_media(clips.wave("sound.wav", np.zeros((0, 1), np.int16), 16_000)) as media,
        pytest.raises(MediaError, match="nothing that can be decoded"),
    ):
        media.read_audio()


def test_sound_that_is_not_finite(clips: Any) -> None:
    samples = np.array([0.0, 0.5, np.nan, 0.25], "<f4").tobytes()
    # A WAV file of 32-bit floats (format 3), mono at 8 kHz.
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 8000, 32_000, 4, 32)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(samples)) + samples
    path = clips.folder / "sound.wav"
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(body)) + body)
    with open_media(path) as media, pytest.raises(MediaError, match="NaN"):
        media.read_audio()


def test_absurd_dimensions(clips: Any) -> None:
    path = clips.folder / "clip.y4m"
    path.write_bytes(b"YUV4MPEG2 W20000 H2 F25:1 C420jpeg\nFRAME\n" + bytes(20_000 * 3))
    assert "20000x2" in clips.refusal(path)
    path.write_bytes(b"YUV4MPEG2 W100000 H100000 F25:1 C420jpeg\nFRAME\n")
    clips.refusal(path)
    assert "20000x1" in clips.refusal(clips.image("wide.png", np.zeros((1, 20_000, 3), np.uint8)))


def test_heif_is_named(clips: Any) -> None:
    path = clips.folder / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(400))
    assert "HEIF" in clips.refusal(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_damaged_image_is_refused(name: str, clips: Any) -> None:
    assert "damaged" in clips.refusal(clips.cut(clips.image(name, clips.picture(1, 80, 60)), 0.5))


def test_nothing_reaches_stderr(clips: Any) -> None:
    clip = clips.encode("clip.mp4", 20, options=clips.SHORT_GROUPS, tone=0.5)
    damaged = clips.destroy(clips.encode("damaged.mp4", 20, options=clips.SHORT_GROUPS), [4, 5, 13])
    photos = [clips.cut(clips.image(name, clips.picture(0, 64, 48)), 0.5) for name in ("photo.jpg", "photo.png")]
    code = (
        "import sys\n"
        "from intertitle.errors import MediaError\n"
        "from intertitle.runtime.media import open_media\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        with open_media(path) as media:\n"
        "            media.read_frames(range(media.num_frames))\n"
        "            if media.has_audio: media.read_audio(16000)\n"
        "        print('read')\n"
        "    except MediaError as error:\n"
        "        print('refused')\n"
    )
    arguments = [sys.executable, "-c", code, *map(str, (clip, clips.cut(clip, 0.5), damaged, *photos))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read", "refused", "read", "refused", "refused"]
    assert done.stderr == ""


# --- arrays


class Stubborn:
    """What says that it is an array, as a tensor on a GPU does."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("on another device")


def test_frames_from_arrays() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    assert as_frames(frames) is frames
    assert as_frames(list(frames)).shape == (2, 4, 6, 3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 6, 3), np.float32), "float32"),
        (np.full((2, 4, 6, 3), np.nan), "float64"),
        (np.zeros((4, 6, 3), np.uint8), r"\[4, 6, 3\]"),
        (np.zeros((2, 3, 4, 6), np.uint8), r"\[2, 3, 4, 6\]"),
        (np.zeros((2, 4, 6, 4), np.uint8), r"\[2, 4, 6, 4\]"),
        (np.zeros((0, 4, 6, 3), np.uint8), "empty"),
        (np.zeros((1, 0, 6, 3), np.uint8), "6x0"),
        (np.uint8(3), r"\[\]"),
        (np.array([[None]]), "object"),
        (np.zeros((2, 4, 6, 3), complex), "complex128"),
        (np.broadcast_to(np.uint8(0), (1, 1 << 40, 1 << 20, 3)), "1048576x1099511627776"),
        ("frames", "<U6"),
        (Stubborn(), "RuntimeError: on another device"),
        (np.zeros((1, 1, 20_000, 3), np.uint8), "20000x1"),
        ([np.zeros((4, 6, 3), np.uint8), np.zeros((5, 6, 3), np.uint8)], "array"),
    ],
)
def test_frames_that_are_refused(array: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        as_frames(array)


def test_waveforms_from_arrays() -> None:
    mono = np.array([0, 16384, -32768], np.int16)
    assert as_waveform(mono, 16_000).samples.tolist() == [0.0, 0.5, -1.0]
    stereo = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    for array in (stereo, stereo.T):
        sound = as_waveform(array, 8000)
        assert sound.samples.dtype == np.float32
        np.testing.assert_array_equal(sound.samples, stereo.T.astype(np.float32))
        assert sound.duration == pytest.approx(3 / 8000)
    # Whatever the order in memory.
    np.testing.assert_array_equal(
        as_waveform(stereo[::-1, ::-1], 8000).samples, stereo.T[::-1, ::-1].astype(np.float32)
    )
    assert as_waveform(np.zeros(4, np.longdouble), 8000).samples.dtype == np.float32
    assert as_waveform(stereo[:, :1], 8000).samples.shape == (3,)


@pytest.mark.parametrize(
    ("array", "rate", "reason"),
    [
        (np.array([0.0, np.nan]), 16_000, "NaN"),
        (np.array([0.0, np.inf]), 16_000, "infinite"),
        (np.zeros(0), 16_000, "no samples"),
        (np.zeros((2, 3, 4)), 16_000, r"\[2, 3, 4\]"),
        (np.zeros(4, np.int32), 16_000, "int32"),
        (np.zeros(4, complex), 16_000, "complex128"),
        (np.array([0.0, 20_000.0]), 16_000, "divide"),
        ([[0.0], [0.0, 1.0]], 16_000, "array"),
        (np.float32(0.5), 16_000, r"\[\]"),
        (np.array([None, 0.5]), 16_000, "object"),
        (np.broadcast_to(np.float32(0), (2, 1 << 50)), 16_000, "too long"),
        (np.zeros(4, bool), 16_000, "bool"),
        (Stubborn(), 16_000, "RuntimeError: on another device"),
        (np.zeros(4), np.float64(16_000), "sample rate"),
        (np.zeros(4), None, "sample rate"),
        (np.zeros(4), 0, "sample rate"),
        (np.zeros(4), -8000, "sample rate"),
        (np.zeros(4), 16_000.5, "sample rate"),
        (np.zeros(4), True, "sample rate"),
    ],
)
def test_waveforms_that_are_refused(array: Any, rate: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        as_waveform(array, rate)


def test_a_stated_duration_below_zero_is_not_believed(tmp_path: Path):
    path = tmp_path / "tone.wma"
    with av.open(str(path), "w", format="asf") as container:
        stream: Any = container.add_stream("wmav2", rate=22_050, layout="mono", options={"flags": "+bitexact"})
        stream.bit_rate = 32_000
        samples = (np.sin(np.arange(22_050) / 9) / 2).astype(np.float32)[np.newaxis]
        stream.codec_context.open()
        for start in range(0, 22_050, stream.frame_size):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + stream.frame_size].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = 22_050, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    # ASF 3.2, File Properties Object: the preroll (ms) is taken from the play duration.
    place = content.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + 80
    content[place : place + 8] = (30_000).to_bytes(8, "little")
    path.write_bytes(content)
    with open_media(path) as media:
        assert media.duration == pytest.approx(1.0, abs=0.1)
