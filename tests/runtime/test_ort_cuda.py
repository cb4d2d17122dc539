"""The CUDA provider's path with the processor in its place: the same graphs, addresses, shapes and bookkeeping.

What is not seen here is CUDA itself: ``benchmarks/gpu.py`` runs the same comparisons on a GPU.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from intertitle.cli import main
from intertitle.errors import BundleError, OptionError, TargetError
from intertitle.models import open_checkpoint
from intertitle.runtime import cuda, ort_cuda
from intertitle.runtime.backends import CudaBackend, open_backend
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.decoding import Decoding
from intertitle.runtime.inference import Choice
from intertitle.runtime.ort import CPU, open_session
from intertitle.runtime.ort_cuda import cuda_provider, device_errors


@pytest.fixture
def backend(compiled, host, monkeypatch):
    """``backend(variant, weights)``: a bundle for the CUDA provider and its backend over the processor.

    Its ``sessions`` are the provider options that each graph was opened with; its ``runs`` the numbers that steps were
    captured under, in order; its ``released`` graphs and the numbers of what was captured and let go.
    """
    runs: list[str] = []
    released: list[tuple[str, int]] = []

    class Options:
        """``onnxruntime.RunOptions``, watched."""

        def __init__(self) -> None:
            self.real = onnxruntime.RunOptions()

        def add_run_config_entry(self, name: str, value: str) -> None:
            if name == "gpu_graph_id":
                runs.append(value)
            if name != "memory.enable_memory_arena_shrinkage":
                self.real.add_run_config_entry(name, value)

    def make(variant: str, weights: str = "fp16", **how):
        sessions = {}
        real = open_session

        def opened(graph, threads=None, providers=CPU):
            sessions[graph.name] = providers
            session = real(graph)

            def run(names, feeds, options=None):
                return session.run(names, feeds)

            def run_with_iobinding(binding, options):
                session.run_with_iobinding(binding.real, options.real)

            return SimpleNamespace(
                get_inputs=session.get_inputs,
                get_outputs=session.get_outputs,
                get_providers=lambda: ["CUDAExecutionProvider"],
                io_binding=lambda: _Binding(session.io_binding()),
                run=run,
                run_with_iobinding=run_with_iobinding,
                release_captured_graph=lambda number: released.append((graph.name, number)),
            )

        class _Binding:
            """The processor's memory under the name of the GPU's."""

            def __init__(self, binding) -> None:
                self.real = binding

            def bind_input(self, name, place, *rest):
                assert place == ("cpu" if name == "total_length" else "cuda")
                self.real.bind_input(name, "cpu", *rest)

            def bind_output(self, name, place, *rest):
                assert place == "cuda"
                self.real.bind_output(name, "cpu", *rest)

        monkeypatch.setattr(ort_cuda, "open_session", opened)
        monkeypatch.setattr(ort_cuda, "load_cuda_provider", lambda: "0.0.fake")
        monkeypatch.setattr(ort_cuda, "load_onnxruntime", lambda: SimpleNamespace(RunOptions=Options))
        monkeypatch.setattr(cuda, "Cuda", lambda: host)
        bundle = Bundle.open(compiled(variant, weights, "cuda"))
        made = CudaBackend(bundle, **how)
        made.sessions, made.runs, made.released = sessions, runs, released
        return bundle, made

    return make


@pytest.mark.parametrize("variant", ["av-qwen2", "clip-mistral", "clip-mixtral", "auroracap-keep", "internvl2"])
def test_captions_of_the_fixtures(variant, backend, expected):
    bundle, made = backend(variant)
    numbers, captioner = expected(variant), Captioner(bundle, made)
    assert captioner.device == "cuda, ONNX Runtime 0.0.fake on Host"
    mode = "audiovideo" if variant == "av-qwen2" else "video"
    name = next(name for name in (f"{mode}.greedy_tokens", "greedy_tokens") if name in numbers)
    sound = {"waveform": numbers["audio_int16"], "sample_rate": 16000} if mode == "audiovideo" else {}
    how = Decoding(max_new_tokens=len(numbers[name]))
    caption = captioner.caption(frames=numbers["frames_uint8"], decoding=how, **sound)
    assert caption.token_ids == numbers[name].tolist()
    assert captioner.open_inference(64).shortlist_size == 64
    # Prompts are not captured; steps and what selects behind them are, each under a number of its own.
    assert made.runs[:3] == ["-1", "1", "1"]
    captures = {
        graph: dict([providers[0]])["CUDAExecutionProvider"]["enable_cuda_graph"]
        for graph, providers in made.sessions.items()
    }
    assert {graph for graph, on in captures.items() if on == "1"} == {"decoder.ort.onnx", "selection.onnx"}


def test_contrast_of_the_fixture(backend, expected):
    """Two rows of different lengths in one step, combined by the selection graph."""
    bundle, made = backend("auroracap-keep")
    numbers = expected("auroracap-keep")
    want = numbers["contrastive_greedy_tokens.alpha0.5"].tolist()
    how = Decoding(contrast="temporal", contrast_alpha=0.5, max_new_tokens=len(want))
    caption = Captioner(bundle, made).caption(frames=numbers["frames_uint8"], decoding=how)
    assert caption.token_ids == want


@pytest.mark.parametrize("variant", ["av-qwen2", "av-qwen2-explicit"])
def test_the_seam_with_all_its_methods(variant, backend, data_dir, agree, torch_inference, monkeypatch):
    """Prefill in chunks, steps of several rows, rows copied, swapped and cut, against PyTorch."""
    monkeypatch.setattr(ort_cuda, "PREFILL_CHUNK", 16)
    bundle, made = backend(variant)
    theirs = torch_inference(open_checkpoint(data_dir / "av-qwen2"), bundle.manifest.decoder)
    agree(made.decoder().open(3, 128), theirs, bundle.manifest.decoder, 5e-3)


def test_half_precision_caches_of_the_asked_size(backend, host):
    bundle, made = backend("av-qwen2", "int4")
    decoder, spec = made.decoder(), bundle.manifest.decoder
    before = host.allocated
    decoder.open(2, 64)
    cache = 2 * 64 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * 2
    assert cache <= host.allocated - before < cache + (1 << 20)
    with pytest.raises(OptionError, match=f"the decoder's context is {spec.context_length}"):
        decoder.open(1, spec.context_length + 1)


def test_a_cache_is_freed_when_it_is_let_go(backend):
    """With what was captured for it, and without waiting for the garbage collector: the next one needs its memory."""
    bundle, made = backend("clip-mistral")
    inference = made.decoder().open(2, 64)
    inference.prefill(0, np.full((4, bundle.manifest.decoder.hidden_size), 0.1, np.float32))
    inference.step(np.array([1]))
    inference.step_shortlist(np.array([1]), [Choice(0)])
    memory = [weakref.ref(each) for each in inference._cache.values()]
    gc.disable()
    try:
        del inference
        assert [each() for each in memory] == [None] * len(memory)
    finally:
        gc.enable()
    # Two kinds of steps of the decoder, and one of the selection.
    assert sorted(made.released) == [("decoder.ort.onnx", 1), ("decoder.ort.onnx", 2), ("selection.onnx", 1)]


def test_logits_of_an_earlier_step_are_not_given_for_those_of_this(backend):
    bundle, made = backend("clip-mistral")
    inference = made.decoder().open(1, 64)
    inference.prefill(0, np.full((4, bundle.manifest.decoder.hidden_size), 0.1, np.float32))
    (first,) = inference.step_shortlist(np.array([1]), [Choice(0)])
    ids, values = first.ids.copy(), first.logits.copy()
    assert first.fetch()[0][ids].tolist() == values.tolist()
    inference.step(np.array([2]))
    with pytest.raises(RuntimeError, match="earlier step"):
        first.fetch()


def test_options_of_a_component(backend, expected):
    bundle, made = backend(
        "clip-mistral", options={"vision": {"device": "cpu"}, "decoder": {"gpu_mem_limit": "1000", "device_id": "1"}}
    )
    numbers = expected("clip-mistral")
    Captioner(bundle, made).caption(frames=numbers["frames_uint8"], decoding=Decoding(max_new_tokens=2))
    assert "vision.onnx" not in made.sessions
    ((name, options),) = made.sessions["decoder.ort.onnx"]
    assert name == "CUDAExecutionProvider"
    assert (options["gpu_mem_limit"], options["device_id"]) == ("1000", "1")
    assert options["user_compute_stream"] == "7"
    with pytest.raises(OptionError, match=r"there is no component 'visoin'; there are vision, frame_connector"):
        backend("clip-mistral", options={"visoin": {}})


def test_a_session_that_cannot_be_captured_runs_without(backend, monkeypatch):
    bundle, made = backend("clip-mistral")
    opened = ort_cuda.open_session

    def refuse(graph, threads=None, providers=CPU):
        if providers[0][1]["enable_cuda_graph"] == "1":
            raise BundleError(f"{graph.name}: This session cannot use the graph capture feature: nodes on the CPU")
        return opened(graph, threads, providers)

    monkeypatch.setattr(ort_cuda, "open_session", refuse)
    inference = made.decoder().open(1, 64)
    inference.prefill(0, np.full((4, bundle.manifest.decoder.hidden_size), 0.1, np.float32))
    assert np.isfinite(inference.step(np.array([1]))).all()
    assert made.runs == ["-1", "-1"]
    assert made.device.endswith("on Host, steps not captured")


# --- what can go wrong


def test_a_build_without_cuda_is_named_and_the_processor_takes_over(compiled, expected):
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "cuda"))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(TargetError, match=r"is a build without CUDA: .* pip install 'intertitle\[cuda\]'"):
        open_backend(bundle, "cuda")
    captioner, numbers = Captioner.load(bundle.path), expected("clip-mistral")
    assert captioner.device == "cpu"
    (note,) = captioner.device_notes
    assert note.startswith("cuda: ONNX Runtime ")
    want = numbers["video.greedy_tokens"].tolist()
    caption = captioner.caption(frames=numbers["frames_uint8"], decoding=Decoding(max_new_tokens=len(want)))
    assert caption.token_ids == want


def test_a_bundle_of_float32_products_is_not_for_cuda(compiled):
    bundle = Bundle.open(compiled("clip-mistral", "fp32"))
    with pytest.raises(TargetError, match="is for cpu; for cuda compile the checkpoint with --target cuda"):
        open_backend(bundle, "cuda")
    with pytest.raises(OptionError, match="options are for ONNX Runtime on CUDA, the bundle is for cpu"):
        Captioner.load(bundle.path, options={"decoder": {"gpu_mem_limit": "1"}})


def test_no_gpu(compiled, monkeypatch):
    monkeypatch.setattr(ort_cuda, "load_cuda_provider", lambda: "1.31.1")
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "cuda"))
    try:
        cuda.Cuda()
    except TargetError:
        with pytest.raises(TargetError, match=r"no NVIDIA GPU|cuda-python is not installed|CUDA: "):
            open_backend(bundle, "cuda")
    else:
        pytest.skip("there is a GPU")


def test_a_provider_that_does_not_load(compiled, host, monkeypatch):
    """ONNX Runtime then goes on with the processor, and would be silently slow."""
    bundle = Bundle.open(compiled("clip-mistral", "fp16", "cuda"))
    monkeypatch.setattr(ort_cuda, "open_session", lambda graph, providers: open_session(graph))
    monkeypatch.setattr(ort_cuda, "load_cuda_provider", lambda: "0.0.fake")
    monkeypatch.setattr(cuda, "Cuda", lambda: host)
    told = r"CUDA provider does not load \(.+\): pip install 'intertitle\[cuda\]'"
    with pytest.raises(TargetError, match=told):
        open_backend(bundle, "cuda")
    backend, (note,) = open_backend(bundle)
    assert backend.device == "cpu"
    assert note.startswith("cuda: ONNX Runtime's CUDA provider does not load (")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Non-zero status: CUDA failure 2: out of\nmemory ; GPU=0", "too little memory: fewer or shorter rows"),
        ("BFCArena: Failed to allocate memory for requested buffer of size 12", "too little memory"),
        ("some kernel failed", "does not run on the GPU: some kernel failed"),
    ],
)
def test_what_onnx_runtime_raises(said, told):
    with pytest.raises(TargetError, match=told) as raised, device_errors("decoder"):
        raise RuntimeError(said)
    assert str(raised.value).startswith("decoder: ")
    assert "\n" not in str(raised.value)


def test_a_broken_graph_stays_the_bundles_fault():
    with pytest.raises(BundleError, match="no graph"), device_errors("decoder"):
        raise BundleError("no graph")


def test_a_device_without_room_for_the_cache(backend, host, monkeypatch):
    _, made = backend("clip-mistral")
    decoder = made.decoder()

    def allocate(size: int):
        raise TargetError("the GPU has 12 MiB left, 34 MiB are needed: fewer or shorter rows?")

    monkeypatch.setattr(host, "allocate", allocate)
    with pytest.raises(TargetError, match="12 MiB left"):
        decoder.open(64, 256)


def test_the_providers_options(host):
    """Numbers as text, the caller's over ours."""
    name, options = cuda_provider(host, {"arena_extend_strategy": "kNextPowerOfTwo"}, captures=True)
    assert (name, options["arena_extend_strategy"]) == ("CUDAExecutionProvider", "kNextPowerOfTwo")
    assert options["user_compute_stream"] == str(host.stream)


def test_the_commands_say_where_it_runs(compiled, repo_dir, capsys):
    """A bundle for the GPU on a machine without one: a line on stderr, the caption alone on stdout."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    bundle, clip = str(compiled("clip-mistral", "fp16", "cuda")), str(repo_dir / "calibration" / "clips" / "demo.mp4")
    assert main(["caption", bundle, clip, "--max-new-tokens", "2", "--quiet"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err.startswith("intertitle: running on cpu, not on cuda: ONNX Runtime ")
    assert main(["info", bundle]) == 0
    said = capsys.readouterr().out
    assert "runs here on cpu" in said
    assert "does not run here on cuda: ONNX Runtime" in said
    assert main(["caption", bundle, clip, "--device", "cuda", "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
