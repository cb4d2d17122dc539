"""Rendered clips on disk: what the runtime itself would see and hear of the same scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from intertitle.align.data import FBANK_FRAMES, render_clips, states, whole_fbank
from intertitle.align.scenes import draw_scene
from intertitle.align.scenes.scene import COLORS
from intertitle.align.towers import SOUNDS, background_target, patch_targets, sound_target
from intertitle.errors import OptionError
from intertitle.runtime.preprocess.audio import video_policy
from intertitle.runtime.preprocess.fbank import kaldi_fbank


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return render_clips(tmp_path_factory.mktemp("clips"), "validation", 6, workers=1)


def test_sound_is_what_the_runtime_hears(clips):
    from intertitle.align.scenes import render_sound

    for row in range(len(clips)):
        sound = render_sound(draw_scene("validation", row), 16000)
        pcm = (np.rint(sound * 32768) / 32768).astype(np.float32)
        whole = kaldi_fbank(video_policy(pcm))
        mine = whole_fbank(torch.from_numpy(clips.fbank[row : row + 1]).float(), len(whole))[0].numpy()
        np.testing.assert_array_equal(mine[:FBANK_FRAMES], whole[:FBANK_FRAMES])
        # The frame that straddles the end of the sound is the only one that could differ.
        np.testing.assert_allclose(mine[FBANK_FRAMES + 2 :], whole[FBANK_FRAMES + 2 :], atol=0.07)


def test_a_second_run_renders_nothing(clips, tmp_path, monkeypatch):
    first = render_clips(tmp_path, "validation", 6, workers=1)
    monkeypatch.setattr("intertitle.align.data._render_chunk", None)
    again = render_clips(tmp_path, "validation", 6, workers=1)
    for name in ("frames", "fbank", "states"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        np.testing.assert_array_equal(getattr(clips, name), getattr(first, name))
    with pytest.raises(OptionError, match="other clips"):
        render_clips(tmp_path, "validation", 7, workers=1)


def test_states_are_where_the_colours_are(clips):
    """The thing's colour is found within its radius of where the state says its middle is."""
    from intertitle.calibration.render import COLORS as RGB

    checked = 0
    for row in range(len(clips)):
        for frame in range(8):
            for x, y, radius, color, *_ in clips.states[row, frame]:
                if radius < 0.05:
                    continue
                at = clips.frames[row, frame, int(y * 96), int(x * 96)].astype(int)
                checked += np.abs(at - np.array(RGB[COLORS[int(color)]])).max() <= 8
    shown = int((clips.states[..., 2] >= 0.05).sum())
    # A thing may be covered by another, or be in the middle of turning.
    assert checked >= 0.95 * shown > 40


def test_patch_targets_by_hand():
    state = torch.zeros(3, 6)
    state[0] = torch.tensor([0.5, 0.5, 0.2, 2, 1, 0])
    state[1] = torch.tensor([0.06, 0.94, 0.01, 6, 3, 1])
    classes, offsets = patch_targets(state, 8)
    grid = classes.view(8, 8, 3)
    # A radius of 0.2 (less a tenth) around the middle of 8 x 8: the four inner patches, and those whose middles lie
    # 3/16 off one axis and 1/16 off the other are out by a hair (0.198 > 0.18).
    assert [tuple(at) for at in (grid[..., 0] == 3).nonzero().tolist()] == [(3, 3), (3, 4), (4, 3), (4, 4)]
    # The small one covers no middle, but lies in the patch at the bottom left.
    assert grid[7, 0].tolist() == [7, 4, 2]
    assert int((grid[..., 0] > 0).sum()) == 5
    assert offsets.view(8, 8, 3)[3, 3].tolist() == pytest.approx([0.5, 0.5, 1.6])


def test_targets_name_what_is_there():
    scene = draw_scene("train", 3)
    first, second = sound_target(scene)
    assert (SOUNDS[first], SOUNDS[second]) == tuple(sound.name for sound in scene.sounds)
    kind, pair = background_target(scene)
    assert kind in range(3)
    assert pair in range(6)


def test_states_end_where_things_disappear():
    scene = next(
        scene
        for scene in (draw_scene("train", index) for index in range(200))
        if any(thing.action == "disappears" and thing.when == "first" for thing in scene.things)
    )
    at = next(i for i, thing in enumerate(scene.things) if thing.action == "disappears")
    radii = states(scene, 8)[:, at, 2]
    assert radii[0] > 0
    assert radii[-1] == 0
