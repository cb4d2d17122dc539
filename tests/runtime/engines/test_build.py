"""Engines for GPUs that are not here, by TensorRT for RTX itself: every component of every fixture, fp16 and int4."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from intertitle.cli import main as cli
from intertitle.commands import SHIPPED_ADAPTER, SHIPPED_BASE
from intertitle.errors import OptionError, TargetError
from intertitle.export.compile import compile_bundle
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.engines.build import build_engine
from intertitle.runtime.engines.builder import build_bundle, parts
from intertitle.runtime.engines.library import check_device, load_library, parse_capabilities
from intertitle.runtime.engines.shapes import default_limits, profiles

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX has no wheels for this platform")
pytestmark = pytest.mark.usefixtures("private_engines")

COMMAND = [sys.executable, "-c", "import sys; from intertitle.cli import main; sys.exit(main())"]
CAPABILITIES = ("8.6", "8.9", "12.0")


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt-rtx")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from intertitle.cli import main; sys.exit(main())",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


#: Their operators are those of the others: they build in `make test-slow`.
_ALIKE = ("clip-mistral", "clip-mistral-lora", "auroracap", "llava-next-video")


@pytest.mark.parametrize(
    "variant",
    [
        "av-qwen2",
        "clip-mistral-explicit",
        "clip-mixtral",
        "auroracap-keep",
        "llava-video",
        "internvl2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in _ALIKE),
    ],
)
def test_every_component_builds(variant, compiled, library):
    """From fp16 and from int4. Encoders are float16 in both: the same graphs, and the engines that are there."""
    for weights in ("fp16", "int4"):
        bundle = Bundle.open(compiled(variant, weights, "tensorrt-rtx"))
        limits = default_limits(bundle.manifest, max_length=512)
        built = list(build_bundle(bundle, library, CAPABILITIES, limits))
        graphs = {name for name in bundle.manifest.files if name.endswith(".onnx")}
        assert len(built) == len(graphs) == len(parts(bundle))
        if weights == "fp16":
            assert {(each.reason, each.unfused) for each in built} == {("there is no engine yet", 0)}
        else:
            reasons = {each.name: each.reason for each in built}
            assert reasons.pop("decoder") == "the bundle's graph changed; the bundle's weights changed"
            assert set(reasons.values()) == {None}
            assert {each.unfused for each in built} == {0}
        assert all(each.path.stat().st_size == each.size > 1000 for each in built)
        again = list(build_bundle(bundle, library, CAPABILITIES, limits))
        assert [(each.path, each.reason) for each in again] == [(each.path, None) for each in built]


def test_the_plain_dialect_builds(compiled, library):
    """TensorRT 10.3 is not to be had here; this TensorRT reads its graphs as well."""
    bundle = Bundle.open(compiled("av-qwen2", "int4", "tensorrt-10.3"))
    limits = default_limits(bundle.manifest, max_length=256)
    assert len(list(build_bundle(bundle, library, CAPABILITIES, limits))) == 6


@pytest.mark.parametrize("target", ["tensorrt-rtx", pytest.param("tensorrt-10.3", marks=pytest.mark.slow)])
def test_int8_encoders_build(target, library, data_dir, tmp_path):
    """That engines keep them in one byte shows at real sizes only: ``benchmarks/results/engines-7b-av.json``."""
    compile_bundle(data_dir / "av-qwen2", tmp_path / "bundle", target=target, encoder_weights="int8")
    bundle = Bundle.open(tmp_path / "bundle")
    limits = default_limits(bundle.manifest, max_length=256)
    built = list(build_bundle(bundle, library, CAPABILITIES, limits))
    assert [(each.reason, each.unfused) for each in built] == [("there is no engine yet", 0)] * 6


def test_the_shipped_captioner_builds(library, tmp_path):
    for weights, new in (("fp16", 6), ("int4", 1)):
        done = compile_bundle(
            SHIPPED_BASE, tmp_path / weights, adapter=SHIPPED_ADAPTER, weights=weights, target="tensorrt-rtx"
        )
        bundle = Bundle.open(done.path)
        built = list(build_bundle(bundle, library, CAPABILITIES, default_limits(bundle.manifest)))
        assert (len(built), sum(each.reason is not None for each in built)) == (6, new)


def test_only_what_depends_on_it_is_built_again(compiled, library):
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "tensorrt-rtx"))
    list(build_bundle(bundle, library, CAPABILITIES, default_limits(bundle.manifest, max_length=256)))
    longer = build_bundle(bundle, library, CAPABILITIES, default_limits(bundle.manifest, max_length=512))
    reasons = {each.name: each.reason for each in longer}
    decoder = reasons.pop("decoder")
    assert decoder is not None
    assert decoder.startswith("the sizes differ (wanted chunk 512, max_length 512, built chunk 256, max_length 256")
    assert set(reasons.values()) == {None}


def test_the_cache_is_bound_in_place(compiled, library):
    """The engine itself says that its cache output is its cache input, and takes one-token steps of several rows."""
    bundle = Bundle.open(compiled("av-qwen2", "int4", "tensorrt-rtx"))
    (part,) = (part for part in parts(bundle) if part.name == "decoder")
    seen = {}

    class Spy:
        """TensorRT's network as the parser made it."""

        def __init__(self, module):
            self._module = module

        def __getattr__(self, name):
            return getattr(self._module, name)

        def OnnxParser(self, network, logger):
            seen["network"] = network
            return self._module.OnnxParser(network, logger)

    limits = default_limits(bundle.manifest, max_length=256, rows=4)
    spied = type(library)(library.target, Spy(library.module))
    shapes = profiles(part.name, part.component, bundle.manifest, limits)
    plan = build_engine(spied, part.graph, shapes, max_length=256, capabilities=CAPABILITIES)
    # TensorRT builds attention with a kernel of its own or, unless it may be taken apart, not at all.
    assert plan.unfused == 0
    network = seen["network"]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    trt, layers = library.module, bundle.manifest.decoder.num_layers
    assert kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 2 * layers
    assert kinds.count(trt.LayerType.ATTENTION_INPUT) == kinds.count(trt.LayerType.ATTENTION_OUTPUT) == layers
    int4 = [
        network.get_layer(i)
        for i in range(network.num_layers)
        if network.get_layer(i).type == trt.LayerType.DEQUANTIZE
        and network.get_layer(i).get_input(0).dtype == trt.DataType.INT4
    ]
    assert len(int4) == 7 * layers + 1


def test_attention_without_a_kernel_is_taken_apart_and_told(compiled, capsys):
    """float32 has none. The bundle is for comparing with PyTorch, and builds all the same."""
    bundle = str(compiled("clip-mistral", "fp32", "tensorrt-rtx"))
    assert cli(["build", bundle, "--compute-capability", "8.9", "--max-length", "256", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split()[0] for line in lines if "attention has no kernel of its own" in line]
    assert told == ["vision", "decoder"]


# --- what can go wrong


def test_capabilities(library):
    assert parse_capabilities("120, 8.6,89,86", library) == ("8.6", "8.9", "12.0")
    for text in ("87", "8", "", "sm86", "86,,89"):
        with pytest.raises(
            TargetError, match=r"does not build for compute capability .*; it does for 7\.5, 8\.0, 8\.6"
        ):
            parse_capabilities(text, library)
    check_device(CAPABILITIES, "8.9", "x")
    with pytest.raises(TargetError, match=r"x was built for compute capability 8.6, 8.9, 12.0, but this GPU has 8.7"):
        check_device(CAPABILITIES, "8.7", "x")


def test_gpus_that_no_engine_runs_on(library, compiled, private_engines):
    """Hopper: TensorRT for RTX would build, and not load what it built."""
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "tensorrt-rtx"))
    with pytest.raises(TargetError, match=r"does not run on compute capability 9.0, but on 7.5, .*--target cuda or"):
        next(build_bundle(bundle, library, ("9.0",), default_limits(bundle.manifest), current=True))
    library.check_gpu("8.6")
    library.check_gpu("13.0")  # newer than this version; portable engines are for it


def test_a_library_that_is_not_there():
    with pytest.raises(TargetError, match="tensorrt is not installed: JetPack brings it"):
        load_library("tensorrt")


def test_sizes(compiled):
    manifest = Bundle.open(compiled("av-qwen2", "int4", "tensorrt-rtx")).manifest
    context = manifest.decoder.context_length
    assert default_limits(manifest).max_length <= context
    assert [default_limits(manifest, max_length=n).max_length for n in (2, 64, 65, context)] == [64, 64, 128, context]
    for wrong in (1, context + 1):
        with pytest.raises(OptionError, match=f"a row can hold 2 to {context} tokens, not {wrong}"):
            default_limits(manifest, max_length=wrong)


def test_a_bundle_of_another_dialect(compiled):
    done = run("build", compiled("clip-mistral", "fp32"), "--compute-capability", "86")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("compile the checkpoint with --target tensorrt-rtx")


def test_without_a_gpu_current_is_refused(compiled):
    done = run("build", compiled("clip-mistral", "fp16", "tensorrt-rtx"))
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    assert "no GPU to build for" in done.stderr.splitlines()[-1]
    assert "--compute-capability takes a list of 7.5" in done.stderr.splitlines()[-1]


def test_a_graph_that_tensorrt_refuses(library, tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"\x0a\x03abc")
    with pytest.raises(TargetError, match=r"vision.onnx: tensorrt-rtx [0-9.]+ builds no engine: .*at least one output"):
        build_engine(library, tmp_path / "vision.onnx", [], max_length=64, capabilities=CAPABILITIES)


def test_an_interrupted_build_stops_and_leaves_nothing(compiled, library):
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "tensorrt-rtx"))
    limits = default_limits(bundle.manifest, max_length=256)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "building decoder" and total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(build_bundle(bundle, library, CAPABILITIES, limits, progress=interrupt))
    reasons = {each.name: each.reason for each in build_bundle(bundle, library, CAPABILITIES, limits)}
    assert (reasons.pop("decoder"), reasons.pop("selection")) == ("there is no engine yet", "there is no engine yet")
    assert set(reasons.values()) == {None}


@pytest.mark.parametrize("moment", [0.4, 1.2, 2.0])
def test_a_killed_build_is_done_again(moment, compiled, tmp_path):
    bundle = compiled("clip-mistral", "fp16", "tensorrt-rtx")
    arguments = ["build", str(bundle), "--compute-capability", "86,89,120"]
    victim = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "intertitle" / "engines"
    assert len(list(folder.glob("*.engine"))) == len(list(folder.glob("*.json"))) == 5
    assert not list(folder.glob(".*"))


def test_two_builds_at_once(compiled):
    bundle = compiled("clip-mistral", "int4", "tensorrt-rtx")
    command = [
        sys.executable,
        "-c",
        "import sys; from intertitle.cli import main; sys.exit(main())",
        "build",
        str(bundle),
    ]
    command += ["--compute-capability", "86,89,120"]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate() for each in two]
    assert [each.returncode for each in two] == [0, 0]
    tables = [out.count("is there") for out, _ in said]
    assert sorted(tables) == [0, 5]
    # The one that came second said what it waits for, unless the first was through by then.
    waited = [err for out, err in said if out.count("is there")]
    assert "waiting for another build" in waited[0] or "building" not in waited[0]


def test_the_command_says_what_it_does(compiled, capsys):
    bundle = str(compiled("clip-mistral", "fp16", "tensorrt-rtx"))
    options = ["--compute-capability", "8.9", "--max-length", "256", "--rows", "2", "--memory", "1GiB", "--quiet"]
    assert cli(["build", bundle, *options]) == 0
    said = capsys.readouterr()
    assert "compute capability 8.9, rows of 256 tokens, 2 at once" in said.out
    assert said.err == ""
