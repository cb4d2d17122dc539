"""The clips that the audio policy takes of a long sound, without holding all of it."""

from __future__ import annotations

import tracemalloc
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.runtime.media import open_media, sound
from intertitle.runtime.media.sound_frames import Ranges
from intertitle.runtime.preprocess.audio import clip_bounds, join_clips, video_policy


def noise(path: Path, seconds: float, rate: int = 8000) -> Path:
    """Mono PCM."""
    samples = np.random.default_rng(0).integers(-8000, 8000, round(seconds * rate)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ranges_are_slices(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=8))
    samples = np.arange(sum(lengths), dtype=np.int16)
    bound = st.integers(0, 200)
    ranges = [tuple(sorted(data.draw(st.tuples(bound, bound)))) for _ in range(data.draw(st.integers(0, 5)))]
    kept = Ranges(ranges)
    place = 0
    for length in lengths:
        kept.add(samples[place : place + length])
        place += length
    assert kept.total == len(samples)
    for first, last in ranges:
        np.testing.assert_array_equal(kept.part(first, last), samples[first:last])
    assert len(kept.part(199, 300)) == 0


@pytest.mark.parametrize("stated", [None, 0.0, 5.0, 1000.0])
@pytest.mark.parametrize("seconds", [20.0, 1.5])
def test_clips_of_a_long_sound_are_those_of_the_whole(
    stated: float | None, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound, "_SHORT_SECONDS", 1)
    monkeypatch.setattr(sound, "_SPARE_SECONDS", 1)
    with open_media(noise(tmp_path / "noise.wav", seconds)) as media:
        reader: Any = media._sound
        for start, length in ((0.0, None), (0.5, None), (0.25, 0.9), (1.0, 100.0)):
            whole = media.read_audio(16_000, length, start).samples
            if stated is not None:
                reader._stated = stated
            clips = media.read_audio_parts(16_000, clip_bounds, length, start)
            np.testing.assert_array_equal(join_clips(clips), video_policy(whole))
            assert all(clip.dtype == np.float32 for clip in clips)


def test_of_a_long_sound_little_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "_SHORT_SECONDS", 1)
    path = noise(tmp_path / "noise.wav", 400)
    with open_media(path) as media:
        tracemalloc.start()
        try:
            clips = media.read_audio_parts(16_000, clip_bounds)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # 400 s at 16 kHz are 13 MB of int16 and 26 MB of float32; eight clips of 10 s are 3 MB, twice while joined.
    assert [len(clip) for clip in clips] == [32_000] * 8
    assert peak < 8e6
