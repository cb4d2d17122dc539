"""LLaVA-Video and LLaVA-NeXT-Video in the runtime: prompts token by token, bundles stage by stage, captions from frames
and from files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intertitle.cli import main
from intertitle.contract.pipeline import Ids, PromptLayout, Text, Tokens
from intertitle.errors import BundleError
from intertitle.export.compile import compile_bundle
from intertitle.models import open_checkpoint
from intertitle.models.llava_next_video import prompt as next_prompt
from intertitle.models.llava_video import prompt as video_prompt
from intertitle.runtime.backends import OrtBackend
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.decoding import Decoding
from intertitle.runtime.prompt import Slot, Timing, build_prompt, choose_pieces
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

FAMILIES = ("llava-video", "llava-next-video")
DEMO = Path(__file__).parents[2] / "calibration" / "clips" / "demo.mp4"
CLIPS = Path(__file__).parents[3] / "shared" / "media"

Numbers = Callable[[str], dict[str, np.ndarray]]


def ids_of(tokenizer: Tokenizer, layout: PromptLayout, instruction: str, timing: Timing | None, sentinel: int):
    count = 0 if timing is None else len(timing.times)
    built = build_prompt(tokenizer, choose_pieces(layout, timing), instruction, {"connector": count}, timing, count)
    return [token for part in built for token in ([sentinel] if isinstance(part, Slot) else part)]


def test_llava_video_prompt_ids(data_dir: Path, expected: Numbers) -> None:
    config, numbers = open_checkpoint(data_dir / "llava-video").config, expected("llava-video")
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    total, fps, *_ = numbers["clip"]
    timing = Timing(total / fps, numbers["frame_index"] / fps)
    layout = config.prompts["video"]
    for form, prefix in (("card", ""), ("demo", "demo.")):
        asked = layout if form == "card" else video_prompt.layouts(timed=True, newline=None, form="demo")["video"]
        wanted = numbers[f"{prefix}prompt_ids"].tolist()
        assert ids_of(tokenizer, asked, config.default_instruction, timing, -200) == wanted
    untimed = ids_of(tokenizer, layout, config.default_instruction, None, -200)
    assert untimed == numbers["untimed.prompt_ids"].tolist()


def test_llava_video_newline_behind_the_clip_is_a_token_of_the_prompt(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    layout = video_prompt.layouts(timed=False, newline=439)["video"]
    ids = ids_of(tokenizer, layout, "x", None, -200)
    assert ids[ids.index(-200) + 1] == 439
    without = ids_of(tokenizer, video_prompt.layouts(timed=False, newline=None)["video"], "x", None, -200)
    assert [token for token in ids if token != 439] == without


def test_llava_next_video_prompt_ids(data_dir: Path, expected: Numbers) -> None:
    config, numbers = open_checkpoint(data_dir / "llava-next-video").config, expected("llava-next-video")
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-next-video/tokenizer.json"))
    ids = ids_of(tokenizer, config.prompts["video"], config.default_instruction, None, 320)
    assert ids == numbers["prompt_ids"].tolist()


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_text_behind_a_tag_is_tokenized_as_in_the_whole_text(scheme: str) -> None:
    """The tokenizer of a Vicuna may put a space in front of the first word of a text only."""
    alphabet = sorted({*"▁USER:\nWhatisthis?ATNquestion<video>"})
    vocab = {"<unk>": 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens([AddedToken("<video>", special=True, normalized=False)])
    question = "What is this?"
    whole = tokenizer.encode(f"USER: <video>\n{question} ASSISTANT:", add_special_tokens=False).ids
    tag = tokenizer.token_to_id("<video>")
    layout = next_prompt.layouts(bos=0)["video"]
    assert ids_of(tokenizer, layout, question, None, tag) == [0, *whole]
    apart = [0, *tokenizer.encode("USER: ", add_special_tokens=False).ids, tag]
    apart += tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False).ids
    assert (apart == [0, *whole]) == (scheme != "first")


def test_a_tag_that_is_no_token_is_refused(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data_dir / "llava-video/tokenizer.json"))
    with pytest.raises(BundleError, match="'<video>', which the prompt names"):
        build_prompt(tokenizer, (Ids((1,)), Tokens("connector"), Text("x", behind="<video>")), "", {})


# --- bundles


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def greedy(numbers: dict[str, np.ndarray], name: str = "video.greedy_tokens", penalty: float = 1.0) -> Decoding:
    return Decoding(repetition_penalty=penalty, max_new_tokens=len(numbers[name]))


def frames_of(name: str, numbers: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fixture's clip as the arguments of ``caption``."""
    given: dict[str, Any] = {"frames": numbers["frames_uint8"]}
    if name == "llava-video":
        given |= {"frame_times": numbers["frame_index"] / numbers["clip"][1], "seconds": float(numbers["video_time"])}
    return given


@pytest.mark.parametrize(("target", "weights", "bound"), [("cpu", "fp32", 1e-4), ("cuda", "fp16", 1e-2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_of_a_bundle(
    name: str, target: str, weights: str, bound: float, compiled: Callable[..., Path], expected: Numbers
) -> None:
    bundle, numbers = Bundle.open(compiled(name, weights, target)), expected(name)
    backend = OrtBackend(bundle)
    (features,) = (backend.component("vision", "vision.onnx")(numbers["pixel_values"]),)
    assert relative_error(features, numbers["vision_features"]) < bound
    tokens = backend.component("connector", "connector.onnx")(numbers["vision_features"])
    wanted = numbers["visual_tokens" if name == "llava-video" else "video_tokens"]
    assert relative_error(tokens.reshape(wanted.shape), wanted) < bound
    embeds = numbers["video.inputs_embeds"]
    logits = backend.decoder().open(1, len(embeds) + 8).prefill(0, embeds)
    assert relative_error(logits[0], numbers["video.last_logits"]) < bound


@pytest.mark.parametrize(("target", "weights"), [("cpu", "fp32"), ("cuda", "fp16")])
@pytest.mark.parametrize("name", FAMILIES)
def test_captions_of_frames_are_the_reference_s(
    name: str, target: str, weights: str, compiled: Callable[..., Path], expected: Numbers
) -> None:
    numbers, captioner = expected(name), Captioner.load(compiled(name, weights, target))
    clip = frames_of(name, numbers)
    caption = captioner.caption(**clip, decoding=greedy(numbers))
    assert caption.token_ids == numbers["video.greedy_tokens"].tolist()
    assert caption.prompt_tokens == len(numbers["video.inputs_embeds"])
    assert caption.notes == []
    if name == "llava-video":
        own = captioner.caption(**clip, decoding=Decoding(max_new_tokens=32))
        assert own.token_ids == numbers["video.generate_tokens"].tolist()
        # Frames without times: the prompt without the sentence.
        untimed = captioner.caption(frames=numbers["frames_uint8"], decoding=greedy(numbers, "untimed.greedy_tokens"))
        assert untimed.token_ids == numbers["untimed.greedy_tokens"].tolist()


def changed(data_dir: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(data_dir / "llava-video", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_average_pooling_in_a_bundle(data_dir: Path, tmp_path: Path, expected: Numbers) -> None:
    numbers = expected("llava-video")
    checkpoint = changed(data_dir, tmp_path / "average", mm_spatial_pool_mode="average")
    compile_bundle(checkpoint, tmp_path / "bundle", weights="fp32")
    caption = Captioner.load(tmp_path / "bundle").caption(
        **frames_of("llava-video", numbers), decoding=greedy(numbers, "average.greedy_tokens")
    )
    assert caption.token_ids == numbers["average.greedy_tokens"].tolist()


@pytest.mark.parametrize("place", ["frame", "one_token"])
def test_newline_in_a_bundle(place: str, data_dir: Path, tmp_path: Path, expected: Numbers) -> None:
    """No number of the original is at hand: what the decoder gets is put together from its tensors by hand."""
    numbers = expected("llava-video")
    checkpoint = changed(data_dir, tmp_path / "changed", mm_newline_position=place)
    compile_bundle(checkpoint, tmp_path / "bundle", weights="fp32")
    captioner = Captioner.load(tmp_path / "bundle")
    opened = open_checkpoint(checkpoint)
    pooled, newline = numbers["pooled_features"], opened.checkpoint.tensor("model.image_newline").numpy()
    blocks = [*pooled] if place == "one_token" else [np.concatenate((frame, newline[None])) for frame in pooled]
    tokens = np.concatenate([*blocks, newline[None]] if place == "one_token" else blocks)
    ids = numbers["prompt_ids"]
    (at,) = np.flatnonzero(ids == -200)
    table = opened.checkpoint.tensor("model.embed_tokens.weight").numpy()
    embeds = np.concatenate((table[ids[:at]], tokens, table[ids[at + 1 :]]))
    caption = captioner.caption(
        **frames_of("llava-video", numbers), decoding=Decoding(max_new_tokens=12, repetition_penalty=1.0)
    )
    assert caption.prompt_tokens == len(embeds)
    decoder, cache = opened.load("decoder"), []
    found: list[int] = []
    with torch.no_grad():
        x = torch.from_numpy(embeds)
        while len(found) < 12:
            # The whole text again for each token: no cache to be wrong about.
            last, cache = len(x) - 1, decoder.empty_cache(1, len(x))
            inputs = x[None], torch.tensor([last]).int(), torch.tensor(len(x)).int(), torch.tensor([[last]])
            found.append(int(decoder(*inputs, cache)[0].argmax()))
            x = torch.cat((x, torch.from_numpy(table[found[-1]])[None]))
    assert caption.token_ids == found


@pytest.mark.parametrize(("target", "weights"), [("cpu", "fp32"), ("cpu", "int4"), ("cuda", "fp16"), ("cuda", "int4")])
@pytest.mark.parametrize("name", FAMILIES)
def test_bundles_verify(name: str, target: str, weights: str, compiled: Callable[..., Path], data_dir: Path) -> None:
    from intertitle.calibration.verify import verify_bundle

    media = [DEMO, *sorted(CLIPS.glob("*.mp4"))][:2]
    report = verify_bundle(compiled(name, weights, target), data_dir / name, media, max_new_tokens=6)
    assert report.first_divergent is None
    # float16 may take the other of two tokens that are almost equally likely.
    assert report.verdict in {"cpu": ("PASS",), "cuda": ("PASS", "AMBIGUOUS")}[target]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_through_the_command(
    name: str, compiled: Callable[..., Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clip = next(iter(sorted(CLIPS.glob("*.mp4"))), DEMO)
    assert main(["caption", str(compiled(name)), str(clip), "--max-new-tokens", "6", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    captioner = Captioner.load(compiled(name))
    assert record["token_ids"] == captioner.caption(clip, decoding=Decoding(max_new_tokens=6)).token_ids
    if name == "llava-video":
        read = captioner.read(clip)
        assert read.timing is not None
        assert read.order is not None
        assert len(read.timing.times) == len(read.order) == 64
        spoken = captioner.caption(clip, decoding=Decoding(max_new_tokens=1)).prompt_tokens
        still = captioner.caption(frames=read.frames, decoding=Decoding(max_new_tokens=1)).prompt_tokens
        assert spoken > still
