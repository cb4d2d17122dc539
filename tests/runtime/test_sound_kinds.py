"""Sound with any number of channels, without a rate, or of another kind midway."""

from __future__ import annotations

import struct
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from intertitle.errors import MediaError
from intertitle.runtime.media import open_media

RATE = 16_000


def levels(channels: int, count: int) -> np.ndarray:
    """int16 ``[channels, count]``: noise that differs from channel to channel."""
    return np.random.default_rng(channels).integers(-8000, 8000, (channels, count)).astype(np.int16)


def pcm(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """A WAV file that says how many channels it has, and not which."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
    return path


def encode(path: Path, codec: str, layout: str, samples: np.ndarray, rate: int = RATE) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        if codec == "wavpack":  # else of 8 bits
            stream.codec_context.format = "s16p"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T).reshape(1, -1), "s16", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    wave_of_440 = 8000 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    return np.tile(wave_of_440.astype(np.int16), (channels, 1))


def loudness(samples: np.ndarray, hertz: float, rate: int) -> float:
    """The amplitude of a tone, as a Fourier sum."""
    turn = np.exp(-2j * np.pi * hertz * np.arange(len(samples)) / rate)
    return 2 * abs((samples * turn).mean())


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "6.1", "7.1"])
def test_every_channel_of_flac_is_read(layout: str, tmp_path: Path) -> None:
    # FLAC decodes to a plane for each channel.
    channels = av.AudioLayout(layout).nb_channels
    samples = levels(channels, 6 * RATE)
    with open_media(encode(tmp_path / "sound.flac", "flac", layout, samples)) as media:
        np.testing.assert_array_equal(media.read_audio().samples * 32768, samples)
        part = media.read_audio(seconds=0.5, start=4.0)
        np.testing.assert_array_equal(part.samples * 32768, samples[:, 4 * RATE :][:, : RATE // 2])
        whole = media.read_audio(RATE).samples
        np.testing.assert_array_equal(media.read_audio(RATE, 0.5, 4.0).samples, whole[4 * RATE :][: RATE // 2])
        # Mixed down, every channel is heard: the mean of independent noise is quieter than one of them.
        assert whole.std() < 1.01 * samples.std() / 32768
        assert media.notes == []


@pytest.mark.parametrize("layout", ["7.1", "7.1.4"])
def test_eight_and_more_channels_are_mixed_as_ffmpeg_does(layout: str, tmp_path: Path) -> None:
    channels = av.AudioLayout(layout).nb_channels
    samples = levels(channels, 2 * RATE)
    path = encode(tmp_path / "sound.wv", "wavpack", layout, samples)
    with open_media(path) as media:
        np.testing.assert_array_equal(media.read_audio().samples * 32768, samples)
        heard = media.read_audio(RATE).samples
    # FFmpeg's own graph of filters, on packed samples.
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="s16", layout=layout, time_base=Fraction(1, RATE))
    mix = graph.add("aformat", "sample_fmts=s16:channel_layouts=mono:sample_rates=16000")
    sink = graph.add("abuffersink")
    source.link_to(mix)
    mix.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T).reshape(1, -1), "s16", layout)
    frame.sample_rate, frame.pts = RATE, 0
    graph.push(frame)
    np.testing.assert_allclose(heard * 32768, graph.pull().to_ndarray()[0], atol=1)


@pytest.mark.parametrize("channels", [8, 9, 24, 64])
def test_channels_without_a_layout_are_read_as_stored(channels: int, tmp_path: Path) -> None:
    samples = levels(channels, 5 * RATE)
    with open_media(pcm(tmp_path / "sound.wav", samples)) as media:
        np.testing.assert_array_equal(media.read_audio().samples * 32768, samples)
        part = media.read_audio(seconds=0.5, start=3.0).samples
        np.testing.assert_array_equal(part * 32768, samples[:, 3 * RATE :][:, : RATE // 2])


def test_channels_that_cannot_be_mixed(tmp_path: Path) -> None:
    # ffmpeg -ac 1 refuses it too: it does not know what 9 channels are.
    path = pcm(tmp_path / "sound.wav", levels(9, RATE))
    with open_media(path) as media, pytest.raises(MediaError, match=r"9 channels .*cannot be mixed"):
        media.read_audio(RATE)


@pytest.mark.parametrize("channels", [65, 104, 255])
def test_absurdly_many_channels(channels: int, tmp_path: Path) -> None:
    path = tmp_path / "sound.au"
    samples = levels(channels, 1000)
    head = struct.pack(">4s5I", b".snd", 24, samples.nbytes, 3, RATE, channels)
    path.write_bytes(head + samples.T.astype(">i2").tobytes())
    for rate in (None, RATE):
        with pytest.raises(MediaError, match=f"{channels} channels; up to 64"), open_media(path) as media:
            media.read_audio(rate)


def test_a_rate_that_cannot_be(tmp_path: Path) -> None:
    path = encode(tmp_path / "sound.aac", "aac", "mono", tone(1, 16_000))
    content = bytearray(path.read_bytes())
    place = 0
    while place < len(content):
        # ADTS (ISO 14496-3, 1.A.2.2): 12 bits of sync, then id, layer, protection, profile, and 4 bits for the rate.
        content[place + 2] = content[place + 2] & 0b11000011 | 15 << 2
        place += (content[place + 3] & 3) << 11 | content[place + 4] << 3 | content[place + 5] >> 5
    path.write_bytes(content)
    with pytest.raises(MediaError, match="sound"), open_media(path) as media:
        media.read_audio(RATE)


def test_sound_that_changes_its_kind_midway(tmp_path: Path) -> None:
    one = encode(tmp_path / "one.aac", "aac", "mono", tone(2, 22_050), 22_050)
    two = encode(tmp_path / "two.aac", "aac", "stereo", tone(2, 44_100, 2), 44_100)
    joined = tmp_path / "joined.aac"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    with open_media(joined) as media:
        heard = media.read_audio(RATE).samples
        stored = media.read_audio()
        late = media.read_audio(RATE, 0.5, 3.0).samples
    # Encoders add a packet or two of 1024 samples.
    assert 4 * RATE <= len(heard) < 4.3 * RATE
    for samples in (heard[RATE : 2 * RATE], heard[3 * RATE : 4 * RATE], late):
        assert loudness(samples, 440, RATE) == pytest.approx(8000 / 32768, rel=0.02)
    assert stored.samples.shape[0] == 1
    assert stored.samples.shape[1] / stored.sample_rate == pytest.approx(len(heard) / RATE, abs=0.01)
    np.testing.assert_array_equal(late, heard[3 * RATE :][: len(late)])


def test_sound_that_begins_in_a_joined_part(clips: Any) -> None:
    silent, heard = clips.encode("silent.ts", 30), clips.encode("heard.ts", 30, tone=1.2)
    joined = clips.folder / "joined.ts"
    joined.write_bytes(silent.read_bytes() + heard.read_bytes())
    with open_media(joined) as media:
        assert media.num_frames == 60
        assert media.has_audio
        samples = media.read_audio(RATE).samples
    assert loudness(samples[4000:12_000], 440, RATE) > 0.2
