"""Many clips at once: the captions of each alone, whatever shares the batch, and errors that stay where they belong."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import intertitle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intertitle.calibration.render import random_scene, write_clip
from intertitle.errors import BundleError, ItemError, OptionError, TransientMediaError
from intertitle.runtime.batching import BatchItem
from intertitle.runtime.reading import Readers
from intertitle.runtime.transcript import Transcript

STRATEGIES = {
    "greedy": {},
    "sample": {"strategy": "sample", "temperature": 1.3, "top_k": 0, "top_p": 1.0, "seed": 3},
    "beam": {"strategy": "beam", "num_beams": 3},
    "contrast": {"contrast": "temporal"},
    "retrospective": {"retrospective": True},
    "unsure": {"contrast": "noise", "confidence": -4.0},
    "ngrams": {"no_repeat_ngram": 2, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module", params=["int4", pytest.param("fp32", marks=pytest.mark.slow)])
def captioner(request, compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("av-qwen2", request.param))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[BatchItem]:
    """Videos with and without sound, a span of one, a question of its own, an image."""
    folder = tmp_path_factory.mktemp("clips")
    items = []
    for seed in range(4):
        path = folder / f"{seed}.mp4"
        scene = random_scene(seed, size=(96, 64), fps=10, seconds=1.0 + seed)
        write_clip(scene, path)
        items.append(BatchItem(path))
    items.append(BatchItem(items[3].source, start=1.0, end=2.5))
    items.append(BatchItem(items[0].source, prompt="What is the background, and what moves in front of it?"))
    return items


@pytest.fixture(scope="module")
def alone(captioner, clips):
    """``alone(strategy, index)``: tokens of an item captioned by itself, in a fresh cache."""
    known: dict[tuple[str, int], list[int]] = {}

    def look_up(strategy: str, index: int) -> list[int]:
        if (strategy, index) not in known:
            item = clips[index]
            captioner._loaded.scheduler = None
            how = intertitle.Decoding(max_new_tokens=7, **STRATEGIES[strategy])
            known[strategy, index] = captioner.caption(
                item.source, prompt=item.prompt, start=item.start, end=item.end, decoding=how
            ).token_ids
        return known[strategy, index]

    return look_up


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(STRATEGIES)), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4))
def test_a_batch_gives_the_tokens_of_each_alone(captioner, clips, alone, strategy, order, rows):
    """Any strategy, any order of arrival, any number of rows; prompts and clips of different lengths."""
    how = intertitle.Decoding(max_new_tokens=7, **STRATEGIES[strategy])
    results = list(captioner.caption_batch([clips[i] for i in order], decoding=how, rows=rows))
    assert sorted(result.index for result in results) == list(range(len(order)))
    for result in results:
        assert result.caption is not None
        assert result.item is clips[order[result.index]]
        assert result.caption.token_ids == alone(strategy, order[result.index])


def test_an_error_is_the_result_of_its_item_only(captioner, clips, tmp_path: Path, alone):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    items = [clips[1], broken, tmp_path / "missing.mp4", clips[2], BatchItem(clips[0].source, start=50.0), "."]
    how = intertitle.Decoding(max_new_tokens=7)
    results = {result.index: result for result in captioner.caption_batch(items, decoding=how)}
    assert sorted(results) == list(range(6))
    assert [results[i].caption is None for i in range(6)] == [False, True, True, False, True, True]
    assert all("\n" not in str(results[i].error) for i in (1, 2, 4, 5))
    assert [results[i].caption.token_ids for i in (0, 3)] == [alone("greedy", 1), alone("greedy", 2)]  # type: ignore[union-attr]


def test_items_are_taken_as_they_are_needed(captioner, clips):
    taken = []

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield clips[0].source

    results = captioner.caption_batch(endless(), audio=False, rows=2, decoding=intertitle.Decoding(max_new_tokens=3))
    first = next(results)
    assert first.caption is not None
    # Those of the rows, those read ahead, and the one that was given.
    assert len(taken) <= 2 + 2 + 2
    results.close()
    captioner.caption(clips[0].source, decoding=intertitle.Decoding(max_new_tokens=3))


def test_memory_bounds_the_rows(captioner, clips):
    decoder = captioner.manifest.decoder
    row = 2 * 4 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    how = intertitle.Decoding(max_new_tokens=3)
    captioner._loaded.scheduler = None
    items = [clips[i].source for i in (0, 1, 2, 3)]
    done = list(captioner.caption_batch(items, decoding=how, audio=False, memory=row * 256 * 2))
    assert all(result.caption is not None for result in done)
    inference = captioner._loaded.scheduler.inference
    assert inference.rows * inference.max_length * row <= row * 256 * 2
    with pytest.raises(OptionError, match="of cache, the limit is"):
        list(captioner.caption_batch(items, decoding=how, memory=1000))
    with pytest.raises(OptionError, match="rows must be"):
        list(captioner.caption_batch(items, rows=0))


def test_a_longer_prompt_makes_longer_rows(captioner, clips, alone):
    long = BatchItem(clips[0].source, prompt="word " * 300)
    how = intertitle.Decoding(max_new_tokens=7)
    captioner._loaded.scheduler = None
    results = list(captioner.caption_batch([clips[2], long, clips[1]], decoding=how, audio=True))
    by_index = {result.index: result.caption for result in results}
    assert by_index[1].prompt_tokens > 300  # type: ignore[union-attr]
    assert by_index[0].token_ids == alone("greedy", 2)  # type: ignore[union-attr]
    assert by_index[2].token_ids == alone("greedy", 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("raised", [ZeroDivisionError("by zero"), IndexError("list index out of range"), MemoryError()])
def test_whatever_an_item_raises_is_its_own(captioner, clips, alone, monkeypatch, raised):
    encode = captioner.encoder.encode

    def fail_second(clip, *arguments, **options):
        if clip.seconds == pytest.approx(2.0):
            raise raised
        return encode(clip, *arguments, **options)

    monkeypatch.setattr(captioner.encoder, "encode", fail_second)
    how = intertitle.Decoding(max_new_tokens=7)
    results = {result.index: result for result in captioner.caption_batch(clips[:3], decoding=how)}
    assert [results[index].caption is None for index in range(3)] == [False, True, False]
    error = results[1].error
    assert error.__cause__ is raised
    assert isinstance(error, TransientMediaError if isinstance(raised, MemoryError) else ItemError)
    assert str(clips[1].source) in str(error)
    assert results[0].caption.token_ids == alone("greedy", 0)
    assert results[2].caption.token_ids == alone("greedy", 2)


def test_a_step_that_fails_costs_one_item_only(captioner, clips, alone, monkeypatch):
    """Three captions share the decode steps. The transcript of one raises in the middle of them."""
    push = Transcript.push
    poisoned = alone("greedy", 1)

    def fail(self, token):
        if [*(one.id for one in self.tokens), token.id] == poisoned[:3]:
            raise FloatingPointError("poison")
        return push(self, token)

    monkeypatch.setattr(Transcript, "push", fail)
    how = intertitle.Decoding(max_new_tokens=7)
    results = {result.index: result for result in captioner.caption_batch(clips[:3], decoding=how)}
    assert sorted(results) == [0, 1, 2]
    assert isinstance(results[1].error.__cause__, FloatingPointError)
    assert results[0].caption.token_ids == alone("greedy", 0)
    assert results[2].caption.token_ids == alone("greedy", 2)


def test_a_broken_bundle_ends_the_batch(captioner, clips, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise BundleError("audio.onnx: cannot be loaded")

    monkeypatch.setattr(captioner.encoder, "encode", fail)
    with pytest.raises(BundleError):
        list(captioner.caption_batch(clips))


def test_steps_are_shared(captioner, clips, monkeypatch):
    """Four captions together: each step takes in all that are under way, and a place that comes free is filled."""
    how = intertitle.Decoding(max_new_tokens=10, repetition_penalty=1.0)
    clip = captioner.read(clips[0].source, audio=False)
    monkeypatch.setattr("intertitle.runtime.captioner.Readers.read", lambda *_, **__: replace(clip))
    steps: list[int] = []
    inference = type(captioner.open_inference(1))
    original = inference.step

    def slow_step(self, token_ids):
        # Slower than reading, as with any model of a real size.
        time.sleep(0.02)
        steps.append(len(token_ids))
        return original(self, token_ids)

    monkeypatch.setattr(inference, "step", slow_step)
    results = list(captioner.caption_batch([clips[0].source] * 7, audio=False, decoding=how, rows=4))
    lengths = {len(result.caption.token_ids) for result in results if result.caption}
    assert len(results) == 7
    assert sum(steps) == 7 * (lengths.pop() - 1)
    assert max(steps) == 4
    assert steps.count(4) >= len(steps) // 3


def test_closing_does_not_wait_for_files_that_are_read(captioner, clips, tmp_path: Path, faults: None):
    """Reading this one would take 1,000 seconds."""
    hangs = tmp_path / "hang.mp4"
    hangs.write_bytes(Path(clips[0].source).read_bytes())
    results = captioner.caption_batch([clips[0], hangs, hangs], decoding=intertitle.Decoding(max_new_tokens=3))
    assert next(results).caption is not None
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 20


def test_files_are_read_in_this_process_when_asked(captioner, clips, tmp_path: Path, faults: None, monkeypatch):
    """``isolate=False``; and where this program is one file that cannot start Python again."""
    crash = tmp_path / "crash.mp4"
    crash.write_bytes(Path(clips[0].source).read_bytes())
    how = intertitle.Decoding(max_new_tokens=3)
    (isolated,) = captioner.caption_batch([crash], decoding=how)
    assert "a decoder crashed on it" in str(isolated.error)
    (here,) = captioner.caption_batch([crash], decoding=how, isolate=False)
    assert here.caption is not None  # only workers have the fault
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    (frozen,) = captioner.caption_batch([crash], decoding=how)
    assert frozen.caption.token_ids == here.caption.token_ids


def test_a_captioner_keeps_its_readers(captioner, clips, tmp_path: Path, faults: None, monkeypatch):
    """A batch starts none beside them, and closing it ends only what they are reading."""
    hangs = tmp_path / "hang.mp4"
    hangs.write_bytes(Path(clips[0].source).read_bytes())
    how = intertitle.Decoding(max_new_tokens=3)
    with Readers(2) as readers:
        monkeypatch.setattr(captioner, "readers", readers)
        with monkeypatch.context() as patch:
            patch.setattr("intertitle.runtime.reading.subprocess.Popen", None)
            for _ in range(2):
                assert all(result.caption for result in captioner.caption_batch(clips[:3], decoding=how))
        results = captioner.caption_batch([clips[0], hangs, hangs], decoding=how)
        assert next(results).caption is not None
        results.close()
        assert captioner.caption(clips[0].source, decoding=how).text
