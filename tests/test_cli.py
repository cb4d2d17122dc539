"""The command as a user meets it: results on stdout, the rest on stderr, exit codes, pipes, terminals, Ctrl-C.

Most of it calls ``main`` here; what depends on a process (signals, pipes, terminals, encodings) starts one.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import click
import intertitle
import numpy as np
import pytest
from intertitle.align.preference import Recipe
from intertitle.align.scenes import captions, compare, draw_scene
from intertitle.cli import DEMO_CLIP, cli, main
from intertitle.commands import SHIPPED
from intertitle.commands.options import Grouped
from intertitle.runtime.caption import CaptionStream
from intertitle.runtime.decoding import Decoding
from intertitle.runtime.viewing import Viewing

Compiled = Callable[..., Path]
Expected = Callable[[str], dict[str, np.ndarray]]

COMMAND = [sys.executable, "-m", "intertitle.cli"]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``run("caption", bundle, clip)``: the exit code and both streams, of libraries written in C as well."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """A process of its own whose streams are pipes unless ``options`` say otherwise."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **{**pipe, **options})


def write_pictures(folder: Path, frames: np.ndarray) -> Path:
    """RGB uint8 ``[T, H, W, 3]`` as a folder of PNG files."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for index, frame in enumerate(frames):
        image.fromarray(frame).save(folder / f"frame{index}.png")
    return folder


@pytest.fixture
def pictures(expected: Expected, tmp_path: Path) -> Path:
    """A clip without sound: as many frames as the models look at."""
    return write_pictures(tmp_path / "pictures", expected("av-qwen2")["frames_uint8"])


def write_sound(path: Path, samples: np.ndarray) -> Path:
    """int16 ``[n]`` at 16 kHz as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def write_lossless(path: Path, frames: np.ndarray, samples: np.ndarray) -> Path:
    """RGB uint8 ``[T, H, W, 3]`` and int16 ``[n]`` at 16 kHz as a video file that gives both back bit by bit."""
    with av.open(str(path), "w", format="matroska") as container:
        video: Any = container.add_stream("ffv1", rate=1)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "bgr0"
        audio: Any = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(video.encode(picture.reformat(format="bgr0")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(samples[np.newaxis], "s16", "mono")
        sound.sample_rate = 16_000
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


# --- the same tokens as the original implementations, from files


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "clip-mistral-lora", "clip-mixtral", "auroracap-keep"])
def test_a_folder_of_frames_to_tokens_as_the_reference(
    variant: str, compiled: Compiled, expected: Expected, run: Callable[..., Result], tmp_path: Path
):
    numbers = expected(variant)
    pictures = write_pictures(tmp_path / "pictures", numbers["frames_uint8"])
    tokens = numbers["greedy_tokens" if "greedy_tokens" in numbers else "video.greedy_tokens"]
    options = ["--no-audio", "--json", "-q", "--max-new-tokens", len(tokens)]
    result = run("caption", compiled(variant), pictures, *options)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["token_ids"] == tokens.tolist()


def test_files_with_sound_to_tokens_as_the_reference(
    compiled: Compiled, expected: Expected, run: Callable[..., Result], tmp_path: Path
):
    numbers = expected("av-qwen2")
    clip = write_lossless(tmp_path / "clip.mkv", numbers["frames_uint8"], numbers["audio_int16"])
    sound = write_sound(tmp_path / "sound.wav", numbers["audio_int16"])
    result = run("caption", compiled("av-qwen2"), clip, sound, "--json", "-q", "--max-new-tokens", 48)
    assert (result.code, result.err) == (0, "")
    both, heard = (json.loads(line) for line in result.out.splitlines())
    assert (both["file"], both["mode"], both["seconds"]) == (str(clip), "audiovideo", pytest.approx(8))
    assert both["token_ids"] == numbers["audiovideo.greedy_tokens"].tolist()
    assert (heard["file"], heard["mode"], heard["seconds"]) == (str(sound), "audio", pytest.approx(12))
    assert heard["token_ids"] == numbers["audio.greedy_tokens"].tolist()


def test_compiled_by_the_command_to_tokens_as_the_reference(
    data_dir: Path, expected: Expected, run: Callable[..., Result], tmp_path: Path
):
    """The two commands of the README, with an adapter, and that the first does not write where something is."""
    bundle = tmp_path / "bundle"
    compilation = ["compile", data_dir / "clip-mistral", "-o", bundle, "--weights", "fp32"]
    parts = ("vision", "frame_connector", "connector", "decoder")
    result = run(*compilation, "--adapter", data_dir / "clip-mistral-lora")
    assert result.code == 0
    assert result.errors[0] == "reading the checkpoint"
    assert sorted(result.errors[1:]) == sorted(
        [
            "closing",
            "writing embedding",
            *(f"{verb} {name}" for verb in ("tracing", "writing") for name in parts),
        ]
    )
    title, header, _, *rows, total = result.out.splitlines()
    assert title == f"{bundle}:"
    assert header.split() == ["component", "weights", "parameters", "MB"]
    assert {row.split()[0] for row in rows} == {*parts, "embedding", "tokenizer"}
    on_disk = sum(file.stat().st_size for file in bundle.iterdir() if file.name != "bundle.json")
    assert total.split() == ["total", f"{on_disk / 1e6:,.1f}"]

    numbers = expected("clip-mistral-lora")
    pictures = write_pictures(tmp_path / "pictures", numbers["frames_uint8"])
    caption = run("caption", bundle, pictures, "--json", "-q", "--max-new-tokens", 48)
    assert json.loads(caption.out)["token_ids"] == numbers["video.greedy_tokens"].tolist()

    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    refused = run(*compilation)
    assert refused.code == 2
    # Known at once, not after an hour of tracing.
    assert refused.errors == [f"intertitle: {bundle} exists; choose another name, or have it overwritten (--overwrite)"]
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    assert run(*compilation, "--overwrite", "-q").err == ""
    assert json.loads((bundle / "bundle.json").read_text())["provenance"]["adapter"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "pictures"]


# --- caption


def test_one_file_several_files_and_streamed(compiled: Compiled, run: Callable[..., Result], pictures: Path):
    bundle, single = compiled("av-qwen2"), pictures / "frame0.png"
    options = ["--max-new-tokens", 12]
    text = json.loads(run("caption", bundle, single, "--json", "-q", *options).out)["text"]
    for flags in ([], ["--stream"]):
        result = run("caption", bundle, single, *flags, *options)
        assert result[:2] == (0, f"{text}\n")
        # A bundle that was written seconds ago is checked again.
        assert result.err.removeprefix("checking the bundle\n") == f"captioning {single}\n"

    several = run("caption", bundle, single, DEMO_CLIP, *options)
    names = [line.partition("\t")[0] for line in several.out.splitlines()]
    assert names == [str(single), str(DEMO_CLIP)]
    assert several.err.removeprefix("checking the bundle\n") == f"captioning {single}\ncaptioning {DEMO_CLIP}\n"
    assert several.out.partition("\n")[0] == f"{single}\t" + re.sub("[\r\n\t]", " ", text)
    streamed = run("caption", bundle, single, DEMO_CLIP, "--stream", "-q", *options)
    assert streamed.out == several.out
    assert streamed.err == ""


def test_several_captions_of_a_clip_are_numbered(compiled: Compiled, run: Callable[..., Result], pictures: Path):
    arguments = ["caption", compiled("av-qwen2"), pictures / "frame0.png", "-q", "--max-new-tokens", 4]
    older = [*arguments, "--decoding", "beam", "--n-best", 3]
    arguments += ["--strategy", "beam", "--candidates", 3]
    assert run(*older).out == run(*arguments).out
    records = [json.loads(line) for line in run(*arguments, "--json").out.splitlines()]
    scores = [record["mean_logprob"] for record in records]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    found = [line.split("\t") for line in run(*arguments).out.splitlines()]
    assert [line[:2] for line in found] == [[str(n), f"{score:.3f}"] for n, score in enumerate(scores, 1)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_terminal_obeys_no_caption(
    streamed: bool, compiled: Compiled, run: Callable[..., Result], pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    """A hostile tokenizer makes captions that clear the screen; the escape sequence comes in two pieces."""
    said, single = ["a\x1b", "]0;title\x07\u202e", "b\r", "\nc"], pictures / "frame0.png"
    shown = "a\\x1b]0;title\\x07\\u202eb"
    result = intertitle.Captioner.load(compiled("av-qwen2")).caption(
        single, decoding=intertitle.Decoding(max_new_tokens=2)
    )
    made = replace(result, text="".join(said), notes=["n\x1b[2J"])

    def stream(*_: object, **__: object) -> CaptionStream:
        def pieces() -> Iterator[str]:
            yield from said
            begun.caption = made

        begun = CaptionStream(pieces())
        return begun

    monkeypatch.setattr(intertitle.Captioner, "caption", lambda *_, **__: made)
    monkeypatch.setattr(intertitle.Captioner, "stream", stream)
    flag = ["--stream"] if streamed else []
    arguments = ["caption", compiled("av-qwen2"), single, "-q", *flag]
    assert run(*arguments).out == f"{shown}\nc\n"
    assert run(*arguments).err == f"{single}: n\\x1b[2J\n"
    assert run(*arguments, single).out == f"{single}\t{shown} c\n" * 2
    if not streamed:
        (line,) = run(*arguments, "--json").out.splitlines()
        assert json.loads(line)["text"] == made.text
        assert "\u202e" not in line


def test_what_was_substituted_is_said(compiled: Compiled, run: Callable[..., Result], pictures: Path):
    result = run("caption", compiled("av-qwen2"), pictures, "-q", "--json", "--max-new-tokens", 2)
    (note,) = json.loads(result.out)["notes"]
    assert result.errors == [f"{pictures}: {note}"]
    assert "no audio track" in note
    assert run("caption", compiled("av-qwen2"), pictures, "-q", "--no-audio", "--max-new-tokens", 2).err == ""


def test_options_reach_the_captioner(compiled: Compiled, run: Callable[..., Result]):
    """Each flag against the same setting of the Python interface."""
    bundle = compiled("av-qwen2")
    captioner = intertitle.Captioner.load(bundle)
    short = intertitle.Decoding(max_new_tokens=10)
    greedy = captioner.caption(DEMO_CLIP, audio=False, decoding=short)
    stop = greedy.text[2:4]
    hot: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "seed": 3}
    cases: list[tuple[list[object], dict[str, Any]]] = [
        ([], {}),
        (["--prompt", "What is heard?"], {"prompt": "What is heard?"}),
        (["--stop", "never said", "--stop", stop], {"decoding": {"stop": ("never said", stop)}}),
        (
            ["--strategy", "sample", "--temperature", 1.5, "--top-p", 0.95, "--top-k", 40, "--seed", 3],
            {"decoding": {"strategy": "sample", **hot}},
        ),
        (["--threads", 1, "--device", "cpu"], {}),
    ]
    seen = set()
    for arguments, settings in cases:
        decoding = intertitle.Decoding(max_new_tokens=10, **settings.pop("decoding", {}))
        caption = captioner.caption(DEMO_CLIP, audio=False, decoding=decoding, **settings)
        options = ["--no-audio", "--json", "-q", "--max-new-tokens", 10]
        record = json.loads(run("caption", bundle, DEMO_CLIP, *options, *arguments).out)
        assert record["token_ids"] == caption.token_ids
        assert (record["text"], record["finish_reason"]) == (caption.text, caption.finish_reason)
        assert record["mean_logprob"] == pytest.approx(np.mean(caption.token_logprobs), abs=1e-6)
        seen.add(tuple(record["token_ids"]))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [("--temperature", 0.5, "sample"), ("--top-k", 3, "sample"), ("--num-beams", 4, "beam")],
)
def test_options_of_another_strategy_are_refused(
    compiled: Compiled, run: Callable[..., Result], option: str, value: float, needed: str
):
    options = ["-q", "--no-audio", "--max-new-tokens", 2]
    for strategy in ([], ["--strategy", "greedy"]):
        result = run("caption", compiled("av-qwen2"), DEMO_CLIP, option, value, *strategy, *options)
        assert result.code == 2
        assert result.errors == [f"intertitle: {option} does nothing without --strategy {needed}"]
    assert run("caption", compiled("av-qwen2"), DEMO_CLIP, "--seed", 7, *options).err == ""


def test_subtitles(compiled: Compiled, run: Callable[..., Result], pictures: Path, tmp_path: Path):
    srt = tmp_path / "caption.srt"
    options = ["-q", "--no-audio", "--max-new-tokens", 6, "--srt", srt]
    result = run("caption", compiled("av-qwen2"), DEMO_CLIP, *options)
    assert result.code == 0
    with av.open(str(DEMO_CLIP)) as clip, av.open(str(srt), format="srt") as subtitles:
        (cue, *_) = subtitles.demux()
        assert clip.duration is not None
        assert cue.pts == 0
        assert cue.duration == pytest.approx(clip.duration / 1000, abs=50)
        assert bytes(cue).decode().split() == result.out.split()
    # Eight images are eight thirds of a second (the reference's rate for folders).
    assert run("caption", compiled("av-qwen2"), pictures, *options).code == 0
    assert "00:00:00,000 --> 00:00:02,667\n" in srt.read_text(encoding="utf-8")


def test_what_the_locale_cannot_write_costs_no_caption(
    compiled: Compiled, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Not a name in UTF-8, but one that Linux allows; nor do line breaks tear the lines of several files.
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    broken = tmp_path / "two\nlines.png"
    try:
        for path in (odd, broken):
            path.write_bytes((pictures / "frame0.png").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    options = ["-q", "--max-new-tokens", "8", "--no-audio"]
    for encoding in ("ascii", "latin-1", "utf-8"):
        for flags in (["--json"], []):
            written = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
            assert main(["caption", str(compiled("av-qwen2")), str(odd), str(broken), *options, *flags]) == 0
            # To an ASCII stdout click writes UTF-8: most likely nobody chose ASCII.
            lines = written.getvalue().decode("utf-8" if encoding == "ascii" else encoding).splitlines()
            if flags:
                records = [json.loads(line) for line in lines]
                assert [record["file"] for record in records] == [str(odd), str(broken)]
                assert "\ufffd" in records[0]["text"]
            else:
                assert [line.partition("\t")[0] for line in lines] == [
                    f"{tmp_path}/\\udcff.png",
                    f"{tmp_path}/two\\nlines.png",
                ]


# --- info, verify, demo


def test_info(compiled: Compiled, run: Callable[..., Result]):
    bundle = compiled("auroracap-keep")
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert json.loads(run("info", bundle, "--json").out) == manifest
    result = run("info", bundle)
    assert result.code == 0
    assert result.out.startswith("auroracap: auroracap, for cpu (ort), decoder fp32\n")
    assert "(merging: 40% gives " in " ".join(result.out.split())
    for name, part in manifest["components"].items():
        (row,) = (line for line in result.out.splitlines() if line.startswith(f"{name} "))
        size = sum((bundle / part[file]).stat().st_size for file in ("graph", "data"))
        assert row.split()[:4] == [name, part["weights"], f"{part['parameters']:,}", f"{size / 1e6:.1f}"]
    assert f"\n{len(list(bundle.iterdir())) - 1} files " in result.out
    assert max(map(len, result.out.splitlines()[:-1])) <= 80


def test_verify_passes_and_fails(compiled: Compiled, data_dir: Path, run: Callable[..., Result], tmp_path: Path):
    report = tmp_path / "report.json"
    options = ["--reference", data_dir / "clip-mistral", "--max-new-tokens", 4]
    lora = ["--adapter", data_dir / "clip-mistral-lora"]
    result = run("verify", compiled("clip-mistral-lora"), *options, *lora, "--json", report)
    assert result.code == 0
    assert result.out.startswith(f"{DEMO_CLIP} (video):\n")
    assert result.out.endswith("\nPASS\n")
    assert [line.split()[0] for line in result.errors] == [f"{DEMO_CLIP}:"] * len(result.errors)
    written = json.loads(report.read_text())
    assert (written["verdict"], written["first_divergent"]) == ("PASS", None)
    for stage in written["clips"][0]["stages"]:
        (row,) = (line for line in result.out.splitlines() if line.startswith(f"{stage['stage']} "))
        assert f"{stage['relative_error']:.2e}" in row

    # A captioner that also hears, on the shipped clip.
    result = run("verify", compiled("av-qwen2"), "--reference", data_dir / "av-qwen2", "-q")
    assert result.code == 0
    assert result.out.startswith(f"{DEMO_CLIP} (audiovideo):\n")
    assert [line.split()[0] for line in result.out.splitlines() if line.endswith(" PASS")].count("fbank") == 1

    # The adapter changes the connector and the decoder; without it the reference is another model.
    result = run("verify", compiled("clip-mistral-lora"), DEMO_CLIP, *options, "-q", "--json", "-")
    assert result.code == 1
    assert result.err == ""
    found = json.loads(result.out)
    assert (found["verdict"], found["first_divergent"]) == ("FAIL", "connector")
    result = run("verify", compiled("clip-mistral-lora"), *options, "-q")
    assert result.code == 1
    assert result.out.endswith("\nFAIL: first divergent component: connector\n")
    assert "give it with --adapter" in result.out


def test_demo_says_what_is_in_the_clip(run: Callable[..., Result], tmp_path: Path):
    first, result = (run("demo", "--keep", tmp_path / "captioner", "-q") for _ in range(2))
    assert first.code == result.code == 0
    caption, truth, counts, *timings = result.out.splitlines()
    assert first.out.splitlines()[:3] == [caption, truth, counts]
    assert counts.startswith("heard and saw: audiovideo, ")
    assert [line.split()[0] for line in timings][-2:] == ["prefill", "decode"]
    # Held against the scene that the clip was rendered from, not against the text beside it.
    scene = draw_scene("test", int((SHIPPED / "scene.txt").read_text().split(":")[1]))
    held = compare(scene, caption.removeprefix("caption: "))
    assert held.missed == held.invented == frozenset()
    assert truth.removeprefix("truth:   ") == captions(scene)[0]
    # What it says it ran is what a user can run, with the kept copy as with the package's own bundle.
    kept = sorted(path.name for path in (tmp_path / "captioner").iterdir())
    assert kept == sorted(path.name for path in (SHIPPED / "captioner").iterdir())
    plain = run("demo", "-q")
    assert plain.out.splitlines()[:3] == [caption, truth, counts]
    for shown, bundle in ((result, tmp_path / "captioner"), (plain, SHIPPED / "captioner")):
        (line,) = (line for line in shown.errors if line.startswith("$ intertitle caption"))
        words = shlex.split(line)[2:]
        assert words == ["caption", str(bundle), str(SHIPPED / "clip.mp4")]
        assert caption == f"caption: {json.loads(run(*words, '-q', '--json').out)['text']}"


def test_demo_keeps_its_bundle_only_where_nothing_is_lost(run: Callable[..., Result], tmp_path: Path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    result = run("demo", "--keep", folder, "-q")
    assert (result.code, result.out) == (2, "")
    assert "exists and is not a bundle" in result.err
    assert [path.name for path in tmp_path.rglob("*")] == ["holiday", "diary.txt"]


# --- help and usage


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_help(name: str | None, run: Callable[..., Result]):
    """Every help shows an example, and for every option that takes a value what happens without it."""
    result = run(*([name] if name else []), "--help")
    assert (result.code, result.err) == (0, "")
    (example,) = re.findall(r"Example:\s+intertitle (\w+)", result.out)
    assert example == (name or "compile")
    for option in options_of(cli.commands[name] if name else cli):
        assert option.help, option.name
        if not option.is_flag and not option.required and option.name not in ("srt", "json_file"):
            assert option.show_default or "[default: " in option.help, option.name


@pytest.mark.parametrize("name", [name for name, command in cli.commands.items() if isinstance(command, Grouped)])
def test_sections_of_a_help_hold_every_option_once(name: str, run: Callable[..., Result]):
    text = run(name, "--help").out
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    wanted = [option.opts[-1] for option in options_of(cli.commands[name])] + ["--help"]
    assert sorted(shown) == sorted(wanted)
    sections = dict(re.findall(r"^([A-Z][a-z]+) options:\n((?:  .*\n|\n)+)", text, re.MULTILINE))
    assert list(sections)[:2] == ["Clip", "Decoding"]
    assert "--prompt" in sections["Clip"]
    assert "--temperature" in sections["Decoding"]
    assert "--threads" in sections["Device"]
    assert "--debug" in sections["Other"]


def test_one_name_from_the_option_to_the_record():
    """The fields of a ``Viewing`` and a ``Decoding`` are the options of commands, and so are those of a ``Recipe``."""
    spelled = {name: {option.name for option in options_of(command)} for name, command in cli.commands.items()}
    viewing, decoding = ({field.name for field in fields(record)} for record in (Viewing, Decoding))
    assert viewing | decoding - {"retrospective_template"} <= spelled["caption"]
    assert (viewing | decoding) - {"retrospective_template", "start", "end"} <= spelled["batch"]
    assert {*Recipe().record} - {"start", "end"} <= spelled["pairs"]
    assert {*Viewing().record} == viewing


def test_no_arguments_show_the_help(run: Callable[..., Result]):
    assert run() == run("--help")
    assert run("--version").out == f"intertitle, version {intertitle.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["compile", "checkpoint"], "Missing option '-o'"),
        (["compile", "checkpoint", "-o", "x", "--wieghts", "int4"], "--weights"),
        (["compile", "checkpoint", "-o", "x", "--visual-tokens", "0.5"], "a share such as 50% or a number such as 256"),
        (["compile", "checkpoint", "-o", "x", "--visual-tokens", "256"], "'256' is a number of tokens, and a bundle"),
        (["caption", "bundle", "a.mp4", "--visual-tokens", "1.0"], "a share such as 50% or a number such as 256"),
        (["batch", "bundle", "a.mp4", "-o", "x", "--visual-tokens", "many"], "a share such as 50% or a number such as"),
        (["pairs", "bundle", "a.mp4", "-o", "x", "--visual-tokens", "0"], "a whole number from 1 on, not 0"),
        (["compile", "checkpoint", "-o", "x", "--target", "toaster"], "unknown target 'toaster'; known: cpu"),
        (["compile", "checkpoint", "-o", "x", "--weights", "int3"], "takes weights int4 or fp32, not 'int3'"),
        (["compile", "checkpoint", "-o", "missing/x"], "there is no directory"),
        (["compile", "checkpoint", "-o", "."], "exists and is not a bundle"),
        (["compile", "checkpoint", "-o", "x"], "checkpoint is not a folder"),
        (["caption", "bundle"], "Missing argument 'MEDIA...'"),
        (["caption", "bundle", "a.mp4"], "bundle: there is no such directory"),
        (["caption", "bundle", "a.mp4", "--strategy", "beams"], "'beams' is not one of 'greedy', 'sample', 'beam'"),
        (["caption", "bundle", "a.mp4", "--stream", "--json"], "exclude each other"),
        (["caption", "bundle", "a.mp4", "b.mp4", "--srt", "x.srt"], "--srt takes one clip"),
        (["caption", "bundle", "a.mp4", "--srt", "missing/x.srt"], "there is no directory missing"),
        (["caption", "bundle", "a.mp4", "--max-new-tokens", "0"], "at least 1"),
        (
            ["caption", "bundle", "a.mp4", "--strategy", "sample", "--temperature", "0"],
            "temperature must be a positive number",
        ),
        (["caption", "bundle", "a.mp4", "--strategy", "sample", "--top-p", "nan"], "top_p must be in (0, 1]"),
        (["caption", "bundle", "a.mp4", "--strategy", "sample", "--top-k", "-1"], "top_k must be 0 (off) or more"),
        (["caption", "bundle", "a.mp4", "--seed", "-1"], "seed must be in"),
        (["caption", "bundle", "a.mp4", "--stop", ""], "a stop text is empty"),
        (["caption", "bundle", "a.mp4", "--threads", "0"], "0 is not in the range"),
        (["verify", "bundle"], "Missing option '--reference'"),
        (["verify", "bundle", "--reference", "c", "--json", "missing/x.json"], "there is no directory missing"),
        (["verify", "bundle", "--reference", "c"], "bundle: there is no such directory"),
        (["info", "bundle\nwith a line break"], r"bundle\nwith a line break: there is no such directory"),
        (["demo", "--keep", "taken"], "taken"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    reason: str,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    result = run(*arguments, *([] if arguments[0] in ("nonsense", "info") else ["-q"]))
    assert (result.code, result.out) == (2, "")
    (line,) = (line for line in result.errors if not line.startswith("$ "))
    assert line.startswith("intertitle: ")
    assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "arguments", [["info", "nowhere"], ["caption", "BUNDLE", "nowhere.mp4", "-q"]], ids=lambda a: a[0]
)
def test_debug_shows_the_traceback(arguments: list[str], order: str, compiled: Compiled, run: Callable[..., Result]):
    arguments = [str(compiled("av-qwen2")) if word == "BUNDLE" else word for word in arguments]
    result = run("--debug", *arguments) if order == "before" else run(*arguments, "--debug")
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err
    assert re.search(r"^intertitle\.errors\.\w+: nowhere", result.errors[-1])
    assert run(*arguments).err.count("\n") == 1


def test_failures_of_the_system_are_one_line(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    for error, said in [
        (PermissionError(13, "Permission denied", "weights.bin"), "weights.bin: Permission denied"),
        (OSError(28, "No space left on device"), "input or output failed: No space left on device"),
        (MemoryError("Unable to allocate 9.9 GiB"), "not enough memory: Unable to allocate 9.9 GiB"),
    ]:

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("intertitle.runtime.bundle.Bundle.open", fail)
        assert run("info", "bundle") == (2, "", f"intertitle: {said}\n")
        assert "Traceback" in run("info", "bundle", "--debug").err


def test_a_command_whose_packages_are_missing_says_what_to_install(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "intertitle.export.compile", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    for arguments in (["compile", "a", "-o", "b"], ["verify", "a", "--reference", "b"]):
        result = run(*arguments)
        assert result.code == 2
        assert re.fullmatch(
            r"intertitle: this command needs 'torch', which is not installed: pip install 'intertitle\[compile\]'\n",
            result.err,
        )


# --- processes


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(compiled: Compiled, run: Callable[..., Result], pictures: Path):
    pty = pytest.importorskip("pty")
    arguments = ["caption", compiled("av-qwen2"), pictures, pictures / "frame0.png", "--max-new-tokens", 200]
    plain = run(*arguments)
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = start(*arguments, stdin=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 60)[0]:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how Linux reports that the other side is gone
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.stdout is not None
    assert process.stdout.read().decode() == plain.out
    process.stdout.close()
    assert process.wait(60) == 0
    text = shown.decode()
    assert "━" in text
    assert "frame0.png: " in text
    # The note stays, the bar goes: nothing else is left on the screen.
    steps = re.split(r"\x1b\[1A\x1b\[2K", text)
    left = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", step) for step in steps]
    assert f"{pictures}: no audio track" in left[2]
    assert left[-1].strip() == ""


def test_a_reader_that_goes_away_is_no_error(compiled: Compiled):
    # So many that captions are still to come when the reader goes.
    process = start("caption", compiled("av-qwen2"), *[DEMO_CLIP] * 400, "-q", "--max-new-tokens", 2, "--no-audio")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout(compiled: Compiled):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = start("info", compiled("av-qwen2"), "-q", stdout=full)
        assert process.communicate(timeout=60)[1] == b"intertitle: input or output failed: No space left on device\n"
    assert process.returncode == 2


#: The command, which stays where it begins to write the decoder.
PAUSING = """
import sys, time
from intertitle.cli import main
from intertitle.console import ProgressDisplay

def pausing(self, stage, done, total, report=ProgressDisplay.__call__):
    report(self, stage, done, total)
    if stage == "writing decoder":
        time.sleep(60)

ProgressDisplay.__call__ = pausing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["caption", "compile"])
def test_ctrl_c(command: str, compiled: Compiled, data_dir: Path, tmp_path: Path):
    """One line and exit code 130, and nothing half-written."""
    if command == "caption":
        process = start("caption", compiled("av-qwen2"), *[DEMO_CLIP] * 50, "--max-new-tokens", 2000)
        begun = f"captioning {DEMO_CLIP}\n"
    else:
        arguments = ["compile", str(data_dir / "clip-mistral"), "-o", str(tmp_path / "bundle")]
        process = subprocess.Popen([sys.executable, "-c", PAUSING, *arguments], stderr=subprocess.PIPE)
        begun = "writing decoder\n"
    assert process.stderr is not None
    for line in process.stderr:
        if line.decode() == begun:
            break
    assert len(list(tmp_path.iterdir())) == (command == "compile")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.decode() == "intertitle: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_command_is_loaded(tmp_path: Path):
    """The first third of a second: a module that it imports is interrupted."""
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "intertitle", "info", "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
