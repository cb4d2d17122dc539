"""Real files from the wild through every fixture captioner that can take them.

The clips are third-party and not part of the project: they lie beside a developer's checkout, and elsewhere these tests
are skipped.
"""

from __future__ import annotations

from pathlib import Path

import intertitle
import pytest
from intertitle.errors import MediaError

CLIPS = Path(__file__).parents[3] / "shared" / "media"
WITH_SOUND, SILENT, SOUND = "sample_demo_3.mp4", "output_v_3V9tzjyr51I.mp4", "bird-twitter-car.wav"
VARIANTS = ["av-qwen2", "clip-mistral", "clip-mistral-lora", "auroracap", "auroracap-keep"]

pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_real_clips(variant, weights, compiled):
    captioner = intertitle.Captioner.load(compiled(variant, weights))
    short = intertitle.Decoding(max_new_tokens=8)
    listens = variant == "av-qwen2"

    with_sound = captioner.caption(CLIPS / WITH_SOUND, decoding=short)
    assert with_sound.mode == ("audiovideo" if listens else "video")
    assert with_sound.seconds == pytest.approx(6.09, abs=0.02)
    assert with_sound.notes == []

    silent = captioner.caption(CLIPS / SILENT, decoding=short)
    assert silent.mode == "video"
    assert [("no audio track" in note) for note in silent.notes] == ([True] if listens else [])
    # A tiny random decoder may say the same of two clips, but not with the same likelihoods.
    assert silent.token_logprobs != with_sound.token_logprobs

    if listens:
        sound = captioner.caption(CLIPS / SOUND, decoding=short)
        assert sound.mode == "audio"
        assert sound.seconds == pytest.approx(27.35, abs=0.01)
    else:
        with pytest.raises(MediaError, match="holds only sound"):
            captioner.caption(CLIPS / SOUND, decoding=short)
