"""The recipe from end to end at a size that learns nothing: stages, resume, and the checkpoint that comes out."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from intertitle.align import train as module
from intertitle.align.policy import Policy
from intertitle.align.recipe import RECIPES
from intertitle.align.train import Run, cosine, epochs, read_log
from intertitle.errors import OptionError

SMOKE = RECIPES["smoke"]


def silent(stage, done, total):
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "work"
    Run(SMOKE, folder, silent, workers=1)()
    return folder


def test_every_stage_ran_and_left_its_log(work):
    for stage, steps in (("vision", 6), ("audio", 6), ("captions", 12)):
        assert read_log(work, stage)[-1]["step"] == steps


def test_what_was_trained_is_what_was_saved(work):
    start, trained = Policy.open(work / "start"), Policy.open(work / "supervised")
    before, after = start.state_dict(), trained.state_dict()
    for part in (*(f"stages.{name}" for name in start.stages), "decoder", "embedding"):
        names = [name for name in before if name.startswith(f"{part}.")]
        assert any(not torch.equal(before[name], after[name]) for name in names), part
    saved = torch.load(work / "captions.pt", weights_only=True)["modules"]
    weight = saved["decoder.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(trained.decoder.layers[0].mlp.up_proj.weight, weight.bfloat16().float())
    towers = torch.load(work / "vision.pt", weights_only=True)["modules"]
    torch.testing.assert_close(
        trained.stages["vision"].embeddings.patch_embedding.weight,
        towers["tower.embeddings.patch_embedding.weight"].bfloat16().float(),
    )


def test_features_are_the_towers_own(work):
    policy = Policy.open(work / "supervised").eval()
    run = Run(SMOKE, work, silent, workers=1)
    clips = run._clips("validation", SMOKE.validation)
    features = run.features(policy, clips)
    with torch.no_grad():
        seen = policy.stages["vision"](module.pixels(clips.frames[3], policy.config))
    # The saved tower is rounded to bfloat16, the features to float16.
    np.testing.assert_allclose(features.vision[3].astype(np.float32), seen.numpy(), rtol=0.05, atol=0.05)


def test_a_stopped_stage_goes_on_where_it_was(work, tmp_path, monkeypatch):
    """Interrupted in the captions: the towers' stages are not run again, and the steps add up."""
    monkeypatch.setattr(module, "_SAVE_EVERY", 4)
    folder = tmp_path / "work"

    def stop(stage, done, total):
        if stage == "train captions" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(SMOKE, folder, stop, workers=1)()
    vision = (folder / "vision.pt").stat().st_mtime_ns
    seen = []
    Run(SMOKE, folder, lambda stage, done, total: seen.append((stage, done)), workers=1)()
    assert (folder / "vision.pt").stat().st_mtime_ns == vision
    assert [done for stage, done in seen if stage == "train captions"] == list(range(5, 13))
    assert not [stage for stage, _ in seen if stage in ("train vision", "train audio", "render train")]
    assert [line["step"] for line in read_log(folder, "captions")] == [4, 8, 12]


def test_a_folder_of_another_recipe_is_refused(work):
    with pytest.raises(OptionError, match="another recipe"):
        Run(replace(SMOKE, seed=1), work, silent)()


def test_epochs_visit_every_row_once_and_can_be_entered_anywhere():
    walk = epochs(10, 3, seed=5)
    batches = [next(walk) for _ in range(6)]
    for epoch in (batches[:3], batches[3:]):
        rows = np.concatenate(epoch)
        assert len(set(rows.tolist())) == 9
    later = epochs(10, 3, seed=5, skip=4)
    np.testing.assert_array_equal(next(later), batches[4])


def test_the_rate_rises_and_falls():
    rates = [cosine(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[5] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)


def test_recipes_are_what_they_say():
    json.dumps({name: repr(recipe) for name, recipe in RECIPES.items()})
    for recipe in RECIPES.values():
        assert recipe.size.audio.num_tokens == 92
        assert recipe.clips % recipe.caption_batch == 0
