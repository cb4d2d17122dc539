"""GStreamer behind the ``FrameReader`` seam: the same frames as PyAV, give or take the colour conversion."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from intertitle.calibration.render import random_scene, write_clip
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.media import open_media

INDICES = [0, 3, 17, 17, 40]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a clip.mp4"
    write_clip(random_scene(3), path)
    return path


@pytest.fixture
def gstreamer(monkeypatch):
    monkeypatch.setenv("INTERTITLE_VIDEO_DECODER", "gstreamer")


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed")
def test_the_same_frames(clip, monkeypatch):
    with open_media(clip) as media:
        want = media.read_frames(INDICES)
    monkeypatch.setenv("INTERTITLE_VIDEO_DECODER", "gstreamer")
    with open_media(clip) as media:
        assert (media.width, media.height) == (want.shape[2], want.shape[1])
        got = media.read_frames(INDICES)
        assert media.notes == []
    difference = np.abs(got.astype(int) - want)
    assert difference.mean() < 3
    # Frames differ from each other by more than the two conversions do.
    assert np.abs(want[0].astype(int) - want[3]).mean() > 2 * difference.mean()


def fake_launch(folder: Path, monkeypatch, script: str) -> None:
    (folder / "gst-launch-1.0").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "gst-launch-1.0").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("script", ["exit 1", "head -c 1000 /dev/zero", "head -c 100000000 /dev/zero | head -c 300000"])
def test_what_gstreamer_does_not_give_comes_from_pyav(script, clip, tmp_path, monkeypatch):
    with open_media(clip) as media:
        want = media.read_frames(INDICES)
    monkeypatch.setenv("INTERTITLE_VIDEO_DECODER", "gstreamer")
    fake_launch(tmp_path, monkeypatch, script)
    with open_media(clip) as media:
        got = media.read_frames(INDICES)
        assert any("PyAV the others" in note for note in media.notes)
    assert np.array_equal(got[-1], want[-1])


def test_a_name_is_no_part_of_the_pipeline(clip, tmp_path, monkeypatch):
    folder = tmp_path / 'payload" ! filesink location='
    folder.mkdir()
    odd = folder / 'a\n" \\ clip.mp4'
    odd.write_bytes(clip.read_bytes())
    monkeypatch.setenv("INTERTITLE_VIDEO_DECODER", "gstreamer")
    fake_launch(
        tmp_path,
        monkeypatch,
        f'printf "%s\\n" "$@" > "{tmp_path}/arguments"; cmp - "{clip}" && touch "{tmp_path}/same"',
    )
    with open_media(odd) as media:
        media.read_frames(INDICES)
    assert "payload" not in (tmp_path / "arguments").read_text()
    assert (tmp_path / "arguments").read_text().startswith("-q\nfdsrc\nfd=0\n!\ndecodebin\n")
    # What the pipeline reads is the file.
    assert (tmp_path / "same").exists()


def test_without_gstreamer(clip, tmp_path, monkeypatch, gstreamer):
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_media(clip) as media, pytest.raises(MediaError, match=r"gst-launch-1\.0 is not installed"):
        media.read_frames([0])


def test_an_unknown_decoder(clip, monkeypatch):
    monkeypatch.setenv("INTERTITLE_VIDEO_DECODER", "nvdec")
    with pytest.raises(OptionError, match="INTERTITLE_VIDEO_DECODER is 'nvdec'; it can be pyav or gstreamer"):
        open_media(clip)
