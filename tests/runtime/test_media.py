"""Reading media: every frame is the one that decoding everything gives, and bad files are refused with one line."""

from __future__ import annotations

import struct
import subprocess
import sys
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.errors import MediaError
from intertitle.runtime.media import Media, as_frames, as_waveform, open_media, packets, video
from intertitle.runtime.media.packets import PacketIndex, VideoPacket, plan_runs
from intertitle.runtime.media.video import ContainerFrameReader

SHORT_GROUPS = {"g": "12", "bf": "3", "sc_threshold": "0"}


def picture(index: int, width: int, height: int) -> np.ndarray:
    """A frame that no other resembles: moving gradients, a moving square and noise."""
    y, x = np.mgrid[0:height, 0:width]
    frame = np.stack([x * 3 + index * 5, y * 2 + index * 7, x + y + index * 3], -1) % 200
    frame += np.random.default_rng(index).integers(0, 40, (height, width, 1))
    frame[(index * 3) % (height - 8) :, (index * 5) % (width - 8) :][:8, :8] = 255
    return frame.astype(np.uint8)


def encode(
    path: Path,
    count: int = 60,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    tone: float = 0.0,
) -> Path:
    """A clip at 25 frames a second, or with a pts in milliseconds for each frame; ``tone`` seconds of 440 Hz stereo."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound: Any = container.add_stream("aac", rate=44_100, layout="stereo") if tone else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (
                (index, Fraction(1, 25)) if times is None else (times[index], Fraction(1, 1000))
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone:
            left = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(44_100 * tone)) / 44_100)
            frame = av.AudioFrame.from_ndarray(np.stack([left, left / 2]).astype(np.float32), "fltp", "stereo")
            frame.sample_rate = 44_100
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def decode_everything(path: Path) -> list[np.ndarray]:
    """The reference: every frame in the order in which one thread puts them out."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return [f.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC) for f in container.decode(stream)]


def refusal(path: Path | str) -> str:
    with pytest.raises(MediaError) as caught, open_media(path) as media:
        media.read_frames([0])
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    return message


def assert_exact(path: Path, monkeypatch: pytest.MonkeyPatch, draws: int = 6) -> None:
    """All frames, and random picks of them, are the reference's, without decoding the file through as a last resort."""
    reference = decode_everything(path)
    assert len(reference) > 0

    def no_last_resort(*_: object) -> None:
        pytest.fail("frames went missing")

    rng = np.random.default_rng(0)
    with open_media(path) as media, monkeypatch.context() as patch:
        assert media.num_frames == len(reference)
        if media._frames._index is not None:  # type: ignore[union-attr]
            patch.setattr(ContainerFrameReader, "_read_through", no_last_resort)
        np.testing.assert_array_equal(media.read_frames(range(len(reference))), reference)
        for _ in range(draws):
            indices = rng.integers(0, len(reference), rng.integers(1, 17))
            np.testing.assert_array_equal(media.read_frames(indices), [reference[index] for index in indices])
        assert media.notes == []


H264 = {
    "one long group": {"g": "300", "bf": "3"},
    "short groups": SHORT_GROUPS,
    "keyframes only": {"g": "1"},
    "open groups": {"g": "16", "bf": "4", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"},
    "pyramid": {"g": "30", "bf": "8", "x264-params": "b-pyramid=strict:b-adapt=2"},
    "interlaced": {"g": "15", "bf": "2", "flags": "+ildct+ilme"},
}


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("structure", H264)
def test_h264_frames_are_exact(structure: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_exact(encode(tmp_path / f"clip.{container}", options=H264[structure]), monkeypatch)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("clip.mp4", "mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
        ("clip.avi", "mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
        ("bframes.avi", "libx264", "yuv420p", SHORT_GROUPS),
        ("clip.mpg", "mpeg2video", "yuv420p", {"bf": "2", "g": "12"}),
        ("clip.mp4", "mjpeg", "yuvj420p", {}),
        ("clip.flv", "libx264", "yuv420p", SHORT_GROUPS),
        ("clip.h264", "libx264", "yuv420p", SHORT_GROUPS),
        ("clip.webm", "libvpx-vp9", "yuv420p", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_other_codecs_are_exact(
    name: str, codec: str, pix_fmt: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_exact(encode(tmp_path / name, codec=codec, pix_fmt=pix_fmt, options=options), monkeypatch)


def test_frames_that_vp8_hides_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4", "b": "200k", "g": "40"}
    path = encode(tmp_path / "clip.webm", codec="libvpx", options=options)
    with av.open(str(path)) as container:
        held = sum(1 for packet in container.demux(video=0) if packet.size)
    assert held > 60
    assert_exact(path, monkeypatch)


def test_hevc_open_groups_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = "keyint=16:min-keyint=16:open-gop=1:bframes=4:log-level=none:pools=1"
    path = encode(tmp_path / "clip.mp4", codec="libx265", options={"x265-params": params, "preset": "ultrafast"})
    assert_exact(path, monkeypatch)


def test_intra_refresh_is_exact(tmp_path: Path) -> None:
    # Frames right after such a "keyframe" are not whole yet: these are decoded from the start.
    options = {"bf": "0", "g": "20", "x264-params": "intra-refresh=1"}
    path = encode(tmp_path / "clip.mp4", options=options)
    reference = decode_everything(path)
    with open_media(path) as media:
        for index in range(0, 60, 7):
            np.testing.assert_array_equal(media.read_frames([index])[0], reference[index])


def test_variable_frame_rate_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.sort(np.random.default_rng(0).choice(9000, 50, replace=False)).tolist()
    path = encode(tmp_path / "clip.mp4", 50, options=SHORT_GROUPS, times=times)
    assert_exact(path, monkeypatch)
    with open_media(path) as media:
        assert media.duration == pytest.approx((times[-1] - times[0]) / 1000, abs=0.5)


@pytest.mark.parametrize("size", [(161, 91), (35, 18)])
def test_odd_sizes_are_exact(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "clip.mp4", 20, size, pix_fmt="yuv444p", options=SHORT_GROUPS)
    assert_exact(path, monkeypatch)
    with open_media(path) as media:
        assert (media.width, media.height) == size


def test_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "clip.mp4", 1)
    assert_exact(path, monkeypatch)
    with open_media(path) as media:
        assert media.kind == "video"
        assert media.read_frames([0, 0, 0]).shape == (3, 64, 96, 3)


def test_few_packets_are_decoded_for_frames_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "clip.mp4", 120, options={"g": "20", "bf": "0", "sc_threshold": "0"})
    decoded = []
    genuine = video._decode
    monkeypatch.setattr(video, "_decode", lambda stream, packet: decoded.append(packet) or genuine(stream, packet))
    with open_media(path) as media:
        media.read_frames([2, 43, 101])
    # Three packets to reach frame 2 of the first group, four for frame 43, two for 101; None drains the decoder.
    assert sum(packet is not None for packet in decoded) == 3 + 4 + 2


def test_where_a_seek_fails_the_file_is_read_through(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", options=SHORT_GROUPS)
    reference = decode_everything(path)

    class CannotSeek:
        def __init__(self, container: Any) -> None:
            self._container = container

        def seek(self, *_: object, **__: object) -> None:
            raise FFmpegError(1, "no seeking here")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

    with open_media(path) as media:
        reader: Any = media._frames
        reader._container = CannotSeek(reader._container)
        np.testing.assert_array_equal(media.read_frames([40, 10]), [reference[40], reference[10]])
        assert media.notes == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_runs_cover_what_is_wanted_from_where_it_can_be_decoded(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    times = data.draw(st.permutations(range(count)))
    keys = data.draw(st.sets(st.integers(0, count - 1)))
    index = PacketIndex([VideoPacket(pts, None, 1, n in keys, True, 1) for n, pts in enumerate(times)])
    wanted = data.draw(st.sets(st.sampled_from(list(index.order)), min_size=1))
    runs = plan_runs(wanted, index, data.draw(st.integers(0, 10)))
    assert sorted(number for run in runs for number in run.wanted) == sorted(wanted)
    for run, later in zip(runs, [*runs[1:], None], strict=True):
        assert run.start == 0 or run.start in keys
        assert later is None or run.stop < later.start
        for number in run.wanted:
            assert run.start <= number <= run.stop
            # No keyframe may stand between the start and the frame's last usable one.
            usable = [key for key in keys if key <= number and times[key] <= times[number]]
            assert run.start <= max(usable, default=0)


TURNS = {
    "a quarter clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "a quarter counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_video_is_turned_as_players_do(turn: str, tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", 5)
    reference = decode_everything(path)
    (a, b, c, d), turned = TURNS[turn]
    # The matrix of the track header box (ISO 14496-12, 8.3.2): 44 bytes after its name, in 16.16 fixed point.
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    one = 1 << 16
    content[place : place + 20] = struct.pack(">5i", a * one, b * one, 0, c * one, d * one)
    path.write_bytes(content)
    with open_media(path) as media:
        frames = media.read_frames([0, 3])
        np.testing.assert_array_equal(frames, [turned(reference[0]), turned(reference[3])])
        assert (media.width, media.height) == (frames.shape[2], frames.shape[1])


# --- damage


def cut(source: Path, fraction: float) -> Path:
    path = source.with_name("cut" + source.suffix)
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


def test_a_file_that_is_cut_off_yields_the_frames_before_the_cut(tmp_path: Path) -> None:
    whole = encode(tmp_path / "clip.mp4", options={**SHORT_GROUPS, "bf": "0"})
    reference = decode_everything(whole)
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    with open_media(cut(tmp_path / "fast.mp4", 0.6)) as media:
        assert 10 < media.num_frames < 50
        np.testing.assert_array_equal(media.read_frames(range(media.num_frames)), reference[: media.num_frames])
        if hasattr(av.stream.Stream, "index_entries"):
            assert media.notes == [f"the file is cut off: it holds {media.num_frames} of its 60 frames"]


def test_a_recording_that_begins_inside_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(tmp_path / "clip.ts", options=SHORT_GROUPS).read_bytes()
    blocks = [content[place : place + 188] for place in range(0, len(content), 188)]
    path = tmp_path / "tail.ts"
    # The first three packets name the streams; of the rest the first quarter is missing.
    path.write_bytes(b"".join(blocks[:3] + blocks[len(blocks) // 4 :]))
    assert_exact(path, monkeypatch)
    with open_media(path) as media:
        assert 20 < media.num_frames < 55


def destroyed(path: Path, numbers: Sequence[int]) -> Path:
    """The file with the packets of these numbers overwritten."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number in numbers:
        place, size = places[number]
        assert place is not None
        content[place : place + size] = bytes(size)
    path.write_bytes(content)
    return path


def test_frames_that_cannot_be_decoded_are_replaced_by_the_nearest_earlier_one(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", 20, options={"g": "1"})
    reference = decode_everything(path)
    with open_media(destroyed(path, [0, 7, 8, 19])) as media:
        assert media.num_frames == 20
        frames = media.read_frames([3, 7, 8, 9, 19, 0])
        np.testing.assert_array_equal(frames, [reference[index] for index in (3, 6, 6, 9, 18, 1)])
        assert media.notes == ["frames that cannot be decoded (0, 7, 8, 19) were replaced by the nearest earlier one"]


def test_without_a_single_whole_frame(tmp_path: Path) -> None:
    path = destroyed(encode(tmp_path / "clip.mp4", 6, options={"g": "1"}), range(6))
    assert "no frame of the video can be decoded" in refusal(path)


def test_frames_of_another_size_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "clip.ts"
    parts = [encode(tmp_path / f"{n}.ts", 10, size).read_bytes() for n, size in enumerate([(96, 64), (128, 80)])]
    path.write_bytes(b"".join(parts))
    with open_media(path) as media:
        assert media.num_frames == 20
        assert media.read_frames([0, 19]).shape == (2, 64, 96, 3)
        assert media.notes == ["frames change size midway: all were scaled to 96x64"]


# --- refusals


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.mp4")
    assert "no such file" in refusal("http://localhost/clip.mp4")


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert "holds no images" in refusal(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.touch()
    assert "empty" in refusal(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.txt", "clip.srt", "clip.m3u8", "clip.ffconcat"])
def test_text_is_no_media(name: str, tmp_path: Path) -> None:
    target = encode(tmp_path / "target.ts", 3)
    texts = {
        "clip.srt": "1\n00:00:01,000 --> 00:00:02,000\nhello\n\n",
        "clip.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        "clip.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
    }
    path = tmp_path / name
    path.write_text(texts.get(name, "hello world\n" * 500))
    assert "not a video, sound or image file" in refusal(path)


def test_noise_is_no_media(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(20_000))
    assert "not a video, sound or image file" in refusal(path)


def test_video_cut_off_before_its_index(tmp_path: Path) -> None:
    assert "incomplete MP4" in refusal(cut(encode(tmp_path / "clip.mp4"), 0.6))


def test_neither_video_nor_sound(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("srt") if "srt" in av.codecs_available else container.add_stream("subrip")
        packet = av.Packet(b"hello")
        packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1000
        packet.time_base = Fraction(1, 1000)
        container.mux(packet)
    assert "neither video nor sound" in refusal(path)


def test_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.y4m"
    path.write_bytes(b"YUV4MPEG2 W16 H16 F25:1 C420jpeg\n")
    assert "has no frames" in refusal(path)


def test_absurd_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "clip.y4m"
    path.write_bytes(b"YUV4MPEG2 W20000 H2 F25:1 C420jpeg\nFRAME\n" + bytes(20_000 * 3))
    assert "20000x2" in refusal(path)
    path.write_bytes(b"YUV4MPEG2 W100000 H100000 F25:1 C420jpeg\nFRAME\n")
    refusal(path)


def test_heif_is_named(tmp_path: Path) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(400))
    assert "HEIF" in refusal(path)


def test_nothing_reaches_stderr(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.mp4", 20, options=SHORT_GROUPS, tone=0.5)
    broken = cut(clip, 0.5)
    damaged = destroyed(encode(tmp_path / "damaged.mp4", 20, options=SHORT_GROUPS), [4, 5, 13])
    photo = cut(write_image(tmp_path / "photo.jpg", picture(0, 64, 48)), 0.5)
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
    arguments = [sys.executable, "-c", code, *map(str, (clip, broken, damaged, photo))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read", "refused", "read", "refused"]
    assert done.stderr == ""


# --- names, kinds, members


def test_special_characters_in_names(tmp_path: Path) -> None:
    folder = tmp_path / "a:b %03d"
    folder.mkdir()
    path = encode(tmp_path / "clip.mp4", 3).rename(folder / "c:d%03d?*[x] é.mp4")
    with open_media(path) as media:
        assert media.read_frames([2]).shape == (1, 64, 96, 3)


def test_a_video_with_sound(tmp_path: Path) -> None:
    with open_media(encode(tmp_path / "clip.mp4", 50, tone=2.0)) as media:
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
        assert media.read_audio(16_000, seconds=0.5).samples.shape == (8000,)
        np.testing.assert_array_equal(media.read_audio(seconds=0.5).samples, stored.samples[:, :22_050])


def test_sound_of_arrays_and_files_is_the_same(tmp_path: Path) -> None:
    from intertitle.runtime.preprocess.audio import resample

    with open_media(encode(tmp_path / "clip.mp4", 5, tone=1.0)) as media:
        stored = media.read_audio()
        heard = media.read_audio(16_000).samples
    np.testing.assert_array_equal(resample(stored.samples, stored.sample_rate, 16_000), heard)


def write_wave(path: Path, samples: np.ndarray, rate: int) -> Path:
    """int16 ``[n, channels]``."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_a_sound_file_is_read_as_stored(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (12_345, 2)).astype(np.int16)
    with open_media(write_wave(tmp_path / "sound.wav", samples, 22_050)) as media:
        assert (media.kind, media.has_video, media.num_frames, media.width) == ("audio", False, 0, 0)
        assert media.duration == pytest.approx(12_345 / 22_050)
        stored = media.read_audio()
        assert stored.sample_rate == 22_050
        np.testing.assert_array_equal(stored.samples, samples.T / np.float32(32768))
        with pytest.raises(MediaError, match="only sound"):
            media.read_frames([0])


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.flac"
    samples = np.random.default_rng(0).integers(-9999, 9999, (44_100, 1)).astype(np.int16)
    with open_media(write_wave(tmp_path / "sound.wav", samples, 44_100)) as media:
        sound = media.read_audio().samples
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("flac", rate=44_100, layout="mono")
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = type(cover.disposition).attached_pic
        picture_frame = av.VideoFrame.from_ndarray(picture(0, 32, 32), format="rgb24").reformat(format="yuvj420p")
        picture_frame.pts = 0
        container.mux(cover.encode(picture_frame))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(samples.T, "s16", "mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with open_media(path) as media:
        assert (media.kind, media.has_video, media.has_audio) == ("audio", False, True)
        np.testing.assert_array_equal(media.read_audio().samples, sound)


def test_a_video_without_sound(tmp_path: Path) -> None:
    with open_media(encode(tmp_path / "clip.mp4", 3)) as media:
        assert not media.has_audio
        with pytest.raises(MediaError, match="no sound"):
            media.read_audio()


def test_indices_are_checked(tmp_path: Path) -> None:
    with open_media(encode(tmp_path / "clip.mp4", 3)) as media:
        for wrong in ([3], [-1], [0, 7]):
            with pytest.raises(IndexError):
                media.read_frames(wrong)
        assert media.read_frames([]).shape == (0, 64, 96, 3)
        assert sorted(index for index, _ in media.iter_frames([2, 0, 2])) == [0, 2]


def test_files_are_let_go(tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("no /proc here")
    path = encode(tmp_path / "clip.mp4", 3, tone=0.2)
    broken = cut(path, 0.5)

    def count() -> int:
        return sum(1 for _ in open_files.iterdir())

    before = count()
    for _ in range(3):
        with open_media(path) as media:
            media.read_frames([1])
            media.read_audio()
        refusal(broken)
    assert count() == before


# --- images


def write_image(path: Path, image: np.ndarray, **options: Any) -> Path:
    from PIL import Image

    Image.fromarray(image).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "wrongly-named.mp4"])
@pytest.mark.parametrize("size", [(160, 96), (161, 91)])
def test_images_are_pillows(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    kind = {"format": "JPEG"} if name.endswith("mp4") else {}
    path = write_image(tmp_path / name, picture(1, *size), **kind)
    with open_media(path) as media:
        assert (media.kind, media.num_frames, media.duration) == ("image", 1, 0.0)
        assert (media.width, media.height) == size
        np.testing.assert_array_equal(media.read_frames([0, 0])[1], np.asarray(pil.open(path).convert("RGB")))


def test_palettes_grey_and_alpha(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(picture(1, 40, 30))
    transparent = image.copy()
    transparent.putalpha(pil.fromarray(picture(2, 40, 30)[..., 0]))
    for number, variant in enumerate([image.convert("L"), image.convert("P"), image.convert("1"), transparent]):
        path = tmp_path / f"{number}.png"
        variant.save(path)
        with open_media(path) as media:
            np.testing.assert_array_equal(media.read_frames([0])[0], np.asarray(variant.convert("RGB")))


def test_a_photo_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(picture(1, 48, 32))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to view
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    with open_media(tmp_path / "turned.jpg") as turned, open_media(tmp_path / "plain.jpg") as plain:
        np.testing.assert_array_equal(turned.read_frames([0])[0], np.rot90(plain.read_frames([0])[0], -1))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_damaged_image_is_refused(name: str, tmp_path: Path) -> None:
    assert "damaged" in refusal(cut(write_image(tmp_path / name, picture(1, 80, 60)), 0.5))


def test_a_folder_is_a_clip_in_natural_order(tmp_path: Path) -> None:
    names = ["frame2.png", "frame10.png", "frame1.png", "Frame3.jpg"]
    for number, name in enumerate(names):
        write_image(tmp_path / name, np.full((8, 10, 3), 10 * number, np.uint8))
    (tmp_path / "notes.txt").write_text("not a frame")
    write_image(tmp_path / ".hidden.png", np.zeros((8, 10, 3), np.uint8))
    with open_media(tmp_path) as media:
        assert (media.kind, media.num_frames, media.fps) == ("video", 4, 3.0)
        assert media.duration == pytest.approx(4 / 3)
        # Frame3, frame1, frame2, frame10.
        assert media.read_frames([0, 1, 2, 3])[:, 0, 0, 0].tolist() == [30, 20, 0, 10]
        assert not media.has_audio


def test_images_of_a_folder_must_be_of_one_size(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png", np.zeros((8, 10, 3), np.uint8))
    write_image(tmp_path / "2.png", np.zeros((9, 10, 3), np.uint8))
    with open_media(tmp_path) as media, pytest.raises(MediaError, match=r"2\.png: 10x9 .* 10x8"):
        media.read_frames([0, 1])


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_an_animated_gif_is_a_video(disposal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pil = pytest.importorskip("PIL.Image")
    frames = [pil.fromarray(picture(index, 60, 40)).quantize(128) for index in range(7)]
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, disposal=disposal)
    with pil.open(path) as gif:
        reference = []
        for index in range(gif.n_frames):
            gif.seek(index)
            reference.append(np.asarray(gif.convert("RGB")))
    with open_media(path) as media:
        assert (media.kind, media.num_frames) == ("video", 7)
        np.testing.assert_array_equal(media.read_frames(range(7)), reference)
        np.testing.assert_array_equal(media.read_frames([5, 2]), [reference[5], reference[2]])
        assert media.fps == pytest.approx(25)


# --- arrays


def test_frames_from_arrays() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    assert as_frames(frames) is frames
    assert as_frames(frames.tolist() if False else list(frames)).shape == (2, 4, 6, 3)


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
        (np.zeros((1, 1, 20_000, 3), np.uint8), "20000x1"),
    ],
)
def test_frames_that_are_refused(array: np.ndarray, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        as_frames(array)


def test_waveforms_from_arrays() -> None:
    mono = np.array([0, 16384, -32768], np.int16)
    assert as_waveform(mono, 16_000).samples.tolist() == [0.0, 0.5, -1.0]
    stereo = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    for given_array in (stereo, stereo.T):
        sound = as_waveform(given_array, 8000)
        assert sound.samples.dtype == np.float32
        np.testing.assert_array_equal(sound.samples, stereo.T.astype(np.float32))
        assert sound.duration == pytest.approx(3 / 8000)
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
        (np.zeros(4), 0, "sample rate"),
        (np.zeros(4), -8000, "sample rate"),
        (np.zeros(4), 16_000.5, "sample rate"),
        (np.zeros(4), True, "sample rate"),
    ],
)
def test_waveforms_that_are_refused(array: np.ndarray, rate: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        as_waveform(array, rate)


# --- the real clips, where they are at hand

REAL = Path(__file__).parents[2].parent / "shared" / "media"
CLIPS: dict[str, Callable[[Media], object]] = {
    "sample_demo_3.mp4": lambda m: (m.num_frames, m.width, m.height, m.has_audio),
    "output_v_3V9tzjyr51I.mp4": lambda m: (m.num_frames, m.width, m.height, m.has_audio),
    "bird-twitter-car.wav": lambda m: (m.kind, m.has_video, round(m.duration, 2), m.has_audio),
}
FACTS = {
    "sample_demo_3.mp4": (146, 640, 360, True),
    "output_v_3V9tzjyr51I.mp4": (150, 480, 360, False),
    "bird-twitter-car.wav": ("audio", False, 27.35, True),
}


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REAL / name
    if not path.exists():
        pytest.skip("the real clips are not here")
    with open_media(path) as media:
        assert CLIPS[name](media) == FACTS[name]
    if name.endswith("mp4"):
        assert_exact(path, monkeypatch, draws=2)


def test_seek_cost_is_worth_a_jump() -> None:
    # A guard against a slip of the pen: 0 would refill the decoder for nothing, a group's length would never jump.
    assert 1 <= packets.SEEK_COST <= 50
