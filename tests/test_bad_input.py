"""What users do to a captioner: broken clips, checkpoints, bundles and disks.

Each goes through the command: one clear line on stderr that names the culprit, exit code 2, nothing half-written. What
is only unusual (one frame, odd sizes, a turned phone, a variable frame rate) is captioned, as the same frames are from
a folder of images.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from intertitle.calibration.render import Background, Scene, write_clip
from intertitle.cli import DEMO_CLIP, main
from safetensors.torch import load_file, save_file

Compiled = Callable[..., Path]


class Command:
    """The command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def run(self, *arguments: object) -> tuple[int, str, list[str]]:
        """Exit code, stdout and the lines of stderr."""
        self._capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return code, out, err.splitlines()

    def refusal(self, *arguments: object) -> str:
        """The one line with which bad input is refused."""
        code, out, lines = self.run(*arguments, "-q")
        assert (code, out) == (2, "")
        (line,) = lines
        assert line.startswith("intertitle: ")
        assert line.isprintable()
        return line

    def tokens(self, *arguments: object) -> list[int]:
        """The greedy tokens of a clip that is captioned without its sound."""
        code, out, _ = self.run(*arguments, "--json", "-q", "--no-audio", "--max-new-tokens", 16)
        assert code == 0
        return json.loads(out)["token_ids"]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


# --- clips that cannot be captioned


def cut_off(path: Path) -> Path:
    """The demo clip has its index at its end."""
    content = DEMO_CLIP.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def text(path: Path) -> Path:
    path.write_text("This is not a video, whatever its name says.\n" * 50)
    return path


def box(kind: bytes, content: bytes) -> bytes:
    """ISO 14496-12, 4.2."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def no_tracks(path: Path) -> Path:
    """An MP4 file with a header and nothing else."""
    header = struct.pack(">5II", 0, 0, 0, 1000, 0, 0x10000) + bytes(76)
    path.write_bytes(box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"mvhd", header)))
    return path


def no_frames(path: Path) -> Path:
    """A video track in which no frame was ever recorded."""
    path.write_bytes(b"YUV4MPEG2 W64 H48 F25:1 C420jpeg\n")
    return path


def noise(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    return path


def broken_picture(path: Path) -> Path:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    return path


def folder_without_images(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("nothing to see")
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


BAD_CLIPS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (cut_off, "an incomplete MP4 or MOV file"),
    "zero bytes": (empty, "the file is empty"),
    "text renamed": (text, "not a video, sound or image file of a known format"),
    "no video and no audio": (no_tracks, "holds neither video nor sound"),
    "no frames": (no_frames, "the video has no frames"),
    "noise": (noise, "not a video, sound or image file of a known format"),
    "broken picture": (broken_picture, "the image is damaged"),
    "folder without images": (folder_without_images, "the folder holds no images"),
    "pipe": (pipe, "is a pipe or a device"),
    "missing": (lambda path: path, "no such file or folder"),
}


@pytest.mark.parametrize("kind", BAD_CLIPS)
def test_a_clip_that_cannot_be_captioned(kind: str, compiled: Compiled, command: Command, tmp_path: Path):
    make, reason = BAD_CLIPS[kind]
    clip = make(tmp_path / "clip.mp4")
    line = command.refusal("caption", compiled("av-qwen2"), clip)
    assert line.startswith(f"intertitle: {clip}: {reason}")


def test_a_clip_that_may_not_be_read(
    compiled: Compiled, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clip, opened = text(tmp_path / "clip.mp4"), Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == clip:  # Root may read anything.
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    line = command.refusal("caption", compiled("av-qwen2"), clip)
    assert line == f"intertitle: {clip}: cannot be read (Permission denied)"


def test_sound_for_a_captioner_without_ears(compiled: Compiled, command: Command, tmp_path: Path):
    sound = tmp_path / "sound.wav"
    samples = np.zeros(8000, "<i2").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 8000, 16_000, 2, 16)
    sound.write_bytes(header + struct.pack("<4sI", b"data", len(samples)) + samples)
    line = command.refusal("caption", compiled("clip-mistral"), sound)
    assert line == f"intertitle: {sound}: holds only sound, and this captioner has no audio branch"
    line = command.refusal("caption", compiled("av-qwen2"), sound, "--no-audio")
    assert line == f"intertitle: {sound}: holds only sound, and sound was switched off"


def test_a_bad_clip_does_not_stop_the_others(compiled: Compiled, command: Command, tmp_path: Path):
    bundle, bad, missing = compiled("av-qwen2"), text(tmp_path / "bad.mp4"), tmp_path / "missing.mp4"
    options = ["-q", "--no-audio", "--max-new-tokens", 4]
    alone = command.run("caption", bundle, DEMO_CLIP, *options)[1]
    code, out, lines = command.run("caption", bundle, bad, DEMO_CLIP, missing, DEMO_CLIP, *options)
    assert code == 2
    line = alone.removesuffix("\n").replace("\n", " ")
    assert out == f"{DEMO_CLIP}\t{line}\n" * 2
    assert [line.split(": ")[:2] for line in lines] == [["intertitle", str(bad)], ["intertitle", str(missing)]]
    code, out, lines = command.run("caption", bundle, missing, DEMO_CLIP, *options, "--json")
    assert (code, len(lines)) == (2, 1)
    assert json.loads(out)["file"] == str(DEMO_CLIP)


# --- clips that are only unusual


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str = "ffv1", times: Sequence[int] = ()) -> Path:
    """A video without loss, 5 frames a second or at the given milliseconds."""
    pix_fmt = "bgr0" if codec == "ffv1" else "rgb24"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=5)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format=pix_fmt)
            picture.pts, picture.time_base = (times[index], Fraction(1, 1000)) if times else (index, Fraction(1, 5))
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_pictures(folder: Path, frames: Sequence[np.ndarray]) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for index, frame in enumerate(frames):
        image.fromarray(frame).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def frames(expected: Callable[[str], dict[str, np.ndarray]]) -> list[np.ndarray]:
    return list(expected("av-qwen2")["frames_uint8"])


@pytest.mark.parametrize("variant", ["av-qwen2", "auroracap-keep"])
def test_a_video_of_one_frame_is_captioned(
    variant: str, frames: list[np.ndarray], compiled: Compiled, command: Command, tmp_path: Path
):
    """By repeating the frame, as a picture of it eight times does."""
    video = write_video(tmp_path / "one.mkv", frames[2:3])
    eight = write_pictures(tmp_path / "eight", [frames[2]] * 8)
    assert command.tokens("caption", compiled(variant), video) == command.tokens("caption", compiled(variant), eight)


@pytest.mark.parametrize("size", [(33, 27), (1, 1), (200, 3)], ids=str)
def test_odd_sizes(size: tuple[int, int], compiled: Compiled, command: Command, tmp_path: Path):
    """Width and height that no codec's blocks divide, and that no model was trained on."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, size[1], size[0], 3)).astype(np.uint8)
    video, folder = write_video(tmp_path / "odd.mkv", list(pixels)), write_pictures(tmp_path / "odd", list(pixels))
    for variant in ("av-qwen2", "clip-mistral"):
        bundle = compiled(variant)
        assert command.tokens("caption", bundle, video) == command.tokens("caption", bundle, folder)


def test_a_video_from_a_turned_phone(frames: list[np.ndarray], compiled: Compiled, command: Command, tmp_path: Path):
    """The file says: turn a quarter clockwise (its matrix takes right to down). Players do, and so must a captioner."""
    video = write_video(tmp_path / "phone.mov", frames, "png")
    lying = command.tokens("caption", compiled("av-qwen2"), video)
    content = bytearray(video.read_bytes())
    place = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: the matrix, 16.16
    content[place : place + 20] = struct.pack(">5i", 0, 1 << 16, 0, -1 << 16, 0)
    video.write_bytes(content)
    turned = write_pictures(tmp_path / "turned", [np.rot90(frame, -1) for frame in frames])
    tokens = command.tokens("caption", compiled("av-qwen2"), video)
    assert tokens == command.tokens("caption", compiled("av-qwen2"), turned)
    assert tokens != lying


def test_a_variable_frame_rate(frames: list[np.ndarray], compiled: Compiled, command: Command, tmp_path: Path):
    """The models count frames, whatever their times."""
    moments = [0, 10, 20, 400, 410, 2000, 2005, 2500, 2501, 2502, 2600, 9000, 9100]
    many = [np.roll(frame, shift, 1) for shift in (0, 40) for frame in frames][: len(moments)]
    video, folder = (
        write_video(tmp_path / "vfr.mkv", many, times=moments),
        write_pictures(tmp_path / "all", many),
    )
    assert command.tokens("caption", compiled("av-qwen2"), video) == command.tokens(
        "caption", compiled("av-qwen2"), folder
    )


def test_what_is_left_of_a_recording_that_was_cut_off(compiled: Compiled, command: Command, tmp_path: Path):
    """Matroska needs no index: the frames before the cut are captioned, as they are from a folder."""
    pixels = list(np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3)).astype(np.uint8))
    whole = write_video(tmp_path / "whole.mkv", pixels)
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    assert places[12] is not None
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: places[12] + 30])
    left = write_pictures(tmp_path / "left", pixels[:12])
    assert command.tokens("caption", compiled("av-qwen2"), cut) == command.tokens("caption", compiled("av-qwen2"), left)


def test_a_clip_of_less_than_a_moment(compiled: Compiled, command: Command, tmp_path: Path):
    """Two frames of H.264, and sound that is too short for one window of the filter bank."""
    clip = tmp_path / "short.mp4"
    write_clip(Scene((64, 48), 25, 0.08, Background()), clip)
    code, out, lines = command.run("caption", compiled("av-qwen2"), clip, "-q", "--json", "--max-new-tokens", 2)
    assert code == 0
    assert len(lines) == len(json.loads(out)["notes"]) == 2
    assert any("only 2 frames for 8 places" in line for line in lines)


# --- bundles


@pytest.fixture
def bundle(compiled: Compiled, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(compiled("av-qwen2"), tmp_path / "bundle"))


def test_a_flipped_byte_in_any_file_of_a_bundle(bundle: Path, command: Command):
    assert command.run("info", bundle, "-q")[0] == 0
    for file in sorted(bundle.iterdir()):
        whole = file.read_bytes()
        # In bundle.json the first byte of a hash.
        place = whole.index(b'"sha256"') + 11 if file.name == "bundle.json" else len(whole) // 2
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        arguments = ["caption", bundle, DEMO_CLIP] if file.name == "decoder.ort.onnx.data" else ["info", bundle]
        line = command.refusal(*arguments)
        assert line.startswith(f"intertitle: {bundle}")
        assert file.name in line
        file.write_bytes(whole)
    assert command.run("info", bundle, "-q")[0] == 0


def test_bundles_that_are_not_whole(bundle: Path, command: Command, tmp_path: Path):
    moved = bundle / "embedding.bin"
    moved.rename(tmp_path / "aside")
    assert "'embedding.bin' is missing" in command.refusal("caption", bundle, DEMO_CLIP)
    moved.symlink_to(tmp_path / "aside")
    assert "is a symbolic link" in command.refusal("caption", bundle, DEMO_CLIP)
    moved.unlink()
    (tmp_path / "aside").rename(moved)
    with moved.open("r+b") as file:
        file.truncate(100)
    assert "has 100 bytes, expected" in command.refusal("info", bundle)
    (bundle / "bundle.json").write_text("{")
    assert "not a bundle manifest" in command.refusal("info", bundle)
    (bundle / "bundle.json").unlink()
    assert "there is no bundle.json in it" in command.refusal("verify", bundle, "--reference", tmp_path)


def test_bundle_and_clip_in_the_wrong_order(bundle: Path, command: Command):
    assert "not a directory; a bundle is the directory that" in command.refusal("caption", DEMO_CLIP, bundle)


# --- checkpoints


@pytest.fixture
def checkpoint(data_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(data_dir / "clip-mistral", tmp_path / "checkpoint"))


def change_tensors(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(checkpoint: Path, **settings: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


NORM = "model.layers.1.input_layernorm.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.extra"] = torch.zeros(3)


def lengthen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.ones(129)


def cut_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def break_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')


def drop_tokenizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown family": (lambda path: change_config(path, model_type="llava"), "model_type 'llava' is not a captioner"),
    "missing tensor": (lambda path: change_tensors(path, drop), f"the tensor {NORM} is missing"),
    "extra tensor": (lambda path: change_tensors(path, add), "the tensor model.layers.9.extra is not part of"),
    "wrong shape": (lambda path: change_tensors(path, lengthen), f"the tensor {NORM} is [129], but the config asks"),
    "wrong config": (lambda path: change_config(path, num_hidden_layers=4), "model.layers.3."),
    "truncated weights": (cut_weights, "model.safetensors"),
    "broken config": (break_json, "config.json"),
    "no tokenizer": (drop_tokenizer, "tokenizer"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no model weights"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_compiled(kind: str, checkpoint: Path, command: Command, tmp_path: Path):
    damage, reason = BAD_CHECKPOINTS[kind]
    damage(checkpoint)
    line = command.refusal("compile", checkpoint, "-o", tmp_path / "bundle")
    assert str(checkpoint) in line
    assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tensor_with_a_nan(checkpoint: Path, command: Command, tmp_path: Path):
    """Found when its turn to be written comes, and nothing of what was written before is left."""
    name = "model.layers.2.mlp.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5, 7] = float("nan")

    change_tensors(checkpoint, spoil)
    line = command.refusal("compile", checkpoint, "-o", tmp_path / "bundle")
    assert line == f"intertitle: {checkpoint}: the tensor {name} holds NaN or infinite values"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_adapter_for_another_base(data_dir: Path, command: Command, tmp_path: Path):
    lora = data_dir / "clip-mistral-lora"
    for base in ("av-qwen2", "auroracap"):
        line = command.refusal("compile", data_dir / base, "-o", tmp_path / "bundle", "--adapter", lora)
        assert re.match(rf"intertitle: {re.escape(str(lora))} was trained on a videollama2_mistral model", line)
    line = command.refusal("compile", lora, "-o", tmp_path / "bundle")
    assert line.startswith(f"intertitle: {lora} has no model weights")
    line = command.refusal("compile", data_dir / "clip-mistral", "-o", tmp_path / "bundle", "--adapter", data_dir)
    assert str(data_dir) in line
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_is_another_model(compiled: Compiled, data_dir: Path, command: Command):
    for other, difference in [("av-qwen2", "not the same model"), ("auroracap", "the reference a auroracap one")]:
        assert difference in command.refusal("verify", compiled("clip-mistral"), "--reference", data_dir / other)


# --- disks and kills


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``mount("size=1m")``: a file system of its own, where root may have one."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(line, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_disk(mount: Callable[[str], Path], compiled: Compiled, data_dir: Path, command: Command):
    disk = mount("ro")
    line = command.refusal("compile", data_dir / "clip-mistral", "-o", disk / "bundle")
    assert line == f"intertitle: {disk / 'bundle'}: cannot write a bundle there: no permission to write in {disk}"
    line = command.refusal("caption", compiled("av-qwen2"), DEMO_CLIP, "--srt", disk / "a.srt")
    assert line == f"intertitle: {disk / 'a.srt'}: cannot be written: no permission to write there"
    line = command.refusal("verify", compiled("av-qwen2"), "--reference", data_dir, "--json", disk / "a.json")
    assert "a.json: cannot be written: no permission" in line


def test_a_full_disk_for_subtitles(mount: Callable[[str], Path], compiled: Compiled, command: Command):
    disk = mount("size=64k")
    srt, filler = disk / "a.srt", disk / "filler"
    before = "1\n00:00:00,000 --> 00:00:01,000\nwhat was there before\n"
    srt.write_text(before)
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    options = ["--no-audio", "--max-new-tokens", 2, "-q", "--srt", srt]
    code, out, (line,) = command.run("caption", compiled("av-qwen2"), DEMO_CLIP, *options)
    assert code == 2
    assert out  # The caption itself is not lost.
    assert line == f"intertitle: {srt}: cannot be written: No space left on device"
    assert srt.read_text() == before
    assert sorted(path.name for path in disk.iterdir()) == ["a.srt", "filler"]


@pytest.mark.slow
def test_a_disk_that_is_too_small(mount: Callable[[str], Path], data_dir: Path, command: Command):
    small = mount("size=1m")
    line = command.refusal("compile", data_dir / "clip-mistral", "-o", small / "bundle")
    assert re.search(r"bundle: the bundle takes about \d\.\d MB, but only \d\.\d MB are free on that disk$", line)
    assert list(small.iterdir()) == []


def test_a_disk_that_fills_up(
    mount: Callable[[str], Path], data_dir: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    disk = mount("size=40m")

    def fill(self: object, stage: str, done: int, total: int) -> None:
        filler = disk / "filler"
        if stage == "writing connector" and not filler.exists():
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(60 << 20))

    monkeypatch.setattr("intertitle.console.ProgressDisplay.__call__", fill)
    line = command.refusal("compile", data_dir / "clip-mistral", "-o", disk / "bundle")
    assert re.search(r"the disk is full \(No space left on device\): 'connector.onnx.data' could not be written", line)
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_limit_on_file_sizes(data_dir: Path, command: Command, tmp_path: Path):
    """``ulimit -f`` cuts a file short like a full disk, and needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        line = command.refusal("compile", data_dir / "clip-mistral", "-o", tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"the disk is full \(File too large\): '[a-z.]+\.data' could not be written", line)
    assert list(tmp_path.iterdir()) == []


#: The command, which stays where it begins to write the decoder if it is told to.
COMPILE = """
import sys, time
from intertitle.cli import main
from intertitle.console import ProgressDisplay

def pausing(self, stage, done, total, report=ProgressDisplay.__call__):
    report(self, stage, done, total)
    if stage == "writing decoder" and sys.argv[1] == "pause":
        time.sleep(60)

ProgressDisplay.__call__ = pausing
sys.exit(main(["compile", *sys.argv[2:]]))
"""


def start_compiling(checkpoint: Path, output: Path, pause: bool = False) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-c", COMPILE, "pause" if pause else "go", str(checkpoint), "-o", str(output)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def check_compiles(command: Command, checkpoint: Path, output: Path) -> None:
    """After whatever happened before, a compilation succeeds and leaves nothing but its bundle."""
    assert command.run("compile", checkpoint, "-o", output, "-q")[0] == 0
    assert command.run("info", output, "-q")[0] == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_killed_while_writing(data_dir: Path, command: Command, tmp_path: Path):
    checkpoint, output = data_dir / "clip-mistral", tmp_path / "bundle"
    process = start_compiling(checkpoint, output, pause=True)
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            if line == b"writing decoder\n":
                break
        process.kill()
    assert process.wait(60) == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-")
    assert (left / "connector.onnx").exists()
    assert "no such directory" in command.refusal("info", output)
    check_compiles(command, checkpoint, output)


@pytest.mark.slow
def test_killed_at_random_moments(data_dir: Path, command: Command, tmp_path: Path):
    checkpoint, output = data_dir / "clip-mistral", tmp_path / "bundle"
    chance, whole = random.Random(0), 0.0
    for round_ in range(12):
        started = time.monotonic()
        process = start_compiling(checkpoint, output)
        try:
            _, lines = process.communicate(timeout=None if round_ == 0 else whole * chance.uniform(0.3, 1.0))
            whole = time.monotonic() - started
            assert process.returncode == 0, lines
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if output.exists():
            # Whole, then.
            assert command.run("info", output, "-q")[0] == 0
            shutil.rmtree(output)
    check_compiles(command, checkpoint, output)
