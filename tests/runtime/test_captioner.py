"""The public class over compiled fixtures: modes, arrays, streaming, scoring, what is said about substitutions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import intertitle
import numpy as np
import pytest
from intertitle.errors import BundleError, MediaError, OptionError, TargetError
from intertitle.runtime.timing import Stages

SHORT = intertitle.Decoding(max_new_tokens=10)
DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"


@pytest.fixture(scope="module")
def listener(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("av-qwen2"))


@pytest.fixture(scope="module")
def per_frame(compiled) -> intertitle.Captioner:
    return intertitle.Captioner.load(compiled("auroracap-keep"))


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "clip-mixtral", "auroracap-keep"])
def test_frames_to_tokens_as_the_reference(variant, compiled, expected):
    """From raw frames on: preprocessing, towers, connector, prompt, decoding, all the runtime's own."""
    numbers, mode = expected(variant), "" if variant == "auroracap-keep" else "video."
    tokens = numbers[f"{mode}greedy_tokens"].tolist()
    caption = intertitle.Captioner.load(compiled(variant)).caption(
        frames=numbers["frames_uint8"], decoding=intertitle.Decoding(max_new_tokens=len(tokens))
    )
    assert caption.token_ids == tokens
    assert caption.finish_reason == ("stop" if caption.token_ids[-1] == 2 else "length")


def test_frames_and_sound_to_tokens_as_the_reference(listener, expected):
    numbers = expected("av-qwen2")
    caption = listener.caption(
        frames=numbers["frames_uint8"],
        waveform=numbers["audio_int16"],
        sample_rate=16000,
        decoding=intertitle.Decoding(max_new_tokens=48),
    )
    assert caption.mode == "audiovideo"
    assert caption.token_ids == numbers["audiovideo.greedy_tokens"].tolist()


def test_sound_to_tokens_as_the_reference(listener, expected):
    numbers = expected("av-qwen2")
    caption = listener.caption(
        waveform=numbers["audio_int16"], sample_rate=16000, decoding=intertitle.Decoding(max_new_tokens=48)
    )
    assert caption.mode == "audio"
    assert caption.token_ids == numbers["audio.greedy_tokens"].tolist()


def test_a_video_file_with_sound(listener):
    caption = listener.caption(DEMO, decoding=SHORT)
    assert caption.mode == "audiovideo"
    assert caption.notes == []
    assert caption.seconds == pytest.approx(5, abs=0.2)
    assert len(caption.token_ids) == len(caption.token_logprobs) == 10
    assert caption.mean_logprob == pytest.approx(np.mean(caption.token_logprobs))
    stages = [
        "open",
        "read_frames",
        "read_audio",
        "preprocess",
        "fbank",
        "vision",
        "frame_connector",
        "connector",
        "audio",
        "prefill",
        "decode",
    ]
    assert [stage for stage in caption.timings if stage != "load"] == stages
    assert all(seconds >= 0 for seconds in caption.timings.values())
    # Sound changes what is computed; leaving it out is the video prompt.
    silent = listener.caption(DEMO, audio=False, decoding=SHORT)
    assert silent.mode == "video"
    assert silent.token_ids != caption.token_ids
    assert silent.prompt_tokens == caption.prompt_tokens - 1496


def test_the_file_and_its_arrays_give_the_same_caption(listener):
    with av.open(str(DEMO)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    from_file = listener.caption(DEMO, audio=False, decoding=SHORT)
    assert listener.caption(frames=frames, decoding=SHORT).token_ids == from_file.token_ids


def test_an_image_is_a_still_clip(listener, per_frame, expected, tmp_path):
    frame = expected("av-qwen2")["frames_uint8"][3]
    picture = tmp_path / "picture.png"
    write_image(picture, frame)
    still = listener.caption(frames=np.repeat(frame[np.newaxis], 8, 0), decoding=SHORT)
    assert listener.caption(picture, decoding=SHORT).token_ids == still.token_ids
    assert listener.caption(frames=frame[np.newaxis], decoding=SHORT).token_ids == still.token_ids
    # AuroraCap has a block for each frame: an image is one.
    one = per_frame.caption(picture, decoding=SHORT)
    eight = per_frame.caption(frames=np.repeat(frame[np.newaxis], 8, 0), decoding=SHORT)
    assert eight.prompt_tokens > 7 * (one.prompt_tokens - 40)
    assert one.prompt_tokens < eight.prompt_tokens


def test_a_video_without_sound_says_so(listener, tmp_path):
    silent = tmp_path / "silent.mp4"
    write_silent_video(silent)
    caption = listener.caption(silent, decoding=SHORT)
    assert caption.mode == "video"
    assert any("no audio track" in note for note in caption.notes)
    assert listener.caption(silent, audio=False, decoding=SHORT).notes == []


def test_sound_alone(listener, per_frame):
    random = np.random.default_rng(0)
    long = (random.standard_normal(40 * 8000) * 0.1).astype(np.float32)
    caption = listener.caption(waveform=long, sample_rate=8000, decoding=SHORT)
    assert caption.mode == "audio"
    assert any("first 30 s" in note for note in caption.notes)
    head = listener.caption(waveform=long[: 30 * 8000], sample_rate=8000, decoding=SHORT)
    assert head.token_ids == caption.token_ids
    assert head.notes == []
    with pytest.raises(OptionError, match="no audio branch"):
        per_frame.caption(waveform=long, sample_rate=8000)


def test_streamed_pieces_are_the_caption(listener):
    with listener.stream(DEMO, decoding=SHORT) as pieces:
        assert pieces.caption is None
        text = "".join(pieces)
    assert pieces.caption is not None
    assert text == pieces.caption.text == listener.caption(DEMO, decoding=SHORT).text


def test_closing_a_stream_stops_the_generation(listener):
    reports = []
    stream = listener.stream(
        DEMO, decoding=intertitle.Decoding(max_new_tokens=2000), progress=lambda *r: reports.append(r)
    )
    next(stream)
    stream.close()
    generated = [done for stage, done, _ in reports if stage == "decode"]
    assert max(generated) < 50
    assert stream.caption is not None
    assert stream.caption.finish_reason == "closed"
    assert len(stream.caption.token_ids) == max(generated)
    assert list(stream) == []


def test_stop_string_ends_the_text_before_it(listener):
    whole = listener.caption(DEMO, audio=False, decoding=SHORT)
    assert len(whole.text) >= 4
    stop = whole.text[2:4]
    cut = listener.caption(DEMO, audio=False, decoding=intertitle.Decoding(max_new_tokens=10, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop_string"


def test_the_prompt_reaches_the_decoder(listener):
    plain, asked = (
        listener.caption(DEMO, audio=False, prompt=p, decoding=SHORT) for p in (None, "What is heard? " * 5)
    )
    assert asked.prompt_tokens > plain.prompt_tokens
    default = listener.caption(DEMO, audio=False, prompt="Describe the video in detail.", decoding=SHORT)
    assert default.token_ids == plain.token_ids


@pytest.mark.parametrize("variant", ["clip-mistral", "av-qwen2"])
def test_score_is_the_mean_likelihood_of_the_caption_itself(variant, compiled, expected):
    """Teacher-forced in one pass, a greedy caption scores what its own steps scored."""
    captioner = intertitle.Captioner.load(compiled(variant))
    frames = expected(variant)["frames_uint8"]
    caption = captioner.caption(frames=frames, decoding=intertitle.Decoding(max_new_tokens=12))
    ids = captioner.tokenizer.encode(caption.text, add_special_tokens=False).ids
    score = captioner.score(text=caption.text, frames=frames)
    stepwise = by_steps(captioner, frames, [*ids, 2])
    assert score == pytest.approx(np.mean(stepwise), abs=1e-4)
    assert captioner.score(text="", frames=frames) == pytest.approx(by_steps(captioner, frames, [2])[0], abs=1e-4)


def by_steps(captioner: intertitle.Captioner, frames: np.ndarray, ids: list[int]) -> list[float]:
    stages = Stages()
    encoded = captioner.encoder.encode(captioner.read(frames=frames), stages)
    embeds = captioner.encoder.prompt_embeds(encoded, captioner.manifest.default_instruction)
    inference = captioner.open_inference(len(embeds) + len(ids))
    logits, values = inference.prefill(0, embeds)[0], []
    for token in ids:
        wide = logits.astype(np.float64)
        values.append(wide[token] - np.log(np.exp(wide - wide.max()).sum()) - wide.max())
        logits = inference.step(np.array([token]))[0]
    return values


def test_sampling_follows_its_seed(listener):
    def sample(seed: int) -> list[int]:
        how = intertitle.Decoding(strategy="sample", temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=10, seed=seed)
        return listener.caption(DEMO, audio=False, decoding=how).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_arguments_that_do_not_go_together(listener):
    frames = np.zeros((8, 20, 20, 3), np.uint8)
    with pytest.raises(OptionError, match="not both"):
        listener.caption(DEMO, frames=frames)
    with pytest.raises(OptionError, match="either a file or arrays"):
        listener.caption()
    with pytest.raises(OptionError, match="sample_rate"):
        listener.caption(waveform=np.zeros(16000, np.float32))
    with pytest.raises(MediaError, match="uint8"):
        listener.caption(frames=frames.astype(np.float32))
    with pytest.raises(OptionError, match="context"):
        listener.caption(frames=frames, decoding=intertitle.Decoding(max_new_tokens=5000))
    with pytest.raises(TargetError, match="tpu"):
        intertitle.Captioner.load(listener.bundle.path, device="tpu")
    with pytest.raises(BundleError, match="nowhere"):
        intertitle.Captioner.load("nowhere")


def test_a_context_that_is_full_shortens_the_default_limit(listener):
    """The checkpoint wishes for 2048 new tokens; the fixture's context of 4096 has room for them, a long prompt not."""
    words = "word " * 600
    caption = listener.caption(frames=np.zeros((8, 20, 20, 3), np.uint8), prompt=words, decoding=intertitle.Decoding())
    assert caption.prompt_tokens + len(caption.token_ids) <= 4096
    with pytest.raises(OptionError, match="context is 4096"):
        listener.caption(frames=np.zeros((8, 20, 20, 3), np.uint8), prompt=words * 3)


def test_threads_and_processes_agree(compiled, listener):
    """Another process, one thread: the same tokens."""
    bundle = compiled("av-qwen2")
    code = (
        f"import intertitle; c = intertitle.Captioner.load({str(bundle)!r}, threads=1);"
        f"print(c.caption({str(DEMO)!r}, decoding=intertitle.Decoding(max_new_tokens=10)).token_ids)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(listener.caption(DEMO, decoding=SHORT).token_ids)


def write_image(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path)


def write_silent_video(path: Path, count: int = 20) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(count):
            picture = np.full((48, 64, 3), index * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
