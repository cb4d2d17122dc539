"""Strategies, passes and prepared clips through the public class, on compiled fixture bundles."""

from __future__ import annotations

from pathlib import Path

import intertitle
import numpy as np
import pytest
from intertitle.cli import DEMO_CLIP
from intertitle.errors import OptionError
from intertitle.runtime.decoding import RETROSPECTIVE_TEMPLATE, log_likelihoods

FEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def aurora(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("auroracap-keep"))


@pytest.fixture(scope="module")
def listener(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("av-qwen2"))


@pytest.fixture(scope="module")
def frames(expected) -> np.ndarray:
    return expected("auroracap-keep")["frames_uint8"]


@pytest.fixture(scope="module")
def eight(expected) -> np.ndarray:
    return expected("av-qwen2")["frames_uint8"]


def test_temporal_contrast_gives_the_reference_tokens(aurora, frames, expected):
    """SynPO's contrast from frames to tokens: alpha 0.5, every third frame, no cutoff."""
    how = intertitle.Decoding(contrast="temporal", max_new_tokens=48)
    caption = aurora.caption(frames=frames, decoding=how)
    assert caption.token_ids == expected("auroracap-keep")["contrastive_greedy_tokens.alpha0.5"].tolist()
    assert caption.passes == ["greedy, temporal contrast"]
    plain = aurora.caption(frames=frames, decoding=intertitle.Decoding(max_new_tokens=48))
    assert plain.token_ids == expected("auroracap-keep")["greedy_tokens"].tolist()
    assert plain.contrast_logprobs is None


def clean_logprobs(captioner: intertitle.Captioner, frames: np.ndarray, ids: list[int]) -> list[float]:
    """What a single stream says of ``ids``, in one pass over them."""
    prepared = captioner.prepare(frames=frames)
    embeds = captioner.encoder.prompt_embeds(prepared.encoded, captioner.manifest.default_instruction)
    inference = captioner.open_inference(len(embeds) + len(ids))
    first = inference.prefill(0, embeds)
    rest = inference.prefill(0, captioner.bundle.embed(ids), num_logits=len(ids))
    return log_likelihoods(np.concatenate([first, rest[:-1]]), ids)


@pytest.mark.parametrize(
    "how",
    [
        {"contrast": "temporal"},
        {"contrast": "noise"},
        {"contrast": "temporal", "strategy": "sample", "temperature": 0.8, "top_k": 32, "top_p": 0.9},
        {"strategy": "sample", "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.01},
        {"strategy": "beam", "num_beams": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 2},
    ],
)
def test_logprobs_are_those_of_the_clean_stream(how, listener, eight):
    caption = listener.caption(frames=eight, decoding=intertitle.Decoding(**how, **FEW))
    np.testing.assert_allclose(
        caption.token_logprobs, clean_logprobs(listener, eight, caption.token_ids), atol=2e-4, rtol=0
    )
    combined = caption.contrast_logprobs
    assert (combined is not None) == ("contrast" in how)
    if combined is not None:
        assert all(value is not None and value <= 0 for value in combined)
        assert combined != caption.token_logprobs


def test_noise_follows_its_seed_and_changes_the_caption(listener, eight):
    def ids(**how) -> list[int]:
        decoding = intertitle.Decoding(max_new_tokens=16, contrast="noise", contrast_alpha=2.0, **how)
        return listener.caption(frames=eight, decoding=decoding).token_ids

    plain = listener.caption(frames=eight, decoding=intertitle.Decoding(max_new_tokens=16)).token_ids
    assert ids(seed=1) == ids(seed=1)
    # alpha 0 takes nothing off, and a beta of 1 leaves the clean stream's likeliest token alone.
    assert (
        listener.caption(
            frames=eight, decoding=intertitle.Decoding(max_new_tokens=16, contrast="noise", contrast_alpha=0.0)
        ).token_ids
        == plain
    )
    unpenalized = intertitle.Decoding(max_new_tokens=16, repetition_penalty=1.0)
    assert (
        ids(contrast_beta=1.0, repetition_penalty=1.0) == listener.caption(frames=eight, decoding=unpenalized).token_ids
    )
    assert ids(noise_step=999, contrast_beta=0.0) != plain


def test_a_retrospective_pass_reads_the_first_caption(listener, eight):
    first = listener.caption(frames=eight, decoding=intertitle.Decoding(**FEW))
    twice = listener.caption(frames=eight, decoding=intertitle.Decoding(retrospective=True, **FEW))
    asked = RETROSPECTIVE_TEMPLATE.replace("{instruction}", listener.manifest.default_instruction)
    by_hand = listener.caption(
        frames=eight, prompt=asked.replace("{caption}", first.text), decoding=intertitle.Decoding(**FEW)
    )
    assert (twice.draft, twice.token_ids) == (first.text, by_hand.token_ids)
    assert twice.passes == ["greedy", "greedy, retrospective"]
    assert twice.prompt_tokens == by_hand.prompt_tokens > first.prompt_tokens


def test_a_caption_cannot_write_into_the_template(listener, eight):
    how = intertitle.Decoding(prefix="{instruction} {caption}", retrospective=True, **FEW)
    assert "{instruction} {caption}" in (listener.caption(frames=eight, decoding=how).draft or "")


def test_confidence_decides_on_further_passes(listener, eight):
    plain = listener.caption(frames=eight, decoding=intertitle.Decoding(**FEW))
    sure, unsure = plain.mean_logprob - 0.01, min(plain.mean_logprob + 0.01, 0.0)
    how = {"contrast": "temporal", "retrospective": True, **FEW}
    kept = listener.caption(frames=eight, decoding=intertitle.Decoding(confidence=sure, **how))
    assert (kept.passes, kept.token_ids, kept.draft) == (["greedy"], plain.token_ids, None)
    redone = listener.caption(frames=eight, decoding=intertitle.Decoding(confidence=unsure, **how))
    assert redone.passes == ["greedy", "greedy, temporal contrast", "greedy, temporal contrast, retrospective"]
    assert any("below" in note for note in redone.notes)
    straight = listener.caption(frames=eight, decoding=intertitle.Decoding(**how))
    assert straight.token_ids == redone.token_ids
    assert straight.passes == redone.passes[1:]


def test_a_streams_pieces_join_to_the_text_in_every_strategy(listener, eight):
    for how in (
        {},
        {"contrast": "temporal"},
        {"strategy": "beam", "num_beams": 2},
        {"retrospective": True},
        {"retrospective": True, "confidence": -1000.0},
        {"prefix": "The video"},
    ):
        stream = listener.stream(frames=eight, decoding=intertitle.Decoding(**how, **FEW))
        pieces = list(stream)
        assert stream.caption is not None
        assert "".join(pieces) == stream.caption.text
        assert len(pieces) > 1 or how.keys() & {"strategy", "confidence"}


def test_closing_a_stream_frees_its_rows(listener, eight):
    decoding = intertitle.Decoding(contrast="temporal", max_new_tokens=200)
    with listener.stream(frames=eight, decoding=decoding) as stream:
        next(stream)
        scheduler = listener._loaded.scheduler
        assert scheduler is not None
        assert scheduler.free_rows == scheduler.inference.rows - 2
    assert scheduler.free_rows == scheduler.inference.rows
    assert stream.caption is not None
    assert stream.caption.finish_reason == "closed"


def test_streams_side_by_side_do_not_disturb_each_other(listener, eight):
    how = intertitle.Decoding(**FEW)
    alone = listener.caption(frames=eight, decoding=how).text, listener.caption(frames=eight[::-1], decoding=how).text
    streams = listener.stream(frames=eight, decoding=how), listener.stream(frames=eight[::-1], decoding=how)
    texts = ["", ""]
    for pieces in zip(*streams, strict=False):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
    assert tuple(texts) == alone


def test_a_prefix_begins_the_caption(listener, eight):
    prefix = "In this video"
    ids = listener.tokenizer.encode(prefix, add_special_tokens=False).ids
    for strategy in ("greedy", "sample", "beam"):
        how = intertitle.Decoding(strategy=strategy, prefix=prefix, **FEW)
        caption = listener.caption(frames=eight, decoding=how)
        assert caption.text.startswith(prefix)
        assert caption.token_ids[: len(ids)] == ids
        assert len(caption.token_ids) <= len(ids) + 8
        np.testing.assert_allclose(
            caption.token_logprobs, clean_logprobs(listener, eight, caption.token_ids), atol=2e-4, rtol=0
        )


def test_stop_texts_end_every_strategy(listener, eight):
    whole = listener.caption(frames=eight, decoding=intertitle.Decoding(max_new_tokens=12))
    stop = whole.text[4:6]
    for how in ({}, {"strategy": "beam", "num_beams": 2}, {"contrast": "temporal", "contrast_alpha": 0.0}):
        caption = listener.caption(frames=eight, decoding=intertitle.Decoding(stop=(stop,), max_new_tokens=12, **how))
        assert stop not in caption.text
        if "strategy" not in how:
            assert (caption.text, caption.finish_reason) == (whole.text[: whole.text.index(stop)], "stop_string")


def test_candidates_come_from_one_encoding(listener, eight, monkeypatch):
    encoded = []
    original = listener.encoder.encode
    monkeypatch.setattr(listener.encoder, "encode", lambda *a, **k: encoded.append(1) or original(*a, **k))
    how = intertitle.Decoding(strategy="sample", temperature=1.2, top_k=0, top_p=1.0, seed=5, **FEW)
    found = listener.candidates(frames=eight, count=5, rows=2, decoding=how)
    assert len(encoded) == 1
    assert [c.mean_logprob for c in found] == sorted((c.mean_logprob for c in found), reverse=True)
    assert len({tuple(c.token_ids) for c in found}) > 1
    # The first of them is the caption of the same seed, and the number of them changes none.
    alone = listener.caption(frames=eight, decoding=how).token_ids
    assert alone in [c.token_ids for c in found]
    fewer = {tuple(c.token_ids) for c in listener.candidates(frames=eight, count=3, decoding=how)}
    assert fewer <= {tuple(c.token_ids) for c in found}


def test_beam_candidates_are_the_beams(listener, eight):
    how = intertitle.Decoding(strategy="beam", num_beams=4, **FEW)
    found = listener.candidates(frames=eight, count=3, decoding=how)
    assert len({tuple(c.token_ids) for c in found}) == 3
    assert listener.caption(frames=eight, decoding=how).token_ids in [c.token_ids for c in found]


def test_several_questions_share_a_clip(listener, monkeypatch):
    how = intertitle.Decoding(**FEW)
    questions = ["What is heard?", "What is seen?", None]
    apart = [listener.caption(DEMO_CLIP, prompt=q, decoding=how).token_ids for q in questions]
    fresh = intertitle.Captioner.load(listener.bundle.path)
    prepared = fresh.prepare(DEMO_CLIP)
    monkeypatch.setattr(fresh.encoder, "encode", None)
    heard: dict[str | None, int] = {}
    for question, ids in zip(questions, apart, strict=True):
        done: list[int] = []
        caption = fresh.caption(
            prepared,
            prompt=question,
            decoding=how,
            progress=lambda s, n, _, d=done: d.append(n) if s == "prefill" else None,
        )
        assert caption.token_ids == ids
        # The reports begin with what was not computed again.
        heard[question] = min(n for n in done if n)
    assert heard["What is seen?"] > 1496
    with pytest.raises(OptionError, match="prepared already"):
        fresh.caption(prepared, audio=False)


def test_what_cannot_be_contrasted_is_said(listener, tmp_path: Path):
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    how = intertitle.Decoding(contrast="temporal", **FEW)
    caption = listener.caption(waveform=sound, sample_rate=16000, decoding=how)
    assert (caption.passes, caption.contrast_logprobs) == (["greedy"], None)
    assert any("no pictures" in note for note in caption.notes)


@pytest.mark.parametrize(
    ("how", "count", "words"),
    [
        ({}, 2, "one caption only"),
        ({"strategy": "beam", "num_beams": 2}, 3, "beams"),
        ({"strategy": "sample"}, 0, "at least 1"),
    ],
)
def test_candidates_that_cannot_be(how, count, words, listener, eight):
    with pytest.raises(OptionError, match=words):
        listener.candidates(frames=eight, count=count, decoding=intertitle.Decoding(**how))
