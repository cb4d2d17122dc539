"""``docs/benchmarks.md`` and the table of speed in the README, written from the JSON files under ``results/``.

``python -m intertitle.benchmarks.tables`` writes both. Every figure comes from a file; the sentences beside them say
what was measured. A test compares the pages with what this module would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from .harness import RESULTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
#: The lines of the README between which the table of speed stands.
BEGIN, END = "<!-- speed: from benchmarks/results -->\n", "<!-- end of speed -->\n"

Result = dict[str, Any]
GB, MB = 1e9, 1e6

_HEAD = """\
# Benchmarks

This page is written by `python -m intertitle.benchmarks.tables` from the JSON files in `benchmarks/results/`. Each file
holds all figures, the environment and the command that measures them again.

**Random weights.** No released weights could be had where this was written. Speed and memory of the 7 B and 0.5 B
shapes are real; the captions of those bundles are noise. Quality is measured with the small captioner that ships with
the package, on scenes that it has not seen.
"""


def page(results: Path = RESULTS) -> str:
    """The text of ``docs/benchmarks.md``."""
    parts = [_HEAD]
    for title, name, write in _SECTIONS:
        result = _read(results, name)
        parts.append(f"## {title}\n\n{_measured(result, name)}\n\n" + "\n\n".join(write(result)) + "\n")
    told = {name for _, name, _ in _SECTIONS}
    others = sorted(path.stem for path in results.glob("*.json") if path.stem not in told)
    rows = [(f"`{name}.json`", f"`{_read(results, name).get('command', '')}`") for name in others]
    if rows:
        parts.append(f"## Files without a table here\n\n{_table(('file', 'command'), rows)}\n")
    return "\n".join(parts)


def speed(results: Path = RESULTS) -> str:
    """The README's table: seconds of a clip from file to caption, and peak memory."""
    real, small, gpu = (_read(results, name) for name in ("real-size-7b-av", "caption-quality", "gpu-h100-cuda"))
    batch = _read(results, "throughput-0.5b")["by_caption_length"]["64"]
    rows: list[Sequence[str]] = [
        (
            "VideoLLaMA2.1-7B-AV",
            f"int4, encoders {kind}",
            f"cpu, 2 cores {real['environment']['cpu']}",
            f"{real[f'{kind} encoders']['caption_seconds']:.0f}",
            f"{real[f'{kind} encoders']['caption_peak_bytes'] / GB:.1f} GB",
        )
        for kind in ("fp32", "int8")
    ]
    machine = "cpu, 2 cores Intel Xeon"
    alone = 60 / batch["captions_per_minute"]["one_by_one"]
    together = 60 / batch["captions_per_minute"]["together"]
    rows += [
        ("0.5 B shape, 64 new tokens, no sound", "int4", machine, f"{alone:.1f}; in a batch of 8: {together:.1f}", "-"),
        ("shipped captioner", "int4", machine, f"{small['settings']['int4']['seconds_per_clip']:.2f}", "-"),
    ]
    for weights in ("int4", "fp16"):
        decode = gpu[f"{weights} decode"]
        rows.append(
            (
                "VideoLLaMA2.1-7B-AV",
                weights,
                "cuda, H100",
                f"not yet measured ({decode['tokens_per_second']['1']:.0f} tokens/s)",
                f"{decode['memory_bytes'] / GB:.1f} GB (decoder, 32 rows)",
            )
        )
    return _table(("model", "weights", "target, machine", "seconds per clip", "peak memory"), rows)


def _read(results: Path, name: str) -> Result:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def _measured(result: Result, name: str) -> str:
    where = result["environment"]
    packages = where["packages"]
    runtime = next((f"{key} {packages[key]}" for key in ("onnxruntime", "onnxruntime-gpu") if key in packages), "")
    command = f"`{result['command']}` → " if "command" in result else ""
    return f"{command}`{name}.json`. {where['date']}, {where['cores']} cores, {where['cpu']}, {runtime}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(figures: dict[str, float]) -> str:
    return f"{figures['median']:.2f} ({figures['min']:.2f} to {figures['max']:.2f})"


def _interval(figure: dict[str, float], digits: int) -> str:
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _stage_seconds(seconds: dict[str, float], stage: str) -> float:
    """A stage's, and those of what a connector does to each frame, which older results have in one figure."""
    return seconds[stage] + seconds.get(f"frame_{stage}", 0.0)


def _real_size(result: Result) -> Iterator[str]:
    shapes = {kind: result[f"{kind} encoders"] for kind in ("fp32", "int8")}
    tokens = next(iter(shapes.values()))
    yield (
        f"VideoLLaMA2.1-7B-AV at its released size, int4 decoder, a clip of 5 s with sound: 16 frames, "
        f"{tokens['prompt_tokens']:,} prompt tokens, {tokens['new_tokens']} new tokens. Seconds, from start to caption."
    )
    stages = ("load", "vision", "connector", "audio", "prefill", "decode")
    yield _table(
        ("encoders", "bundle", "compile", "its peak", "caption", "its peak", *stages, "tokens/s"),
        (
            (
                kind,
                f"{one['bundle_bytes'] / GB:.2f} GB",
                f"{one['compile_seconds']:.0f}",
                f"{one['compile_peak_bytes'] / GB:.1f} GB",
                f"{one['caption_seconds']:.0f}",
                f"{one['caption_peak_bytes'] / GB:.1f} GB",
                *(f"{_stage_seconds(one['caption_stages'], stage):.1f}" for stage in stages),
                f"{one['decode_tokens_per_second']:.1f}",
            )
            for kind, one in shapes.items()
        ),
    )
    yield "Prefill and decoding are the same work in both rows. Their difference is the noise of the machine."


def _peers(result: Result) -> Iterator[str]:
    over = result["tokens_per_second_over_peer"]
    speeds = result["tokens_per_second"]
    yield (
        f"Decoding at a Qwen2-0.5B shape with 4-bit weights after a prompt of {result['prompt_tokens']} tokens. "
        f"Medians of {result['rounds']} alternating rounds; ratios with their least and largest."
    )
    rows = [
        (
            f"intertitle, block {block}",
            f"{speeds[f'intertitle_{block}']:.1f}",
            _ratio(over[f"intertitle_{block}"]["llama_cpp"]),
            _ratio(over[f"intertitle_{block}"]["onnxruntime_genai"]),
            f"{result['share_of_floor'][f'intertitle_{block}']['median']:.2f}",
        )
        for block in (32, 128)
    ]
    rows += [("llama.cpp Q4_0", f"{speeds['llama_cpp']:.1f}", "", "", "")]
    rows += [("ONNX Runtime GenAI int4", f"{speeds['onnxruntime_genai']:.1f}", "", "", "")]
    yield _table(("", "tokens/s", "over llama.cpp", "over ONNX Runtime GenAI", "share of the floor"), rows)
    yield (
        f"The floor is the time to read the weights once at {result['read_gigabytes_per_second']:.0f} GB/s. The kernel "
        "spends as much time on unpacking as on memory."
    )


def _decode(result: Result) -> Iterator[str]:
    speeds = result["tokens_per_second"]
    yield f"{result['shape']}, prompt of {result['prompt_tokens']} tokens, medians of {result['rounds']} rounds."
    names = {
        "captioner": "intertitle",
        "bare": "the session alone",
        "bare_small_pages": "the session alone, without huge pages",
        "torch_bf16_eager": "PyTorch eager, bfloat16",
    }
    yield _table(("", "tokens/s"), ((names[name], f"{value:.1f}") for name, value in speeds.items()))


def _strategies(result: Result) -> Iterator[str]:
    names = {
        "sample": "sampling",
        "contrast_temporal": "temporal contrast",
        "contrast_noise": "noise contrast",
        "contrast_temporal_sampled": "temporal contrast, sampled",
        "beam_4": "4 beams",
        "n_best_8": "8 captions of one prompt (per token of one)",
    }
    yield (
        f"Time of a token over greedy decoding ({result['milliseconds_per_token']['greedy']:.1f} ms), "
        f"{result['rounds']} rounds, idle machine."
    )
    rows = ((names[name], _ratio(ratio)) for name, ratio in result["over_greedy"].items())
    yield _table(("", "over greedy"), rows)
    yield (
        "A second row adds 12 to 20 % to int4 matmuls and 50 % to attention. SynPO reports a factor of 1.5 to 1.75 for "
        "its contrast."
    )


def _throughput(result: Result) -> Iterator[str]:
    yield f"{result['clips']} clips, {result['rows']} captions together, against one after the other. Idle machine."
    rows = []
    for tokens, figures in result["by_caption_length"].items():
        speeds, stages = figures["captions_per_minute"], figures["stages_one_by_one"]
        rows.append(
            (
                tokens,
                f"{speeds['one_by_one']:.1f}",
                f"{speeds['together']:.1f}",
                _ratio(figures["together_over_one_by_one"]),
                f"{stages['media']:.2f} s",
                f"{stages['time_to_first_token']:.2f} s",
            )
        )
    yield _table(
        ("new tokens", "captions/min alone", "together", "ratio", "reading, preprocessing", "until the first token"),
        rows,
    )


def _memory(result: Result) -> Iterator[str]:
    resident = result["resident_mb"]
    yield f"A batch of {result['clips']} clips, {result['rows']} captions together, tiny captioner. Resident memory:"
    yield _table(
        ("after a tenth", "median", "most", "end"),
        [[f"{resident[key]:.0f} MB" for key in ("after_a_tenth", "median", "max", "end")]],
    )


def _kills(result: Result) -> Iterator[str]:
    wrong = ", ".join(f"{key} {len(result[key])}" for key in ("lost", "duplicated", "torn", "different"))
    yield (
        f"{result['kills']} SIGKILLs at random moments of a batch: {result['rounds']} outputs were completed and "
        f"{result['records_checked']:,} records checked. Records {wrong}."
    )


def _frames(result: Result) -> Iterator[str]:
    yield (
        f"The {result['places']} frames of a clip ({result['clip']}) against ways that decode every frame. "
        f"Medians of {result['rounds']} alternating rounds."
    )
    rows = []
    for interval in (250, 60):
        over = result[f"group_of_{interval}"]["times_faster_than"]
        seconds = result[f"group_of_{interval}"]["median_seconds"]["reader"]
        ways = (f"{over[way]['median']:.1f}" for way in ("decode_all", "cv2_read", "cv2_grab"))
        rows.append((f"every {interval} frames", f"{seconds:.2f} s", *ways))
    head = ("keyframes", "intertitle", "times faster than PyAV, all threads", "than cv2 read", "than cv2 grab")
    yield _table(head, rows)


def _experts(result: Result) -> Iterator[str]:
    yield (
        "A decoder whose tokens pass 2 of 8 experts (Mixtral's proportions) against a dense one with as many active "
        f"parameters, one row, random weights; medians of {result['rounds']} alternating rounds, busy machine."
    )
    rows = []
    for weights in ("int4", "fp32"):
        figures = result[weights]
        step = figures["milliseconds_per_token"]
        rows.append(
            (
                weights,
                figures["shape"],
                f"{step['sparse']:.1f} ms, dense {step['dense']:.1f} ms",
                _ratio(figures["sparse_over_dense"]),
                _ratio(figures["all_experts_over_dense"]),
                _ratio(figures["prompt_sparse_over_dense"]),
            )
        )
    head = ("weights", "shape", "step", "step, over dense", "step with all 8 experts, over dense")
    yield _table((*head, f"prompt of {result['int4']['prompt_tokens']}, over dense"), rows)


def _large(result: Result) -> Iterator[str]:
    yield (
        "Captioners that are larger than this machine, compiled for the CPU a few layers deep at their true widths. "
        "The peak does not depend on the depth. The last column is calculated for all layers."
    )
    rows = [
        (
            name,
            f"{figures['weights']}, encoders {figures['encoder_weights']}",
            f"{figures['compiled_layers']} of {figures['layers']}",
            f"{figures['compile_peak_bytes'] / 1e9:.1f} GB",
            f"{figures['bytes_of_a_layer'] / 1e9:.2f} GB",
            f"{figures['bundle_bytes'] / 1e9:.1f} GB",
        )
        for name, figures in result.items()
        if isinstance(figures, dict) and "bundle_bytes" in figures
    ]
    yield _table(("size", "weights", "layers compiled", "peak of compile", "a layer", "whole bundle"), rows)


def _compression(result: Result) -> Iterator[str]:
    yield "Fewer visual tokens at the 0.5 B shape, busy machine. The drift of the logits is in the file."
    for bundle in result["bundles"]:
        rows = (
            (f"{one['visual_tokens']:g}", f"{one['tokens'][0]:,}", f"{one['seconds']['prefill']:.1f} s")
            for one in bundle["settings"]
        )
        yield f"{bundle['family']}, {bundle['method']}:\n\n" + _table(("kept", "tokens of the clip", "prefill"), rows)


_OBJECTIVES = {
    "supervised": "supervised",
    "more_supervised": "more supervised (chosen texts)",
    "dpo": "DPO",
    "synpo": "SynPO",
    "leanpo": "LeanPO",
}
_QUALITY = (("cider", "CIDEr-D", 2), ("completeness", "facts mentioned", 3), ("invention", "statements invented", 3))


def _alignment(result: Result) -> Iterator[str]:
    yield (
        f"The small captioner on {result['test_clips']} unseen test scenes, greedy, 95 % intervals; with several "
        f"seeds, each value. {result['pairs']:,} pairs, {result['steps']} steps of {result['batch']}, learning rate "
        f"{result['learning_rate']:g}, LoRA of rank 32."
    )
    rows = []
    for name, reports in result["reports"].items():
        figures = [[report["figures"][key] for report in reports] for key, _, _ in _QUALITY]
        cells = (
            _interval(values[0], digits) if len(values) == 1 else ", ".join(f"{v['value']:.{digits}f}" for v in values)
            for values, (_, _, digits) in zip(figures, _QUALITY, strict=True)
        )
        rows.append((_OBJECTIVES[name], *cells))
    yield _table(("trained", *(title for _, title, _ in _QUALITY)), rows)
    yield (
        "**No objective beats supervised training here.** The model card of the shipped captioner "
        "(`align/shipped/README.md`) says why and what was tried."
    )


def _sampled(result: Result) -> Iterator[str]:
    yield f"The same with sampled captions, mean over seeds, {result['test_clips']} test scenes."
    means = result["sampled"]["mean_over_seeds"]
    rows = (
        (_OBJECTIVES[name], *(f"{figures[key]:.{digits}f}" for key, _, digits in _QUALITY))
        for name, figures in means.items()
    )
    yield _table(("trained", *(title for _, title, _ in _QUALITY)), rows)


def _preference_step(result: Result) -> Iterator[str]:
    rows = ((_OBJECTIVES[name], _ratio(ratio)) for name, ratio in result["over_dpo"].items())
    yield f"Time of a training step ({result['batch']} pairs) over that of DPO, which also runs the reference model."
    yield _table(("", "over DPO"), rows)


def _quality(result: Result) -> Iterator[str]:
    yield (
        f"{result['test_clips']} test scenes; every second one but for the float32, int4 and int8 bundles. "
        f'"Equal": captions that are the same as PyTorch\'s.'
    )
    rows = []
    for name, row in result["settings"].items():
        figures = row["report"]["figures"]
        cost = f"{1000 * row['seconds_per_clip']:.0f}" if "seconds_per_clip" in row else ""
        equal = f"{row['equal_to_pytorch']:.0%}" if "equal_to_pytorch" in row else ""
        rows.append((name, *(f"{figures[key]['value']:.{digits}f}" for key, _, digits in _QUALITY), cost, equal))
    yield _table(("setting", *(title for _, title, _ in _QUALITY), "ms per clip", "equal"), rows)
    sound = result["sound_ablation"]
    rows = ((name, *(f"{sound[name][key]:.2f}" for key in sound[name])) for name in sound)
    yield "Share of the sound's facts in the caption when the clip has its own sound, silence, or another clip's sound:"
    yield _table(("sound", "facts of its own sound", "facts of the played sound"), rows)


def _engines(result: Result) -> Iterator[str]:
    yield (
        f"TensorRT for RTX, VideoLLaMA2.1-7B-AV's released shape (the decoder with {result['decoder_layers']} of its "
        f"28 layers and the output head), built for compute capabilities {result['compute_capabilities']} without a "
        "GPU. Size, seconds, peak memory of the build."
    )
    formats = [name for name in ("fp16", "int4", "int8") if name in result]
    rows = []
    for part in result[formats[0]]:
        seen: dict[str, str] = {}
        for name in formats:
            one = result[name].get(part)
            if one is not None and one["weights"] not in seen:
                figures = (f"{one['engine_bytes'] / MB:,.0f} MB", f"{one['seconds']:.0f} s")
                seen[one["weights"]] = ", ".join((*figures, f"{one['peak_bytes'] / GB:.1f} GB"))
        rows += [(part, weights, said) for weights, said in seen.items()]
    yield _table(("component", "weights", "engine, build, peak"), rows)


def _gpu(result: Result) -> Iterator[str]:
    yield (
        f"{result['place']['device']}, {result['place']['library']}. The decoder of VideoLLaMA2.1-7B-AV's released "
        "shape, tokens per second after prompts of 256 tokens, by the number of captions generated together. PyTorch "
        "is transformers' Qwen2 in float16 with a static cache."
    )
    ways = {
        "int4": result["int4 decode"],
        "int4, `ORT_FPA_INTB_GEMM=1`": result["int4 decode, ORT_FPA_INTB_GEMM=1"],
        "fp16": result["fp16 decode"],
        "PyTorch eager": result["pytorch eager"],
        "`torch.compile`": result["pytorch compiled"],
    }
    counts = list(result["int4 decode"]["tokens_per_second"])
    rows = []
    for name, one in ways.items():
        speeds = (f"{one['tokens_per_second'][n]:,.0f}" if n in one["tokens_per_second"] else "" for n in counts)
        of_floor = f"{one['of_floor']:.2f}" if "of_floor" in one else ""
        contrast = f"{one['contrast_over_greedy']['shortlist']:.2f}" if "contrast_over_greedy" in one else ""
        rows.append((name, *speeds, of_floor, contrast, f"{one['memory_bytes'] / GB:.1f} GB"))
    head = ("rows", *counts, "share of the floor", "contrast over greedy", "memory, 32 rows")
    yield _table(head, rows)
    parity = {name: one for name, one in result.items() if name.startswith("parity ")}
    yield "Parity with PyTorch in float32 with the same rounded weights:"
    yield _table(
        ("bundle", "vision error", "logits error", "greedy tokens equal"),
        (
            (
                name.removeprefix("parity "),
                f"{one['vision_error']:.1e}",
                f"{one['logits_error']:.1e}",
                f"{one['greedy_agreement']:.0%}",
            )
            for name, one in parity.items()
        ),
    )
    yield "\n".join(f"- {note}" for note in result["notes"])
    yield (
        "- `ORT_FPA_INTB_GEMM=1` in the environment selects other int4 kernels. They are slower for one row and for "
        "prompts, and loading takes 15 s longer.\n"
        "- The first prompt and the first cache of a new size cost up to 0.8 s, in which cuDNN plans its attention. "
        '`options={"decoder": {"sdpa_kernel": "19"}}` avoids that and adds 0.3 to 0.5 ms to a step.\n'
        "- **Not yet measured on a GPU**: seconds of each stage, time to the first token, TensorRT. TensorRT for RTX "
        "does not run on an H100 and says so before it builds."
    )


def _kernels(result: Result) -> Iterator[str]:
    yield result["what"]
    rows = []
    for name in ("attention by cuDNN", "attention by flash (sdpa_kernel 19)"):
        for count, one in result[name]["steps"].items():
            rows.append((name, count, f"{one['step_ms']:.2f}", f"{one['with_selection_ms']:.2f}"))
    yield _table(("", "rows", "ms a step", "with selection"), rows)
    rows = [
        (name, length, f"{one['first_prefill_ms']:.0f}", f"{one['prefill_ms']:.0f}", f"{one['step_ms']:.2f}")
        for name, lengths in result["long prompts"].items()
        for length, one in lengths.items()
    ]
    yield _table(("attention", "prompt tokens", "first prefill, ms", "prefill, ms", "step, ms"), rows)


_SECTIONS: list[tuple[str, str, Callable[[Result], Iterator[str]]]] = [
    ("A 7 B captioner on two cores", "real-size-7b-av", _real_size),
    ("Decoding beside llama.cpp and ONNX Runtime GenAI", "decode-peers", _peers),
    ("Decoding beside PyTorch", "decode-0.5b", _decode),
    ("What a decoding strategy costs", "strategies-0.5b", _strategies),
    ("Many clips together", "throughput-0.5b", _throughput),
    ("Memory of a long batch", "memory", _memory),
    ("Kills", "batch-kills", _kills),
    ("Reading frames", "frames", _frames),
    ("Fewer visual tokens", "compression", _compression),
    ("On an H100", "gpu-h100-cuda", _gpu),
    ("Steps of the int4 graph on an H100", "gpu-h100-int4-kernels", _kernels),
    ("Experts (Mixtral)", "experts", _experts),
    ("Larger than the machine", "large", _large),
    ("Building TensorRT engines", "engines-7b-av", _engines),
    ("Quality: weights, tokens, contrast, beams", "caption-quality", _quality),
    ("Quality: int8 encoders", "caption-quality-int8", _quality),
    ("Quality: alignment", "alignment", _alignment),
    ("Quality: alignment, sampled", "alignment-sampled", _sampled),
    ("A step of preference training", "preference-step", _preference_step),
]


def with_speed(readme: str, table: str) -> str:
    """``readme`` with the table of speed between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n\n{END}{after}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Write docs/benchmarks.md and the table of speed in README.md from benchmarks/results."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_speed(README.read_text(encoding="utf-8"), speed()), encoding="utf-8")
    click.echo(f"{PAGE}\n{README}")


if __name__ == "__main__":
    main()
