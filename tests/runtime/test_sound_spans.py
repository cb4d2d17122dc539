"""A part of a sound is the slice of the whole, to the sample, whatever was not decoded for it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intertitle.errors import MediaError
from intertitle.runtime.media import open_media, sound
from intertitle.runtime.media.sound_index import PROBED, SoundIndex, SoundPacket

SECONDS = 12

#: Name, codec, options, and how far decoding from the middle may be off: Opus converges to the same samples, AC-3 puts
#: another noise where it has no bits. (So does AAC unless the encoder does without.) A slip by one sample shows as 0.1.
FORMATS = {
    "wav": ("sound.wav", "pcm_s16le", {}, 0),
    "float wav": ("sound.wav", "pcm_f32le", {}, 0),
    "flac": ("sound.flac", "flac", {}, 0),
    "mp3": ("sound.mp3", "libmp3lame", {}, 0),
    "m4a": ("sound.m4a", "aac", {"aac_pns": "0"}, 0),
    "aac in mkv": ("sound.mkv", "aac", {"aac_pns": "0"}, 0),
    "aac in ts": ("sound.ts", "aac", {"aac_pns": "0"}, 0),
    "ac3": ("sound.ac3", "ac3", {}, 0.09),
    "vorbis": ("sound.ogg", "vorbis", {"strict": "-2"}, 0),
    "vorbis in mkv": ("sound.mkv", "vorbis", {"strict": "-2"}, 0),
    "opus": ("sound.ogg", "libopus", {}, 1e-3),
    "opus in webm": ("sound.webm", "libopus", {}, 1e-3),
}


def encode(folder: Path, kind: str) -> Path:
    """Chirps and noise in stereo, at 44.1 kHz or what Opus takes."""
    name, codec, options, _ = FORMATS[kind]
    rate = 48_000 if codec == "libopus" else 44_100
    path = folder / name
    time = np.arange(rate * SECONDS) / rate
    left = 0.4 * np.sin(2 * np.pi * (200 * time + 150 * time**2)) * (0.3 + 0.7 * (time % 1.0))
    samples = np.stack([left, 0.5 * left[::-1]]) + np.random.default_rng(0).normal(0, 0.02, (2, len(left)))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="stereo", options=options)
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray, np.ndarray]]:
    """Path, whole sound as stored and whole sound at 16 kHz, made once."""
    made: dict[str, tuple[Path, np.ndarray, np.ndarray]] = {}

    def make(kind: str) -> tuple[Path, np.ndarray, np.ndarray]:
        if kind not in made:
            path = encode(tmp_path_factory.mktemp("sounds"), kind)
            with open_media(path) as media:
                made[kind] = path, media.read_audio().samples, media.read_audio(16_000).samples
        return made[kind]

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_a_span_is_the_slice(kind: str, sounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stored, heard = sounds(kind)
    off = FORMATS[kind][3]
    decoded = []
    genuine = sound.frames_of
    monkeypatch.setattr(sound, "frames_of", lambda packet: (frames := genuine(packet), decoded.append(len(frames)))[0])
    with open_media(path) as media:
        rate = media.read_audio(seconds=0.1).sample_rate
        for start in (0.0, 0.01, 1.0, 3.3, 7.123456, 10.0):
            decoded.clear()
            part = media.read_audio(16_000, 1.5, start).samples
            wanted = heard[round(start * 16_000) :][:24_000]
            np.testing.assert_allclose(part, wanted, atol=off, rtol=0)
            assert len(part) == 24_000
            if start == 10.0:
                # Of 12 s, about 1.5 s and the run-in; so a small part of the packets.
                whole = sum(1 for _ in av.open(str(path)).demux(audio=0))
                assert sum(decoded) < whole / 2
            part = media.read_audio(None, 0.7, start).samples
            wanted = stored[:, round(start * rate) :][:, : round(0.7 * rate)]
            np.testing.assert_allclose(part, wanted, atol=off, rtol=0)
        # The rest of the sound, when no length is given.
        np.testing.assert_allclose(media.read_audio(16_000, start=9.0).samples, heard[144_000:], atol=off, rtol=0)
        assert media.notes == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 11.9), st.floats(0.001, 5), st.sampled_from([None, 8_000, 16_000, 22_050, 48_000]))
def test_any_span_at_any_rate(sounds: Any, start: float, seconds: float, rate: int | None) -> None:
    path, _, _ = sounds("m4a")
    with open_media(path) as media:
        whole = np.atleast_2d(media.read_audio(rate).samples)
        hertz = rate or 44_100
        part = np.atleast_2d(media.read_audio(rate, seconds, start).samples)
        first = round(start * hertz)
        np.testing.assert_array_equal(part, whole[:, first : first + max(round(seconds * hertz), 1)])


def test_where_a_seek_lands_wrong_the_packets_are_read_through(sounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, heard = sounds("m4a")
    monkeypatch.setattr(SoundIndex, "find", lambda *_: None)
    with open_media(path) as media:
        np.testing.assert_array_equal(media.read_audio(16_000, 1.0, 6.0).samples, heard[96_000:112_000])


def test_after_the_end(sounds: Any) -> None:
    path, _, _ = sounds("flac")
    with open_media(path) as media, pytest.raises(MediaError, match=r"sound ends before 12\.5 s"):
        media.read_audio(16_000, 1.0, 12.5)


@pytest.mark.parametrize("fault", ["no durations", "a gap in the durations", "few packets"])
def test_what_cannot_be_counted_is_decoded_from_the_start(fault: str) -> None:
    packets = [SoundPacket(n * 100, n * 23, 23) for n in range(100)]
    assert SoundIndex(packets, [0] + [1024] * 7, Fraction(44_100, 1000)).starts[99] == 98 * 1024
    if fault == "no durations":
        packets[50] = SoundPacket(5000, 1150, None)
    elif fault == "a gap in the durations":
        packets[50] = SoundPacket(5000, 1150, 46)
    else:
        packets = packets[:PROBED]
    assert SoundIndex(packets, [0] + [1024] * 7, Fraction(44_100, 1000)).starts == []
