"""Spans of a source and near-duplicate frames, from files to what a captioner looks at and listens to."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from intertitle.contract.pipeline import (
    EachUnit,
    ImagePlan,
    Pipeline,
    PromptLayout,
    Sampling,
    SoundPlan,
    Stage,
    StageInput,
    Text,
    Tokens,
    Unit,
    Window,
)
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.clip import Clip, array_clip, read_clip
from intertitle.runtime.media import open_media
from intertitle.runtime.preprocess.audio import POLICIES, SoundPolicy, audio_policy, join_clips, video_policy
from intertitle.runtime.preprocess.frames import sample_indices, span_frames
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Viewing
from msgspec import convert
from msgspec.structs import replace

IMAGE = ImagePlan("exact", 28, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SOUND = SoundPlan(sample_rate=16_000, num_samples=480_000, num_mel_bins=128, num_frames=2998)


def pipeline(rule: str, sound: SoundPlan | None = None, unit: Unit | None = None, **sampling: Any) -> Pipeline:
    """Eight places; ``unit``: of the stage behind the tower."""
    vision = Stage(name="vision", unit=EachUnit(), inputs=(StageInput("x", "pixels"),), output="y", tokens=4)
    inputs = (StageInput("x", "vision"),)
    connector = Stage(name="connector", unit=unit or EachUnit(), inputs=inputs, output="y", tokens=4)
    plan = convert({"rule": rule, "count": 8, **sampling}, Sampling)
    return Pipeline(sampling=plan, image=IMAGE, sound=sound, stages=(vision, connector), prompts={})


#: One that joins frames and hears, one that takes frame by frame and is deaf.
SPEC = pipeline("centered", SOUND, Window(2, 2))
LINEAR = pipeline("linspace")


def read(source: Any, spec: Pipeline = SPEC, **options: Any) -> Clip:
    return read_clip(source, spec, Viewing(**options), Stages())


def test_span_frames_follow_the_reference_by_hand() -> None:
    assert span_frames(250, 25.0, None, None, "centered") == (0, 249)
    assert span_frames(250, 25.0, 2.0, 4.0, "centered") == (49, 99)
    assert span_frames(250, 25.0, None, 4.0, "centered") == (0, 99)
    assert span_frames(250, 25.0, 9.0, 99.0, "centered") == (224, 249)
    assert span_frames(250, 25.0, 0.0, 0.01, "centered") == (0, 0)  # never empty
    assert span_frames(250, 25.0, 2.0, 2.01, "centered") == (49, 49)
    assert span_frames(250, 25.0, 2.0, 4.0, "linspace") == (50, 99)  # without the frame before the cut
    assert span_frames(250, 30000 / 1001, 1.001, 2.002, "linspace") == (30, 59)
    with pytest.raises(MediaError, match="ends before 20 s"):
        span_frames(250, 25.0, 20.0, None, "centered")
    with pytest.raises(MediaError, match="frame rate"):
        span_frames(250, 0.0, 1.0, None, "centered")


@pytest.mark.parametrize("spec", [SPEC, LINEAR])
def test_a_span_of_a_video_with_sound(spec: Pipeline, clips: Any) -> None:
    path = clips.encode("clip.mp4", 200, options=clips.SHORT_GROUPS, tone=8.0)
    clip = read(path, spec, start=3.0, end=6.0)
    assert (clip.start, clip.seconds) == (3.0, 3.0)
    first, last = (74, 149) if spec is SPEC else (75, 149)
    with open_media(path) as media:
        wanted = media.read_frames(first + sample_indices(last - first + 1, 8, spec.sampling.rule))
        heard = media.read_audio(16_000).samples
    assert clip.frames is not None
    np.testing.assert_array_equal(clip.frames[clip.order], wanted)
    if spec.sound is None:
        assert clip.sound is None
    else:
        np.testing.assert_allclose(clip.sound, video_policy(heard[48_000:96_000]), atol=1e-3)
    assert clip.notes == []


def test_spans_that_reach_an_end(clips: Any) -> None:
    path = clips.encode("clip.mp4", 100, tone=4.0)
    whole, to_end = read(path), read(path, start=0.0, end=99.0)
    assert whole.seconds == to_end.seconds == pytest.approx(4.0)
    for name in ("frames", "order", "sound"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(to_end, name))
    tail = read(path, start=3.9)
    assert tail.seconds == pytest.approx(0.1)
    assert any("frames were repeated" in note for note in tail.notes)


def test_pictures_without_sound_in_the_span(clips: Any) -> None:
    clip = read(clips.encode("clip.mp4", 100, tone=1.0), start=2.0, end=3.0)
    assert clip.mode == "video"
    assert any("the sound cannot be used" in note and "ends before 2 s" in note for note in clip.notes)


def test_a_span_of_a_sound_file(clips: Any) -> None:
    samples = np.random.default_rng(0).integers(-9999, 9999, (22_050 * 50, 1)).astype(np.int16)
    path = clips.wave("sound.wav", samples, 22_050)
    stored = (samples.T / np.float32(1 << 15)).astype(np.float32)
    clip = read(path, start=5.0, end=12.0)
    assert (clip.start, clip.seconds, clip.notes) == (5.0, 7.0, [])
    np.testing.assert_array_equal(clip.sound, audio_policy(stored[:, 5 * 22_050 : 12 * 22_050], 22_050))
    clip = read(path, start=10.0)
    assert clip.notes == ["the sound lasts 40 s: its first 30 s were heard"]
    np.testing.assert_array_equal(clip.sound, audio_policy(stored[:, 10 * 22_050 :], 22_050))


def test_the_policy_of_the_plan_says_what_is_heard(clips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hears two samples of a video and makes ones of a sound alone, in files and arrays."""
    assert set(POLICIES) == set(get_args(get_type_hints(SoundPlan)["policy"]))
    policy = SoundPolicy(
        alone=lambda samples, rate, count: np.ones(count, np.float32),
        of_video=lambda samples, count: join_clips([samples[8000:8002]], count),
        bounds=lambda count: [(8000, 8002)],
    )
    monkeypatch.setitem(POLICIES, SOUND.policy, policy)
    path = clips.encode("clip.mp4", 50, tone=2.0)
    with open_media(path) as media:
        heard = media.read_audio(16_000).samples
    of_file = read(path).sound
    assert of_file is not None
    assert of_file.nonzero()[0].tolist() == [0, 1]
    np.testing.assert_allclose(of_file[:2], heard[8000:8002], atol=1e-3)
    samples = np.arange(9000, dtype=np.float32) / 2**14
    of_arrays = array_clip(levels(1, 2, 3), samples, 16_000, SPEC).sound
    assert of_arrays is not None
    np.testing.assert_array_equal(of_arrays[:3], [8000 / 2**14, 8001 / 2**14, 0])
    wave = clips.wave("sound.wav", np.zeros((100, 1), np.int16), 16_000)
    for alone in (read(wave).sound, array_clip(None, samples, 16_000, SPEC).sound):
        np.testing.assert_array_equal(alone, np.ones(480_000))


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ({"start": -1.0}, "from 0 to"),
        ({"start": float("nan")}, "from 0 to"),
        ({"end": float("inf")}, "from 0 to"),
        ({"end": 0.0}, "ends after it starts"),
        ({"start": 3.0, "end": 3.0}, "ends after it starts"),
        ({"start": 3.0, "end": 2.0}, "ends after it starts"),
        ({"duplicates": -1.0}, "0 to 255"),
    ],
)
def test_spans_that_cannot_be(span: dict[str, float], reason: str, clips: Any) -> None:
    with pytest.raises(OptionError, match=reason) as caught:
        read(clips.encode("clip.mp4", 3), **span)
    assert str(caught.value).isprintable()


def test_a_start_after_the_end(clips: Any) -> None:
    for path in (clips.encode("clip.mp4", 25), clips.wave("a.wav", np.ones((8000, 1), np.int16), 8000)):
        with pytest.raises(MediaError, match=rf"{path.name}: lasts 1.00 s, the span starts at 1.5 s"):
            read(path, start=1.5)


def test_images_have_no_time(clips: Any) -> None:
    path = clips.image("a.png", clips.picture(0, 40, 30))
    for source in (path, path.parent):
        assert read(source).start == 0.0
        with pytest.raises(OptionError, match="images have no time"):
            read(source, start=0.0)


# --- near-duplicates


def levels(*values: int) -> np.ndarray:
    return np.stack([np.full((20, 30, 3), value, np.uint8) for value in values])


def test_the_place_of_a_dropped_frame_shows_the_kept_one() -> None:
    frames = levels(10, 11, 50, 50, 51, 90, 90, 10)
    clip = array_clip(frames, None, None, SPEC, duplicates=2.0)
    assert clip.order is not None
    assert clip.order.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_array_equal(clip.frames, levels(10, 50, 90, 10))
    assert clip.notes == ["4 near-duplicate frames were replaced by the one before"]
    clip = array_clip(frames, None, None, LINEAR, duplicates=2.0)
    assert clip.order is not None
    assert clip.order.tolist() == [0, 1, 2, 3]
    assert clip.notes == ["4 near-duplicate frames were dropped"]
    assert array_clip(frames, None, None, SPEC).notes == []


def test_frames_that_a_short_clip_repeats() -> None:
    clip = array_clip(levels(10, 60, 110), None, None, SPEC, duplicates=2.0)
    assert clip.frames is not None
    assert (len(clip.frames), len(clip.order), clip.notes) == (3, 8, [])  # type: ignore[arg-type]
    clip = array_clip(levels(10, 60, 110), None, None, LINEAR, duplicates=2.0)
    assert clip.order is not None
    assert clip.order.tolist() == [0, 1, 2]


def test_a_video_that_stands_still(clips: Any) -> None:
    pictures = [clips.picture(index // 30, 96, 64) for index in range(60)]
    folder = clips.folder / "still"
    folder.mkdir()
    for index, picture in enumerate(pictures):
        clips.image(f"still/{index}.png", picture)
    clip = read(folder, duplicates=1.0)
    assert clip.frames is not None
    np.testing.assert_array_equal(clip.frames, [pictures[0], pictures[59]])
    assert clip.order.tolist() == [0] * 4 + [1] * 4  # type: ignore[union-attr]
    assert "6 near-duplicate frames were replaced by the one before" in clip.notes


# What a prompt may say of time

TIMED = pipeline("rate", fps=1.0)


def test_times_of_a_video_are_those_of_its_frames(clips: Any) -> None:
    path = clips.encode("seconds.mp4", 125)
    clip = read(path, TIMED)
    assert clip.timing is not None
    assert clip.timing.seconds == pytest.approx(5.0)
    assert clip.timing.times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    # A span is a clip of its own: its times begin at 0.
    part = read(path, TIMED, start=2.0, end=4.0)
    assert part.timing is not None
    assert (part.timing.seconds, part.timing.times.tolist()) == (pytest.approx(2.0), [0.0, 1.0])
    assert part.start == 2.0
    every = read(path, pipeline("rate", fps=1.0, forced=True))
    assert every.timing is not None
    np.testing.assert_allclose(every.timing.times, np.linspace(0, 124, 8).astype(int) / 25)


def test_nothing_is_known_of_the_times_of_images(tmp_path: Path) -> None:
    import cv2

    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    assert read(tmp_path / "a.png", TIMED).timing is None
    assert array_clip(levels(1, 2, 3), None, None, TIMED).timing is None


#: Two frames a run: a clip of one place would give its connector nothing to do.
JOINED = pipeline("rate", None, Window(2, 2), fps=1.0)


def test_frames_are_repeated_until_every_stage_has_some(clips: Any) -> None:
    assert JOINED.least_places() == 2
    path = clips.encode("clip.mp4", 20)
    clip = read(path, JOINED)
    assert clip.order is not None
    assert clip.timing is not None
    assert (clip.order.tolist(), clip.timing.times.tolist()) == ([0, 0], [0.0, 0.0])
    assert clip.notes == ["only 1 frames for 2 places: frames were repeated"]
    # By hand: of 3 frames that a stage wants 5 of, 0 and 1 stand at two places.
    wide = pipeline("rate", None, Window(5, 1), fps=1.0)
    clip = array_clip(levels(1, 2, 3), None, None, wide)
    assert clip.order is not None
    assert clip.order.tolist() == [0, 0, 1, 1, 2]
    clip = array_clip(levels(1, 2, 3), None, None, wide, frame_times=[0, 1, 2], seconds=3)
    assert clip.timing is not None
    assert clip.timing.times.tolist() == [0, 0, 1, 1, 2]
    # An image stands at every place, from a file and from an array.
    image = read(clips.image("a.png", clips.picture(0, 40, 30)), JOINED)
    for one in (image, array_clip(levels(1), None, None, JOINED)):
        assert one.order is not None
        assert one.order.tolist() == [0] * 8


def test_places_that_show_nothing_new_take_their_times_along() -> None:
    frames = levels(10, 10, 60, 60)
    clip = array_clip(frames, None, None, TIMED, frame_times=[0, 1, 2.5, 3], seconds=4, duplicates=2.0)
    assert clip.timing is not None
    assert (clip.timing.times.tolist(), clip.timing.seconds, clip.seconds) == ([0.0, 2.5], 4.0, 4.0)


def test_frames_with_times_are_already_sampled() -> None:
    frames = levels(*range(11))
    assert len(array_clip(frames, None, None, TIMED).order) == 8
    clip = array_clip(frames[:5], None, None, TIMED, frame_times=np.arange(5))
    assert clip.order.tolist() == list(range(5))
    assert clip.timing is not None
    assert clip.timing.seconds == 4.0
    # More than it was made for: they would not fit into memory.
    with pytest.raises(OptionError, match="11 frames, this captioner looks at 8"):
        array_clip(frames, None, None, TIMED, frame_times=np.arange(11))
    # Where stages join frames, their number is the pipeline's.
    with pytest.raises(OptionError, match="11 frames, this captioner looks at 8"):
        array_clip(frames, None, None, SPEC, frame_times=np.arange(11))


@pytest.mark.parametrize(
    ("times", "seconds", "message"),
    [
        ([0, 1], None, "one number for each of the 3 frames"),
        ([0, 2, 1], None, "ascending"),
        ([-1, 0, 1], None, "from 0 on"),
        ([0, 1, float("nan")], None, "from 0 on"),
        (["a", "b", "c"], None, "seconds of each frame"),
        ([0, 1, 5], 4, "the clip lasts 4 s"),
        ([0, 1, 2], -1, "seconds must be"),
        ([0, 1, 2], float("inf"), "seconds must be"),
        ([0, 1, 2], float("nan"), "seconds must be"),
        ([0, 1, 2], True, "seconds is a number, not True"),
        ([0, 1, 2], "4", "seconds is a number, not '4'"),
        ([0, 1, 2], 10**400, "seconds is a number below"),
        ([0, 1, 10**400], None, "seconds of each frame"),
        ([0, 1, 2j], None, "seconds of each frame"),
        (np.array(["1970", "1971", "1972"], "M8[s]"), None, "seconds of each frame"),
        (np.array([1, 2, 3], "m8[s]"), None, "seconds of each frame"),
        (["0", "1", "2"], None, "seconds of each frame"),
        ([False, False, True], None, "seconds of each frame"),
        ([[0], [1, 2]], None, "seconds of each frame"),
    ],
)
def test_times_that_cannot_be(times: Any, seconds: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        array_clip(levels(1, 2, 3), None, None, TIMED, frame_times=times, seconds=seconds)


@pytest.mark.parametrize("seconds", [4, 4.0, np.int64(4), np.float32(4), Fraction(4)])
def test_numbers_of_any_library_are_seconds(seconds: Any) -> None:
    clip = array_clip(levels(1, 2), None, None, TIMED, frame_times=[Fraction(1, 2), np.float16(1.5)], seconds=seconds)
    assert clip.timing is not None
    assert (clip.seconds, type(clip.seconds), clip.timing.times.tolist()) == (4.0, float, [0.5, 1.5])


def test_seconds_alone_say_nothing_to_a_prompt() -> None:
    timed = PromptLayout((Text("{seconds} s: "), Tokens("connector")), untimed=(Tokens("connector"),))
    speaking = replace(TIMED, prompts={"video": timed})
    silent = replace(TIMED, prompts={"video": PromptLayout((Tokens("connector"),))})
    note = "the prompt does not speak of time: frame_times= is missing, seconds= alone does not do"
    assert array_clip(levels(1, 2), None, None, speaking, seconds=4).notes == [note]
    assert array_clip(levels(1, 2), None, None, speaking, seconds=4, frame_times=[1, 2]).notes == []
    assert array_clip(levels(1, 2), None, None, speaking).notes == []
    assert array_clip(levels(1, 2), None, None, silent, seconds=4).notes == []


def test_times_without_frames() -> None:
    with pytest.raises(OptionError, match="needs frames="):
        array_clip(None, np.zeros(10, np.float32), 16000, SPEC, frame_times=[0])
