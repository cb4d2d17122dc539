"""What a long-running service needs of a captioner: deadlines, closing, threads, forks, captions that say it all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import intertitle
import numpy as np
import pytest
from intertitle.errors import ClosedError, DeadlineError, OptionError, TargetError
from intertitle.runtime import intake as intake_module
from intertitle.runtime.guard import Guard
from intertitle.runtime.timing import Stages
from intertitle.runtime.viewing import Count, Share

DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"
SHORT = intertitle.Decoding(max_new_tokens=6)
#: Nothing ends these before the limit: the penalty keeps random weights from their end-of-sequence token.
LONG = intertitle.Decoding(max_new_tokens=500)


@pytest.fixture(scope="module")
def listener(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("av-qwen2"))


@pytest.fixture(scope="module")
def per_frame(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("auroracap"))


@pytest.fixture(scope="module")
def eight(expected) -> np.ndarray:
    return expected("av-qwen2")["frames_uint8"]


@pytest.fixture
def slow_steps(listener, monkeypatch) -> float:
    """Each decode step takes this many seconds at least."""
    inference = type(listener.open_inference(1))
    original = inference.step

    def step(self, token_ids):
        time.sleep(0.03)
        return original(self, token_ids)

    monkeypatch.setattr(inference, "step", step)
    return 0.03


# What a caption says


def test_reused_prompt_tokens_are_counted(listener, eight):
    listener.forget()
    first = listener.caption(frames=eight, decoding=SHORT)
    again = listener.caption(frames=eight, decoding=SHORT)
    other = listener.caption(frames=eight, prompt="What is it?", decoding=SHORT)
    assert first.prompt_tokens_reused == 0
    assert again.prompt_tokens_reused == again.prompt_tokens == first.prompt_tokens
    # All but the text after the clip, which is the instruction's.
    prepared = listener.prepare(frames=eight)
    clip = sum(map(len, prepared.encoded.blocks))
    assert clip < other.prompt_tokens_reused < other.prompt_tokens
    listener.forget()
    cold = listener.caption(frames=eight, decoding=SHORT)
    assert cold.prompt_tokens_reused == 0
    assert cold.token_ids == first.token_ids == again.token_ids
    assert json.loads(json.dumps(asdict(again)))["prompt_tokens_reused"] == again.prompt_tokens


def test_a_cold_prompt_is_computed(listener, eight):
    """The prefill of a prompt that is reused takes no time; that of one that was forgotten does."""
    seen: list[int] = []

    def prefilled(stage: str, done: int, total: int) -> None:
        if stage == "prefill" and done:
            seen.append(done)

    listener.forget()
    tokens = listener.caption(frames=eight, decoding=SHORT, progress=prefilled).prompt_tokens
    assert seen[-1] == tokens
    seen.clear()
    listener.caption(frames=eight, decoding=SHORT, progress=prefilled)
    assert seen == []
    listener.forget()
    listener.caption(frames=eight, decoding=SHORT, progress=prefilled)
    assert seen[-1] == tokens


def test_the_instruction_and_the_settings_in_effect(listener, eight):
    caption = listener.caption(frames=eight, decoding=SHORT)
    generation = listener.manifest.generation
    assert caption.instruction == listener.manifest.default_instruction
    assert caption.decoding == {
        "strategy": "greedy",
        "max_new_tokens": 6,
        "repetition_penalty": generation.repetition_penalty,
        "no_repeat_ngram": 0,
    }
    how = intertitle.Decoding(strategy="sample", top_k=7, seed=3, stop=("zz",), prefix="A", max_new_tokens=6)
    sampled = listener.caption(frames=eight, prompt="What?", decoding=how)
    assert sampled.instruction == "What?"
    wanted = {"strategy": "sample", "top_k": 7, "seed": 3, "stop": ["zz"], "prefix": "A"}
    assert wanted | {"temperature": generation.temperature, "top_p": generation.top_p} == {
        name: sampled.decoding[name] for name in (*wanted, "temperature", "top_p")
    }
    beam = listener.caption(frames=eight, decoding=intertitle.Decoding(strategy="beam", max_new_tokens=6))
    assert (beam.decoding["num_beams"], beam.decoding["length_penalty"]) == (4, 1.0)
    noise = listener.caption(frames=eight, decoding=intertitle.Decoding(contrast="noise", max_new_tokens=6))
    assert {name: noise.decoding[name] for name in ("contrast", "contrast_alpha", "contrast_beta", "noise_step")} == {
        "contrast": "noise",
        "contrast_alpha": 1.0,
        "contrast_beta": 0.1,
        "noise_step": 500,
    }
    assert json.loads(json.dumps(noise.decoding)) == noise.decoding


def test_notes_of_the_contrasted_view_reach_the_caption(per_frame, eight):
    how = intertitle.Decoding(contrast="temporal", max_new_tokens=4)
    # One frame: a third of it is all of it.
    caption = per_frame.caption(frames=eight[:1], decoding=how)
    assert "too few frames for a contrast in time: it is with the clip itself" in caption.notes
    assert per_frame.caption(frames=eight, decoding=how).notes == []


# What is refused, and when


@pytest.mark.parametrize("visual_tokens", [None, Share(0.5), Count(40)], ids=str)
@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "auroracap", "auroracap-keep"])
def test_the_length_of_a_prompt_is_known_before_it_is_encoded(variant, visual_tokens, compiled, expected):
    captioner = intertitle.Captioner.load(compiled(variant))
    numbers = expected(variant)
    clips = [
        captioner.read(frames=numbers["frames_uint8"]),
        captioner.read(frames=numbers["frames_uint8"][:1]),
        captioner.read(frames=numbers["frames_uint8"][[0, 0, 1, 1, 2, 2, 3, 3]], duplicates=1.0),
    ]
    pipeline, encoder, asked = captioner.manifest.pipeline, captioner.encoder, "What is seen?"
    if pipeline.sound is not None:
        sound = {"waveform": numbers["audio_int16"], "sample_rate": 16000}
        clips += [captioner.read(frames=numbers["frames_uint8"], **sound), captioner.read(**sound)]
    for clip in clips:
        if pipeline.merging is not None and visual_tokens == Count(40) and len(clip.order) > 1:
            # No compiled share gives so few of a clip with several frames.
            with pytest.raises(OptionError, match="no compiled share"):
                encoder.prompt_length(clip, asked, visual_tokens)
            continue
        encoded = encoder.encode(clip, Stages(), visual_tokens=visual_tokens)
        assert encoder.prompt_length(clip, asked, visual_tokens) == len(encoder.prompt_embeds(encoded, asked))


@pytest.mark.parametrize("method", ["caption", "stream", "candidates", "caption_batch"])
def test_what_cannot_fit_is_refused_before_any_encoder_runs(listener, monkeypatch, method):
    def encode(*_, **__):
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(listener.encoder, "encode", encode)
    context = listener.manifest.decoder.context_length
    for prompt, limit, message in (("word " * context, None, "the prompt takes"), (None, context, "fewer new tokens")):
        how = intertitle.Decoding(strategy="sample", max_new_tokens=limit)
        if method == "caption_batch":
            (result,) = listener.caption_batch([DEMO], prompt=prompt, decoding=how)
            assert isinstance(result.error, OptionError)
            assert message in str(result.error)
        else:
            with pytest.raises(OptionError, match=message):
                getattr(listener, method)(DEMO, prompt=prompt, decoding=how)


def test_text_that_is_none_is_told_in_one_line(listener, eight):
    for wrong in ({"prefix": "a\ud800"}, {"stop": ("\udcff",)}, {"retrospective_template": "{caption}\ud800"}):
        with pytest.raises(OptionError, match=rf"{next(iter(wrong))} is not valid Unicode text"):
            intertitle.Decoding(**wrong)
    for call in (listener.caption, listener.candidates, listener.score):
        with pytest.raises(OptionError, match="prompt is not valid Unicode text: character 3"):
            call(frames=eight, prompt="ab\ud800")
    with pytest.raises(OptionError, match="text is not valid Unicode text"):
        listener.score(frames=eight, text="\ud800")
    with pytest.raises(OptionError, match="prompt must be text"):
        listener.caption(frames=eight, prompt=b"bytes")
    (result,) = listener.caption_batch([intertitle.BatchItem(DEMO, prompt="\ud800")], decoding=SHORT)
    assert isinstance(result.error, OptionError)


def test_beams_without_a_beam_search_are_told():
    with pytest.raises(OptionError, match="num_beams is for the strategy beam"):
        intertitle.Decoding(num_beams=4)
    assert intertitle.Decoding(strategy="beam").beams == 4
    assert intertitle.Decoding(strategy="beam", num_beams=2).beams == 2


@pytest.mark.parametrize("threads", [0, -1, 100_000, 1.5])
def test_a_number_of_threads_that_makes_no_sense(compiled, threads):
    with pytest.raises(OptionError, match="threads must be a whole number from 1 to"):
        intertitle.Captioner.load(compiled("av-qwen2"), threads=threads)


def test_a_clip_that_another_bundle_prepared(listener, per_frame, eight):
    prepared = per_frame.prepare(frames=eight)
    with pytest.raises(OptionError, match="prepared by a captioner of another bundle"):
        listener.caption(prepared)


# Memory


@pytest.mark.parametrize("contrast", [None, "temporal", "noise"])
def test_frames_are_freed_while_their_caption_is_generated(listener, monkeypatch, contrast):
    read, clips = intake_module.read_clip, []

    def remember(*arguments, **options):
        clips.append(read(*arguments, **options))
        return clips[-1]

    monkeypatch.setattr(intake_module, "read_clip", remember)
    how = intertitle.Decoding(contrast=contrast, max_new_tokens=4)
    with listener.stream(DEMO, decoding=how) as stream:
        next(stream)
        assert clips[0].frames is None
    (result,) = listener.caption_batch([DEMO], decoding=how, isolate=False)
    assert result.caption is not None
    assert clips[1].frames is None
    # A prepared clip is the user's to look at.
    prepared = listener.prepare(DEMO)
    listener.caption(prepared, decoding=how)
    assert prepared.clip.frames is not None


# Deadlines and streams that are closed


def test_a_deadline_keeps_the_caption_so_far(listener, eight, slow_steps):
    whole = listener.caption(frames=eight, decoding=replace(LONG, max_new_tokens=40))
    prepared = listener.prepare(frames=eight)
    started = time.perf_counter()
    caption = listener.caption(prepared, decoding=LONG, deadline=0.6)
    assert time.perf_counter() - started < 3
    assert caption.finish_reason == "deadline"
    # At least one token, and no more than the steps that fit.
    count = len(caption.token_ids)
    assert 1 <= count <= 0.6 / slow_steps + 2
    assert caption.token_ids == whole.token_ids[:count]
    assert whole.text.startswith(caption.text)
    enough = listener.caption(prepared, decoding=SHORT, deadline=600.0)
    assert enough.finish_reason == "length"


def test_a_deadline_in_a_stream_and_among_candidates(listener, eight, slow_steps):
    prepared = listener.prepare(frames=eight)
    stream = listener.stream(prepared, decoding=LONG, deadline=0.5)
    text = "".join(stream)
    assert stream.caption is not None
    assert stream.caption.finish_reason == "deadline"
    assert text == stream.caption.text
    how = replace(LONG, strategy="sample")
    found = listener.candidates(prepared, 3, rows=2, decoding=how, deadline=0.5)
    # The third waited for a row.
    assert [each.finish_reason for each in found] == ["deadline", "deadline"]
    beams = listener.candidates(prepared, 2, decoding=replace(LONG, strategy="beam", num_beams=3), deadline=0.5)
    assert [each.finish_reason for each in beams] == ["deadline", "deadline"]
    assert all(each.token_ids for each in beams)


def test_a_deadline_before_the_first_token_is_an_error(listener, eight):
    prepared = listener.prepare(frames=eight)
    for call in (listener.caption, listener.candidates):
        with pytest.raises(DeadlineError, match="before the first token"):
            call(prepared, decoding=replace(LONG, strategy="sample"), deadline=1e-9)
        with pytest.raises(DeadlineError, match="at the stage 'open'"):
            call(DEMO, deadline=1e-9)
    for wrong in (0, -1.0, float("nan"), float("inf"), 10**400, True, "3"):
        with pytest.raises(OptionError, match="deadline is seconds above 0"):
            listener.caption(prepared, deadline=wrong)
    # Nothing of it is left behind.
    assert listener.caption(prepared, decoding=SHORT).finish_reason == "length"


def test_a_second_pass_that_has_no_time_leaves_the_first_caption(listener, eight, monkeypatch):
    how = intertitle.Decoding(retrospective=True, max_new_tokens=5)
    first = listener.caption(frames=eight, decoding=intertitle.Decoding(max_new_tokens=5))
    retrospective = intake_module.CaptionTask._retrospective

    def late(self, caption):
        if caption:
            self.deadline = time.perf_counter()
        return retrospective(self, caption)

    monkeypatch.setattr(intake_module.CaptionTask, "_retrospective", late)
    caption = listener.caption(frames=eight, decoding=how, deadline=600.0)
    assert (caption.text, caption.token_ids) == (first.text, first.token_ids)
    assert (caption.finish_reason, caption.passes, caption.draft) == ("deadline", ["greedy"], None)
    assert caption.prompt_tokens == first.prompt_tokens
    assert any("stopped before the pass" in note for note in caption.notes)


def test_a_closed_stream_keeps_its_partial_caption(listener, eight):
    whole = listener.caption(frames=eight, decoding=replace(LONG, max_new_tokens=60))
    stream = listener.stream(frames=eight, decoding=LONG)
    shown = next(stream) + next(stream)
    stream.close()
    caption = stream.caption
    assert caption is not None
    assert caption.finish_reason == "closed"
    assert caption.text.startswith(shown)
    assert caption.token_ids == whole.token_ids[: len(caption.token_ids)]
    assert len(caption.token_ids) == len(caption.token_logprobs)
    unread = listener.stream(frames=eight, decoding=LONG)
    unread.close()
    assert unread.caption is None


# Opening and closing


def test_a_closed_captioner_says_so(compiled, eight):
    with intertitle.Captioner.load(compiled("av-qwen2")) as captioner:
        stream = captioner.stream(frames=eight, decoding=LONG)
        next(stream)
        batch = captioner.caption_batch([DEMO], decoding=SHORT)
        prepared = captioner.prepare(frames=eight)
        assert repr(captioner) == (
            f"Captioner({captioner.manifest.name!r}, family='videollama2', device='cpu', weights='fp32')"
        )
    captioner.close()
    assert repr(captioner).endswith(", closed)")
    assert captioner.device == "cpu"
    for call in (
        lambda: captioner.caption(DEMO),
        lambda: captioner.stream(prepared),
        lambda: captioner.candidates(prepared),
        lambda: captioner.score(prepared, "text"),
        lambda: captioner.prepare(DEMO),
        lambda: captioner.preload(),
        lambda: next(stream),
        lambda: next(batch),
    ):
        with pytest.raises(ClosedError, match="the captioner was closed"):
            call()
    assert captioner._loaded.decoder is None
    assert captioner._loaded.scheduler is None
    assert captioner.encoder._components == {}


def test_a_prepared_clip_in_one_line(listener, eight):
    prepared = listener.prepare(frames=eight)
    tokens = sum(map(len, prepared.encoded.blocks))
    assert repr(prepared) == f"PreparedClip(video, 8 frames, {tokens} tokens)"


def test_preload_leaves_nothing_to_load(compiled):
    loaded: list[str] = []
    captioner = intertitle.Captioner.load(compiled("av-qwen2"))
    captioner.preload(progress=lambda stage, *_: loaded.append(stage))
    assert loaded == ["load"] * 5  # vision, frame connector, connector, audio, decoder
    assert "load" not in captioner.caption(DEMO, decoding=SHORT).timings
    assert "load" in intertitle.Captioner.load(compiled("av-qwen2")).caption(DEMO, decoding=SHORT).timings
    staged = intertitle.Captioner.load(compiled("av-qwen2"), staged=True)
    staged.preload()
    assert staged.encoder._components == {}
    assert staged._loaded.decoder is not None


def test_what_happens_is_logged(compiled, tmp_path, caplog, eight):
    caplog.set_level(logging.DEBUG, "intertitle")
    with intertitle.Captioner.load(compiled("av-qwen2")) as captioner:
        captioner.caption(frames=eight[:1], decoding=intertitle.Decoding(contrast="temporal", max_new_tokens=4))
    said = [(each.name, each.levelname, each.getMessage()) for each in caplog.records]
    assert all(name.startswith("intertitle.runtime.") for name, _, _ in said)

    def found(level: str, words: str) -> bool:
        return any(level == each and words in message for _, each, message in said)

    assert found("INFO", f"opened {compiled('av-qwen2')} on cpu in ")
    assert found("DEBUG", "loaded vision.onnx in ")
    assert found("DEBUG", "loaded the decoder in ")
    assert found("INFO", "captioned: 4 tokens (length)")
    assert found("INFO", "closed ")
    # Not a record a token.
    assert len(said) < 15


# Threads and forks


def test_threads_share_a_captioner(listener, eight, slow_steps):
    clips = [eight, eight[::-1].copy(), np.roll(eight, 3, 0)]
    alone = [listener.caption(frames=clip, decoding=SHORT).token_ids for clip in clips]
    drawn = replace(SHORT, strategy="sample")
    sampled = [each.token_ids for each in listener.candidates(frames=eight, count=2, decoding=drawn)]

    def work(number: int) -> None:
        kind, which = number % 4, number % 3
        if kind == 0:
            assert listener.caption(frames=clips[which], decoding=SHORT).token_ids == alone[which]
        elif kind == 1:
            stream = listener.stream(frames=clips[which], decoding=SHORT)
            list(stream)
            assert stream.caption is not None
            assert stream.caption.token_ids == alone[which]
        elif kind == 2:
            assert [each.token_ids for each in listener.candidates(frames=eight, count=2, decoding=drawn)] == sampled
        else:
            results = list(listener.caption_batch([DEMO], audio=False, decoding=SHORT, isolate=False))
            assert [result.error for result in results] == [None]

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(12)]:
            future.result(timeout=120)


def test_an_open_stream_does_not_keep_others_out(listener, eight):
    with listener.stream(frames=eight, decoding=SHORT) as stream:
        next(stream)
        # This thread and another one.
        here = listener.caption(frames=eight, decoding=SHORT).token_ids
        with ThreadPoolExecutor(1) as pool:
            there = pool.submit(lambda: listener.caption(frames=eight, decoding=SHORT).token_ids).result(timeout=60)
        list(stream)
    assert stream.caption is not None
    assert here == there == stream.caption.token_ids


def test_a_call_waits_for_that_of_another_thread(listener, eight):
    inside, leave = threading.Event(), threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "decode" and done == 2:
            inside.set()
            leave.wait(30)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: listener.caption(frames=eight, decoding=SHORT, progress=progress))
        assert inside.wait(30)
        second = pool.submit(lambda: listener.caption(frames=eight, decoding=SHORT))
        time.sleep(0.2)
        assert not second.done()
        leave.set()
        assert first.result(60).token_ids == second.result(60).token_ids


_FORK = """
import os, sys, threading, time
from intertitle import Captioner, Decoding
captioner = Captioner.load(sys.argv[1], threads=2)
how = Decoding(max_new_tokens=3)
text = captioner.caption(sys.argv[2], audio=False, decoding=how).text
if "held" in sys.argv:
    # Another thread is in the middle of a call when the process forks.
    middle = threading.Event()
    def wait(*_):
        if not middle.is_set():
            middle.set()
            time.sleep(1)
    threading.Thread(target=captioner.caption, args=sys.argv[2:3], kwargs={"decoding": how, "progress": wait}).start()
    middle.wait()
child = os.fork()
if child == 0:
    if "caption" in sys.argv:
        assert captioner.caption(sys.argv[2], audio=False, decoding=how).text == text
    if "close" in sys.argv:
        captioner.close()
    del captioner
    sys.exit(7)
for _ in range(300):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(0 if os.waitstatus_to_exitcode(status) == 7 else 1)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("what", [["end"], ["caption", "held"], ["close"]])
def test_a_forked_child_ends(compiled, what):
    command = [sys.executable, "-c", _FORK, str(compiled("av-qwen2")), str(DEMO), *what]
    assert subprocess.run(command, timeout=90, check=False).returncode == 0


def test_a_gpu_is_not_taken_along_into_a_child(monkeypatch):
    guard = Guard(forks=False)
    with guard.use():
        pass
    monkeypatch.setattr(guard, "_process", -1)
    with pytest.raises(TargetError, match="forked child"), guard.use():
        pass
