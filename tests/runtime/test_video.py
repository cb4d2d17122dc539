"""Every frame that is read is the one that decoding everything gives, however little was decoded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.runtime.media import open_media, video
from intertitle.runtime.media.packets import PacketIndex, VideoPacket, plan_runs

H264 = {
    "one long group": {"g": "300", "bf": "3"},
    "short groups": {"g": "12", "bf": "3", "sc_threshold": "0"},
    "keyframes only": {"g": "1"},
    "open groups": {"g": "16", "bf": "4", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"},
    "pyramid": {"g": "30", "bf": "8", "x264-params": "b-pyramid=strict:b-adapt=2"},
    "interlaced": {"g": "15", "bf": "2", "flags": "+ildct+ilme"},
}


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("structure", H264)
def test_h264_frames_are_exact(structure: str, container: str, clips: Any) -> None:
    clips.assert_exact(clips.encode(f"clip.{container}", options=H264[structure]))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("clip.mp4", "mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
        ("clip.avi", "mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
        ("reordered.avi", "libx264", "yuv420p", H264["short groups"]),
        ("clip.mpg", "mpeg2video", "yuv420p", {"bf": "2", "g": "12"}),
        ("clip.mp4", "mjpeg", "yuvj420p", {}),
        ("clip.flv", "libx264", "yuv420p", H264["short groups"]),
        ("clip.h264", "libx264", "yuv420p", H264["short groups"]),
        ("clip.webm", "libvpx-vp9", "yuv420p", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_other_codecs_are_exact(name: str, codec: str, pix_fmt: str, options: dict[str, str], clips: Any) -> None:
    clips.assert_exact(clips.encode(name, codec=codec, pix_fmt=pix_fmt, options=options))


def test_hevc_open_groups_are_exact(clips: Any) -> None:
    params = "keyint=16:min-keyint=16:open-gop=1:bframes=4:log-level=none:pools=1"
    clips.assert_exact(clips.encode(codec="libx265", options={"x265-params": params, "preset": "ultrafast"}))


def test_frames_that_vp8_hides_are_not_counted(clips: Any) -> None:
    whole = clips.encode("clip.webm", codec="libvpx", options={"g": "20", "deadline": "realtime", "cpu-used": "8"})

    def hide(number: int, content: bytes) -> bytes:
        # Clear the bit show_frame, as in an alternate reference frame.
        return bytes([content[0] & ~0x10]) + content[1:] if number in (5, 33, 34) else content

    path = clips.remux(whole, "hidden.webm", hide)
    clips.assert_exact(path)
    with open_media(path) as media:
        assert media.num_frames == 57


def test_intra_refresh_is_exact(clips: Any) -> None:
    # Frames right after such a "keyframe" are not whole yet: they are found by decoding from the start.
    path = clips.encode(options={"bf": "0", "g": "20", "x264-params": "intra-refresh=1"})
    reference = clips.decode(path)
    with open_media(path) as media:
        for index in range(0, 60, 7):
            np.testing.assert_array_equal(media.read_frames([index])[0], reference[index])


def test_fragmented_mp4_is_exact(clips: Any) -> None:
    path = clips.encode(options=clips.SHORT_GROUPS)
    clips.assert_exact(clips.remux(path, "fragments.mp4", movflags="frag_keyframe+empty_moov"))


def test_variable_frame_rate_is_exact(clips: Any) -> None:
    times = np.sort(np.random.default_rng(0).choice(9000, 50, replace=False)).tolist()
    path = clips.encode("clip.mp4", 50, options=clips.SHORT_GROUPS, times=times)
    clips.assert_exact(path)
    with open_media(path) as media:
        assert media.duration == pytest.approx((times[-1] - times[0]) / 1000, abs=0.5)


@pytest.mark.parametrize("size", [(161, 91), (35, 18)])
def test_odd_sizes_are_exact(size: tuple[int, int], clips: Any) -> None:
    path = clips.encode("clip.mp4", 20, size, pix_fmt="yuv444p", options=clips.SHORT_GROUPS)
    clips.assert_exact(path)
    with open_media(path) as media:
        assert (media.width, media.height) == size


def test_one_frame(clips: Any) -> None:
    path = clips.encode("clip.mp4", 1)
    clips.assert_exact(path)
    with open_media(path) as media:
        assert media.kind == "video"
        assert media.read_frames([0, 0, 0]).shape == (3, 64, 96, 3)


def test_few_packets_are_decoded_for_frames_far_apart(clips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.encode("clip.mp4", 120, options={"g": "20", "bf": "0", "sc_threshold": "0"})
    decoded = []
    genuine = video._decode

    def counted(stream: Any, packet: Any) -> list[Any]:
        decoded.append(packet)
        return genuine(stream, packet)

    monkeypatch.setattr(video, "_decode", counted)
    with open_media(path) as media:
        media.read_frames([2, 43, 101])
    # Three packets to reach frame 2 of the first group, four for frame 43, two for 101; None drains the decoder.
    assert sum(packet is not None for packet in decoded) == 3 + 4 + 2


def test_where_a_seek_fails_the_packets_are_read_through(clips: Any) -> None:
    path = clips.encode(options=clips.SHORT_GROUPS)
    reference = clips.decode(path)

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
            usable = [key for key in keys if key <= number and times[key] <= times[number]]
            assert run.start <= max(usable, default=0)
            assert number <= run.stop


TURNS = {
    "a quarter clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "a quarter counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_video_is_turned_as_players_do(turn: str, clips: Any) -> None:
    path = clips.encode("clip.mp4", 5)
    reference = clips.decode(path)
    matrix, turned = TURNS[turn]
    with open_media(clips.set_display_matrix(path, *matrix)) as media:
        frames = media.read_frames([0, 3])
        np.testing.assert_array_equal(frames, [turned(reference[0]), turned(reference[3])])
        assert (media.width, media.height) == (frames.shape[2], frames.shape[1])


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_an_animated_gif_is_a_video(disposal: int, clips: Any) -> None:
    pil = pytest.importorskip("PIL.Image")
    frames = [pil.fromarray(clips.picture(index, 60, 40)).quantize(128) for index in range(7)]
    path = clips.folder / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, disposal=disposal)
    reference = [np.asarray(frame.convert("RGB")) for frame in frames]
    with open_media(path) as media:
        assert (media.kind, media.num_frames, media.fps) == ("video", 7, pytest.approx(25))
        np.testing.assert_array_equal(media.read_frames(range(7)), reference)
        np.testing.assert_array_equal(media.read_frames([5, 2]), [reference[5], reference[2]])


# --- damage


def test_a_file_that_is_cut_off_yields_the_frames_before_the_cut(clips: Any) -> None:
    whole = clips.encode(options={**clips.SHORT_GROUPS, "bf": "0"})
    reference = clips.decode(whole)
    with open_media(clips.cut(clips.remux(whole, "fast.mp4", movflags="faststart"), 0.6)) as media:
        assert 10 < media.num_frames < 50
        np.testing.assert_array_equal(media.read_frames(range(media.num_frames)), reference[: media.num_frames])
        if hasattr(av.stream.Stream, "index_entries"):
            assert media.notes == [f"the file is cut off: it holds {media.num_frames} of its 60 frames"]


def test_a_recording_that_begins_inside_a_group(clips: Any) -> None:
    content = clips.encode("clip.ts", options=clips.SHORT_GROUPS).read_bytes()
    blocks = [content[place : place + 188] for place in range(0, len(content), 188)]
    path = clips.folder / "tail.ts"
    # The first three blocks name the streams; of the rest the first quarter is missing.
    path.write_bytes(b"".join(blocks[:3] + blocks[len(blocks) // 4 :]))
    clips.assert_exact(path)
    with open_media(path) as media:
        assert 20 < media.num_frames < 55


def test_frames_that_cannot_be_decoded_are_replaced_by_the_nearest_earlier_one(clips: Any) -> None:
    path = clips.encode("clip.mp4", 20, options={"g": "1"})
    reference = clips.decode(path)
    with open_media(clips.destroy(path, [7, 8, 19])) as media:
        assert media.num_frames == 20
        frames = media.read_frames([3, 7, 8, 9, 19])
        np.testing.assert_array_equal(frames, [reference[index] for index in (3, 6, 6, 9, 18)])
        assert media.notes == ["frames that cannot be decoded (7, 8, 19) were replaced by the nearest earlier one"]


def test_the_frames_around_a_damaged_one_are_whole(clips: Any) -> None:
    # With threads, an error takes frames down that others are still working on.
    path = clips.encode(options=clips.SHORT_GROUPS)
    reference = clips.decode(path)
    with open_media(clips.destroy(path, [59])) as media:
        frames = media.read_frames(range(media.num_frames))
        # The last packet is of a frame that is shown before the last.
        assert [index for index in range(60) if not np.array_equal(frames[index], reference[index])] == [58]
        np.testing.assert_array_equal(frames[58], reference[57])


def test_before_the_first_whole_frame_the_next_one_stands_in(clips: Any) -> None:
    path = clips.encode("clip.mp4", 8, codec="mjpeg", pix_fmt="yuvj420p")
    reference = clips.decode(path)
    with open_media(clips.destroy(path, [0, 1])) as media:
        np.testing.assert_array_equal(media.read_frames([0, 1, 2]), [reference[2]] * 3)
        assert len(media.notes) == 1


def test_without_a_single_whole_frame(clips: Any) -> None:
    path = clips.destroy(clips.encode("clip.mp4", 6, options={"g": "1"}), range(6))
    assert "no frame of the video can be decoded" in clips.refusal(path)


def test_frames_of_another_size_are_scaled(clips: Any) -> None:
    path = clips.folder / "clip.ts"
    sizes = [(96, 64), (128, 80)]
    path.write_bytes(b"".join(clips.encode(f"{n}.ts", 10, size).read_bytes() for n, size in enumerate(sizes)))
    with open_media(path) as media:
        assert media.num_frames == 20
        assert media.read_frames([0, 19]).shape == (2, 64, 96, 3)
        assert media.notes == ["frames change size midway: all were scaled to 96x64"]


# --- the real clips, where they are at hand

REAL = Path(__file__).parents[2].parent / "shared" / "media"


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("sample_demo_3.mp4", ("video", 146, 640, 360, True, 6.09)),
        ("output_v_3V9tzjyr51I.mp4", ("video", 150, 480, 360, False, 5.0)),
        ("bird-twitter-car.wav", ("audio", 0, 0, 0, True, 27.35)),
    ],
)
def test_real_clips(name: str, members: tuple[object, ...], clips: Any) -> None:
    path = REAL / name
    if not path.exists():
        pytest.skip("the real clips are not here")
    with open_media(path) as media:
        found = media.kind, media.num_frames, media.width, media.height, media.has_audio, round(media.duration, 2)
        assert found == members
    if media.has_video:
        clips.assert_exact(path, draws=2)


def test_threads_of_the_decoder_are_bounded(clips: Any) -> None:
    path = clips.encode("clip.mp4", 30, options=clips.SHORT_GROUPS)
    frames = []
    for threads in (1, 3):
        with open_media(path, threads) as media:
            frames.append(media.read_frames(range(media.num_frames)))
            assert media._frames._stream.codec_context.thread_count == threads  # type: ignore[union-attr]
    np.testing.assert_array_equal(*frames)
