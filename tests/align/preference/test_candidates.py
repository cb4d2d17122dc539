"""What is proposed of a clip over fixture bundles: one prefill, origins, segments, scenes as they would be filmed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import intertitle
import numpy as np
import pytest
from intertitle.align.preference import CAUTIOUS, Proposer, Recipe, file_item, scene_items
from intertitle.align.preference.items import equal_spans, scene_media
from intertitle.align.scenes import draw_scene, write_clip
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.batch import Entry
from intertitle.runtime.ort import OrtDecoder
from intertitle.runtime.viewing import Viewing

DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"
SHORT = {"max_new_tokens": 6, "candidates": 4}


@pytest.fixture(scope="module")
def captioner(compiled: Callable[[str], Path]) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("av-qwen2"))


class Counting:
    """An inference that counts the tokens that are prefilled."""

    def __init__(self, inner, tokens: list[int]) -> None:
        self._inner, self._tokens = inner, tokens

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def prefill(self, row, embeds, *more, **options):
        self._tokens.append(len(embeds))
        return self._inner.prefill(row, embeds, *more, **options)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tokens: list[int] = []
    opened = OrtDecoder.open
    monkeypatch.setattr(OrtDecoder, "open", lambda self, **size: Counting(opened(self, **size), tokens))
    return tokens


def test_all_candidates_come_from_one_prefill(compiled, prefilled: list[int]):
    captioner = intertitle.Captioner.load(compiled("clip-mistral"))
    (item,) = scene_items("train:3:4")
    media = scene_media(item.scene, captioner.manifest.pipeline)
    alone = intertitle.Captioner.load(compiled("clip-mistral")).caption(
        **media, decoding=intertitle.Decoding(max_new_tokens=6)
    )
    clip = alone.prompt_tokens
    assert sum(prefilled) == clip
    prefilled.clear()
    found = Proposer(captioner, Recipe(contrast_alpha=(), retrospective=False, **SHORT)).candidates(item)
    # The prompt in its three segments, once, for four sampled captions and the greedy one.
    assert sum(prefilled) < 1.1 * clip
    assert alone.text.strip() in [one.text for one in found if "greedy" in one.origins]
    prefilled.clear()
    both = Recipe(contrast_alpha=(0.5, 1.0), retrospective=False, **SHORT)
    Proposer(captioner, both).candidates(scene_items("train:4:5")[0])
    # And the sparse view of the clip, with fewer frames, for both contrasts.
    assert sum(prefilled) < 3.1 * clip


def test_origins_say_what_came_from_what(captioner: intertitle.Captioner):
    (item,) = scene_items("train:0:1")
    found = Proposer(captioner, Recipe(retrospective=False, **SHORT)).candidates(item)
    origins = [origin for one in found for origin in one.origins]
    assert sorted(origins) == ["contrast 0.5", "greedy", "sample 0", "sample 1", "sample 2", "sample 3"]
    assert len({one.text for one in found}) == len(found)
    assert all(one.draft is None and one.mean_logprob is not None for one in found)
    media = scene_media(item.scene, captioner.manifest.pipeline)
    contrast = captioner.caption(**media, decoding=intertitle.Decoding(max_new_tokens=6, contrast="temporal"))
    assert contrast.text.strip() in [one.text for one in found if "contrast 0.5" in one.origins]


def test_refined_ones_keep_their_draft_and_get_a_likelihood_of_their_own(captioner: intertitle.Captioner):
    (item,) = scene_items("train:0:1")
    recipe = Recipe(contrast_alpha=(), **SHORT)
    drafts = Proposer(captioner, Recipe(contrast_alpha=(), retrospective=False, **SHORT)).candidates(item)
    for likelihoods in (False, True):
        found = Proposer(captioner, recipe, likelihoods=likelihoods).candidates(item)
        assert {one.draft.strip() for one in found if one.draft} <= {one.text for one in drafts}
        assert all(origin.endswith(", refined") for one in found for origin in one.origins)
        assert all((one.mean_logprob is not None) == likelihoods for one in found)
    media = scene_media(item.scene, captioner.manifest.pipeline)
    greedy = captioner.caption(**media, decoding=intertitle.Decoding(max_new_tokens=6, retrospective=True))
    (one,) = [one for one in found if "greedy, refined" in one.origins]
    assert one.text == greedy.text.strip()
    assert one.mean_logprob == pytest.approx(captioner.score(text=greedy.text, **media), abs=1e-4)


def test_the_same_whatever_comes_before(captioner: intertitle.Captioner):
    recipe = Recipe(max_new_tokens=4, candidates=2, viewing=Viewing(audio=False))
    items = scene_items("train:0:3")
    forward = {one.item.key: one.material for one in Proposer(captioner, recipe).propose(items)}
    backward = {one.item.key: one.material for one in Proposer(captioner, recipe).propose(items[::-1])}
    for key, material in forward.items():
        other = backward[key]
        assert material.segments == other.segments
        assert [(one.text, one.origins) for one in material.candidates] == [
            (one.text, one.origins) for one in other.candidates
        ]
    # Each item has a seed of its own.
    assert Recipe().decodings("a")["sample"].seed != Recipe().decodings("b")["sample"].seed
    assert Recipe(seed=1).decodings("a")["sample"].seed != Recipe().decodings("a")["sample"].seed


def test_segments_of_files(captioner: intertitle.Captioner, tmp_path: Path):
    junk = tmp_path / "junk.mp4"
    junk.write_text("no video")
    items = [file_item(Entry(str(DEMO))), file_item(Entry(str(junk))), file_item(Entry(str(DEMO), start=1, end=3))]
    recipe = Recipe(max_new_tokens=6, candidates=1, contrast_alpha=(), viewing=Viewing(audio=False))
    proposals = list(Proposer(captioner, recipe).propose(items))
    assert [one.error is None for one in proposals] == [True, False, True]
    assert isinstance(proposals[1].error, MediaError)
    decoding = intertitle.Decoding(max_new_tokens=6, retrospective=True)
    spans = [(1.0, 2.0), (2.0, 3.0)]
    assert proposals[2].material.segments == [
        captioner.caption(DEMO, prompt=CAUTIOUS, start=start, end=end, audio=False, decoding=decoding).text.strip()
        for start, end in spans
    ]
    assert len(proposals[0].material.segments) == 2
    without = Proposer(captioner, recipe, segments=False).propose(items[:1])
    assert next(without).material.segments == []


@pytest.mark.parametrize(
    ("duration", "count"), [(4, 2), (9.9, 2), (19.99, 2), (20, 3), (95, 10), (150, 16), (3600, 16), (0.15, 1)]
)
def test_the_number_of_segments(duration: float, count: int):
    spans = equal_spans(5.0, 5.0 + duration, 0.1)
    assert len(spans) == count
    assert (spans[0][0], spans[-1][1]) == (5.0, 5.0 + duration)
    assert all(end - start == pytest.approx(duration / count) for start, end in spans)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


def test_scenes_in_memory_are_what_the_file_shows(captioner: intertitle.Captioner, tmp_path: Path):
    scene = draw_scene("train", 5)
    pipeline = captioner.manifest.pipeline
    count, size = pipeline.sampling.count, pipeline.image.size
    write_clip(scene, tmp_path / "clip.mp4", size=size * 2, rate=16000)
    filmed, drawn = captioner.read(tmp_path / "clip.mp4"), captioner.read(**scene_media(scene, pipeline))
    assert filmed.timing is not None
    assert drawn.timing is not None
    assert drawn.timing.seconds == pytest.approx(filmed.timing.seconds)
    np.testing.assert_allclose(drawn.timing.times, filmed.timing.times)
    small = filmed.frames[filmed.order].reshape(count, size, 2, size, 2, 3).mean((2, 4))
    assert np.abs(small - drawn.frames[drawn.order]).mean() < 6
    assert drawn.sound.shape == filmed.sound.shape
    # The first of the eight clips that a video's sound is heard in; AAC's last packet moves the others a little.
    assert np.corrcoef(drawn.sound[:32_000], filmed.sound[:32_000])[0, 1] > 0.999
    second = captioner.read(**scene_media(scene, pipeline, span=(2.0, 4.0)))
    # The last of the eight begins 1.75 s into the clip.
    assert np.array_equal(second.sound[:28_000], drawn.sound[7 * 32_000 + 4_000 : 8 * 32_000])
    assert "waveform" not in scene_media(scene, pipeline, audio=False)


@pytest.mark.parametrize("span", ["", "train", "train:0", "train:5:5", "train:-1:5", "moon:0:5", "train:0:5:1"])
def test_what_names_no_scenes(span: str):
    with pytest.raises(OptionError, match=r"^scenes "):
        scene_items(span)


def test_what_is_no_recipe():
    for wrong in ({"candidates": 0}, {"temperature": 0}, {"top_p": 2}, {"contrast_alpha": (-1.0,)}):
        with pytest.raises(OptionError):
            Recipe(**wrong)
