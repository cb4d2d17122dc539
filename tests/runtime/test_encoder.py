"""The encoder on compiled fixtures: what is computed once, settings of visual tokens, contrasted views."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from intertitle.contract.pipeline import EachOf, PromptLayout, Tokens, Window
from intertitle.errors import OptionError
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.clip import Clip, array_clip
from intertitle.runtime.compression import merge_tokens
from intertitle.runtime.contrast import Contrast
from intertitle.runtime.encoder import Encoder, time_windows
from intertitle.runtime.ort import OrtDecoder
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Count, Share, TokenBudget, parse_budget
from msgspec.structs import replace
from tokenizers import Tokenizer

TEMPORAL, NOISE = Contrast("temporal"), Contrast("noise")


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def encoders(compiled) -> dict[str, Encoder]:
    """Encoders by variant, opened at first use."""

    class Opened(dict[str, Encoder]):
        def __missing__(self, variant: str) -> Encoder:
            bundle = Bundle.open(compiled(variant))
            self[variant] = Encoder(bundle, Tokenizer.from_file(str(bundle.file("tokenizer.json"))))
            return self[variant]

    return Opened()


@pytest.fixture
def clip_of(expected, compiled):
    """``clip_of(variant, frames, sound)``: the fixture's clip; ``frames`` picks others of its frames."""

    def make(variant: str, frames: list[int] | None = None, sound: bool = False) -> Clip:
        numbers = expected(variant)
        manifest = Bundle.open(compiled(variant)).manifest
        pictures = numbers["frames_uint8"] if frames is None else numbers["frames_uint8"][frames]
        waveform, rate = (numbers["audio_int16"], 16000) if sound else (None, None)
        return array_clip(pictures, waveform, rate, manifest.pipeline)

    return make


@pytest.fixture
def counted(encoders, monkeypatch):
    """``counted(variant)``: an encoder, and how many items (frames, windows) each component has been given."""

    def wrap(variant: str) -> tuple[Encoder, Counter[str]]:
        encoder, items = encoders[variant], Counter()
        original = encoder._component

        def component(name: str, stages: Stages, graph: str | None = None) -> Any:
            run = original(name, stages, graph)

            def count(value: np.ndarray) -> np.ndarray:
                items[name] += len(value)
                return run(value)

            return count

        monkeypatch.setattr(encoder, "_component", component)
        return encoder, items

    return wrap


def test_windows_of_time():
    order = np.array([5, 6, 7])
    assert time_windows(order, Window(2, 2)).tolist() == [[5, 6]]
    assert time_windows(order, Window(2, 2, 1)).tolist() == [[-1, 5], [6, 7]]
    assert time_windows(order[:2], Window(2, 2, 1)).tolist() == [[-1, 5], [6, -1]]
    assert time_windows(order, Window(1, 1, 1)).tolist() == [[-1], [5], [6], [7], [-1]]
    assert time_windows(order, Window(2, 1)).tolist() == [[5, 6], [6, 7]]
    assert time_windows(order[:1], Window(2, 2)).tolist() == []


@pytest.mark.parametrize(("variant", "windows"), [("av-qwen2", 1), ("clip-mistral", 3)])
def test_an_image_goes_through_everything_once(variant, windows, counted, clip_of):
    """v35 sees one pair; v1 also one with nothing before and one with nothing behind (docs/facts.md 1.3)."""
    encoder, items = counted(variant)
    image = encoder.encode(clip_of(variant, [2]), Stages())
    assert items == {"vision": 1, "frame_connector": 1, "connector": windows}
    video = encoder.encode(clip_of(variant, [2] * 8), Stages())
    assert relative_error(image.blocks[0], video.blocks[0]) < 1e-5


def test_each_window_once(counted, clip_of):
    encoder, items = counted("av-qwen2")
    clip = clip_of("av-qwen2")
    clip.order = np.array([0, 1, 2, 3, 0, 1, 4, 4])
    tokens = encoder.encode(clip, Stages()).blocks[0].reshape(4, 4, -1)
    assert (items["vision"], items["frame_connector"], items["connector"]) == (8, 8, 3)
    assert np.array_equal(tokens[0], tokens[2])
    assert not np.allclose(tokens[0], tokens[1])


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap-keep"])
def test_blocks_and_prompt_are_those_of_the_fixture(variant, encoders, clip_of, expected):
    numbers, encoder = expected(variant), encoders[variant]
    encoded = encoder.encode(clip_of(variant), Stages())
    embeds = encoder.prompt_embeds(encoded, "Describe the video in detail.")
    prompt = "inputs_embeds" if variant == "auroracap-keep" else "video.inputs_embeds"
    assert relative_error(embeds, numbers[prompt]) < 1e-4
    pieces = encoder.prompt_pieces(encoded, "Describe the video in detail.")
    assert [piece is block for piece, block in zip(pieces[-2::-2], encoded.blocks[::-1], strict=False)]
    ids = [token for piece in pieces for token in (piece if isinstance(piece, list) else [None])]
    assert [token for token in ids if token is not None] == [i for i in numbers["prompt_ids"].tolist() if i >= 0]
    assert (encoded.notes, encoded.visual_tokens, encoded.kept) == ([], None, {})


# --- contrast


def test_temporal_contrast_is_the_sparse_prompt_of_the_fixture(encoders, clip_of, expected, compiled):
    """SynPO's contrasted stream: three of eight frames, through encoders and decoder."""
    numbers, encoder = expected("auroracap-keep"), encoders["auroracap-keep"]
    encoded = encoder.encode(clip_of("auroracap-keep"), Stages(), keep_features=True)
    sparse = encoder.contrast(clip_of("auroracap-keep"), encoded, TEMPORAL, Stages())
    assert len(sparse.blocks) == len(numbers["sparse_frame_index"]) == 3
    for block, index in zip(sparse.blocks, numbers["sparse_frame_index"], strict=True):
        assert relative_error(block, numbers["visual_tokens.keep0.4"][index]) < 1e-4
    embeds = encoder.prompt_embeds(sparse, "Describe the video in detail.")
    bundle = Bundle.open(compiled("auroracap-keep"))
    graph = bundle.file(bundle.manifest.components["decoder"].graph)
    logits = OrtDecoder(graph, bundle.manifest.decoder, bundle.embed).open(1, len(embeds)).prefill(0, embeds)[0]
    assert relative_error(logits, numbers["sparse.last_logits"]) < 1e-4


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap-keep"])
def test_temporal_contrast_is_the_clip_of_fewer_frames(variant, counted, clip_of):
    """With kept features, without them, and as a clip of its own: the same, and kept features are not made again."""
    encoder, items = counted(variant)
    clip = clip_of(variant)
    encoded = encoder.encode(clip, Stages(), keep_features=True)
    items.clear()
    kept = encoder.contrast(clip, encoded, TEMPORAL, Stages())
    # Where no stage joins frames, all that there is of a frame was kept.
    assert set(items) == (set() if variant == "auroracap-keep" else {"connector"})
    again = encoder.contrast(clip, encoder.encode(clip, Stages()), TEMPORAL, Stages())
    few = Clip(clip.frames[[0, 3, 7]], np.arange(3))
    alone = encoder.encode(few, Stages())
    for blocks in (again.blocks, alone.blocks):
        assert len(blocks) == len(kept.blocks)
        assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(kept.blocks, blocks, strict=True))


def test_a_contrast_of_two_ways_from_the_tower(compiled, clip_of):
    """The prompt has what the connector makes of each frame, and the same once more by another stage."""
    bundle = Bundle.open(compiled("auroracap-keep"))
    manifest = bundle.manifest
    vision, connector = manifest.pipeline.stages
    pieces = (EachOf("connector"), Tokens("twin"))
    pipeline = replace(
        manifest.pipeline,
        stages=(vision, connector, replace(connector, name="twin")),
        prompts={"video": PromptLayout(pieces)},
    )
    components = manifest.components | {"twin": manifest.components["connector"]}
    bundle.manifest = replace(manifest, pipeline=pipeline, components=components)
    encoder = Encoder(bundle, Tokenizer.from_file(str(bundle.file("tokenizer.json"))))
    clip = clip_of("auroracap-keep")
    encoded = encoder.encode(clip, Stages(), keep_features=True)
    assert set(encoded.kept) == {"connector", "twin"}
    view = encoder.contrast(clip, encoded, TEMPORAL, Stages())
    wanted = [encoded.tokens["connector"][place] for place in (0, 3, 7)]
    assert all(np.array_equal(mine, block) for mine, block in zip(view.tokens["connector"], wanted, strict=True))
    assert np.array_equal(view.tokens["twin"][0], np.concatenate(wanted))


def test_noise_contrast(encoders, clip_of):
    """The more noise, the further away; the same seed draws the same; shapes stay."""
    encoder, clip = encoders["clip-mistral"], clip_of("clip-mistral")
    encoded = encoder.encode(clip, Stages(), keep_features=True)

    def distance(contrast: Contrast) -> float:
        return relative_error(encoder.contrast(clip, encoded, contrast, Stages()).blocks[0], encoded.blocks[0])

    assert distance(Contrast("noise", 0)) < distance(Contrast("noise", 100)) < distance(Contrast("noise", 900))
    first, same, other = (
        encoder.contrast(clip, encoded, contrast, Stages()) for contrast in (NOISE, NOISE, Contrast("noise", seed=1))
    )
    assert np.array_equal(first.blocks[0], same.blocks[0])
    assert not np.array_equal(first.blocks[0], other.blocks[0])


@pytest.mark.parametrize("contrast", [TEMPORAL, NOISE])
def test_the_sound_stays(contrast, encoders, clip_of):
    encoder, clip = encoders["av-qwen2"], clip_of("av-qwen2", sound=True)
    encoded = encoder.encode(clip, Stages())
    view = encoder.contrast(clip, encoded, contrast, Stages())
    assert view.mode == encoded.mode == "audiovideo"
    assert [len(block) for block in view.blocks] == [4 if contrast is TEMPORAL else 16, 1496]
    assert view.blocks[1] is encoded.blocks[1]
    blind = Clip(sound=clip.sound)
    heard = encoder.encode(blind, Stages())
    with pytest.raises(OptionError, match="has none"):
        encoder.contrast(blind, heard, contrast, Stages())


def test_one_frame_has_nothing_to_contrast_in_time(encoders, clip_of):
    encoder, image = encoders["auroracap-keep"], clip_of("auroracap-keep", [0])
    encoded = encoder.encode(image, Stages())
    view = encoder.contrast(image, encoded, TEMPORAL, Stages())
    assert np.array_equal(view.blocks[0], encoded.blocks[0])
    assert view.notes == ["too few frames for a contrast in time: it is with the clip itself"]


# --- visual tokens


@pytest.mark.parametrize(
    ("setting", "count"), [(None, 16), ("100%", 16), ("16", 16), ("99", 16), ("50%", 8), ("5", 5), ("1%", 1), ("1", 1)]
)
def test_tokens_of_a_clip_are_merged_to_the_setting(setting, count, encoders, clip_of):
    setting = setting and parse_budget(setting)
    encoder, clip = encoders["av-qwen2"], clip_of("av-qwen2", sound=True)
    whole = encoder.encode(clip, Stages())
    encoded = encoder.encode(clip, Stages(), visual_tokens=setting)
    assert (encoded.visual_tokens, encoded.notes) == (setting, [])
    wanted = whole.blocks[0] if count == 16 else merge_tokens(whole.blocks[0], count)[0]
    assert np.array_equal(encoded.blocks[0], wanted)
    assert np.array_equal(encoded.blocks[1], whole.blocks[1])


@pytest.mark.parametrize(
    ("setting", "kept", "noted"),
    [(Count(1), 8, True), (Count(7), 8, True), (Share(0.01), 8, True), (Count(8), 8, False), (Count(16), 16, False)],
)
def test_each_numbered_frame_keeps_a_token(setting, kept, noted, encoders, clip_of):
    encoder, clip = encoders["internvl2"], clip_of("internvl2")
    encoded = encoder.encode(clip, Stages(), visual_tokens=setting)
    assert (len(encoded.blocks), sum(map(len, encoded.blocks))) == (8, kept)
    note = f"visual tokens {setting}: 8 were kept, one of each of the 8 blocks at least"
    assert encoded.notes == [note] * noted


def test_a_contrast_has_the_same_share_of_visual_tokens(encoders, clip_of):
    encoder, clip = encoders["clip-mistral"], clip_of("clip-mistral")

    def length(setting: TokenBudget | None) -> int:
        encoded = encoder.encode(clip, Stages(), visual_tokens=setting)
        return len(encoder.contrast(clip, encoded, TEMPORAL, Stages()).blocks[0])

    # Three of eight frames give 2 of the 5 slots of 9 tokens.
    assert [length(setting) for setting in (None, Share(0.5), Count(40), Count(8))] == [18, 9, 15, 3]


@pytest.mark.parametrize(
    ("setting", "keep", "noted"),
    [
        (None, 1.0, False),
        (Share(1.0), 1.0, False),
        (Share(0.5), 0.5, False),
        (Share(0.3), 0.25, True),
        (Share(0.99), 0.5, True),
        (Count(10_000), 1.0, False),
        (Count(8 * 64), 1.0, False),
        (Count(8 * 64 - 1), 0.5, True),
    ],
)
def test_ratios_of_merging(setting, keep, noted, encoders, clip_of, compiled):
    encoder, clip = encoders["auroracap"], clip_of("auroracap")
    variants = Bundle.open(compiled("auroracap")).manifest.pipeline.stage("vision").variants
    ratios = {variant.keep: variant for variant in variants}
    assert list(ratios) == [1.0, 0.5, 0.25, 0.1]
    encoded = encoder.encode(clip, Stages(), visual_tokens=setting, keep_features=True)
    assert {len(block) for block in encoded.blocks} == {ratios[keep].tokens}
    assert [f"share, {100 * keep:g}% " in note for note in encoded.notes] == [True] * noted
    # The contrast is merged alike, also where a number of tokens was asked for.
    for contrast in (TEMPORAL, NOISE):
        view = encoder.contrast(clip, encoded, contrast, Stages())
        assert {len(block) for block in view.blocks} == {ratios[keep].tokens}


@pytest.mark.parametrize("setting", [Share(0.05), Count(20)])
def test_fewer_tokens_than_the_smallest_ratio_are_refused(setting, encoders, clip_of):
    with pytest.raises(OptionError, match=r"as few visual tokens as (5%|20); .* 100% \(512 tokens\), 50% \(") as caught:
        encoders["auroracap"].encode(clip_of("auroracap"), Stages(), visual_tokens=setting)
    assert "\n" not in str(caught.value)
