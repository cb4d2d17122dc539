"""Sessions over engines: the same captions as the original implementations, on a GPU that is none (``conftest``)."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from intertitle.errors import OptionError, TargetError
from intertitle.models import open_checkpoint
from intertitle.runtime.backends import EngineBackend, open_backend
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.cuda import Cuda
from intertitle.runtime.decoding import Decoding
from intertitle.runtime.decoding.scores import Combination, LogNormalizer
from intertitle.runtime.engines.builder import origin, parts
from intertitle.runtime.engines.cache import EngineCache
from intertitle.runtime.engines.shapes import default_limits, profiles
from intertitle.runtime.inference import Choice
from PIL import Image

pytestmark = pytest.mark.usefixtures("private_engines")


@pytest.fixture
def build(compiled, fake_library, host):
    """``build(variant, weights)``: a bundle whose engines are "built", and its backend."""

    def make(variant: str, weights: str = "fp32", **sizes):
        bundle = Bundle.open(compiled(variant, weights, "tensorrt-rtx"))
        limits = default_limits(bundle.manifest, **sizes)
        for part in parts(bundle):
            plan = str(part.graph)
            fake_library.profiles[plan] = profiles(part.name, part.component, bundle.manifest, limits)
            wanted = origin(bundle, part, fake_library, (host.capability,), limits)
            EngineCache.open().store(wanted, plan.encode())
        return bundle, EngineBackend(bundle, "tensorrt-rtx", fake_library, host)

    return make


@pytest.mark.parametrize(
    "variant", ["av-qwen2", "clip-mistral", "clip-mistral-explicit", "clip-mixtral", "auroracap-keep", "internvl2"]
)
def test_captions_of_the_fixtures(variant, build, expected):
    bundle, backend = build(variant)
    numbers, captioner = expected(variant), Captioner(bundle, backend)
    assert captioner.device == "tensorrt-rtx 0.0.fake on Host"
    mode = "audiovideo" if variant == "av-qwen2" else "video"
    name = next(name for name in (f"{mode}.greedy_tokens", "greedy_tokens") if name in numbers)
    sound = {"waveform": numbers["audio_int16"], "sample_rate": 16000} if mode == "audiovideo" else {}
    how = Decoding(max_new_tokens=len(numbers[name]))
    caption = captioner.caption(frames=numbers["frames_uint8"], decoding=how, **sound)
    assert caption.token_ids == numbers[name].tolist()


def test_contrast_of_the_fixture(build, expected):
    """Two rows of different lengths in one step."""
    bundle, backend = build("auroracap-keep", rows=2)
    numbers = expected("auroracap-keep")
    want = numbers["contrastive_greedy_tokens.alpha0.5"].tolist()
    how = Decoding(contrast="temporal", contrast_alpha=0.5, max_new_tokens=len(want))
    caption = Captioner(bundle, backend).caption(frames=numbers["frames_uint8"], decoding=how)
    assert caption.token_ids == want


def test_steps_are_captured_once_for_each_number_of_rows(build, expected, host):
    bundle, backend = build("clip-mistral")
    numbers, captioner = expected("clip-mistral"), Captioner(bundle, backend)
    for contrast in ("temporal", None, "temporal", None):
        captioner.caption(frames=numbers["frames_uint8"], decoding=Decoding(max_new_tokens=6, contrast=contrast))
    assert host.captures == 2
    # The first step of each number of rows runs as it is; five of six tokens take a step.
    assert host.launches == 4 * 5 - 2


def test_captured_steps_keep_their_contexts(build, host, gpu):
    """What a captured graph works in belongs to its execution context, which must live as long."""
    host.capture = gpu.capture
    bundle, backend = build("clip-mistral")
    decoder = backend.decoder()
    inference = decoder.open(1, 64)
    inference.prefill(0, np.full((9, bundle.manifest.decoder.hidden_size), 0.1, np.float32))
    inference.step(np.array([3]))
    gc.collect()
    contexts = decoder._engine._engine.contexts
    assert [settings.dynamic_shapes_kernel_specialization_strategy for settings, _ in contexts] == ["lazy", "eager"]
    assert contexts[0][0].cache is contexts[1][0].cache
    assert all(context() is not None for _, context in contexts)
    inference.step(np.array([3]))
    assert gpu._api.launched == ["executable of graph"]
    del inference
    gc.collect()
    assert all(context() is None for _, context in contexts)
    assert gpu._api.given_back == ["graph", "executable of graph"]


def test_a_tensorrt_without_settings_of_a_context(build, expected, monkeypatch):
    """TensorRT before 10.11."""
    bundle, backend = build("clip-mistral")
    monkeypatch.delattr(type(backend.decoder()._engine._engine), "create_runtime_config")
    numbers = expected("clip-mistral")
    caption = Captioner(bundle, backend).caption(frames=numbers["frames_uint8"], decoding=Decoding(max_new_tokens=4))
    assert caption.token_ids == numbers["video.greedy_tokens"].tolist()[:4]


def test_a_step_that_cannot_be_captured_runs_without(build, expected, host):
    def refuse(work):
        raise TargetError("CUDA: StreamCaptureUnsupported")

    host.capture = refuse
    bundle, backend = build("clip-mistral")
    numbers, captioner = expected("clip-mistral"), Captioner(bundle, backend)
    caption = captioner.caption(frames=numbers["frames_uint8"], decoding=Decoding(max_new_tokens=6))
    assert caption.token_ids == numbers["video.greedy_tokens"].tolist()[:6]
    assert captioner.device == "tensorrt-rtx 0.0.fake on Host, steps not captured"


@pytest.mark.parametrize("variant", ["av-qwen2", "av-qwen2-explicit"])
def test_the_seam_with_all_its_methods(variant, build, data_dir, agree, torch_inference):
    """Prefill in chunks, steps of several rows, rows copied, swapped and cut, against PyTorch."""
    bundle, backend = build(variant, chunk=16, max_length=128, rows=3)
    theirs = torch_inference(open_checkpoint(data_dir / "av-qwen2"), bundle.manifest.decoder)
    agree(backend.decoder().open(3, 128), theirs, bundle.manifest.decoder, 1e-4)


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_half_precision_caches(weights, build, host):
    bundle, backend = build("av-qwen2", weights, max_length=64, rows=2)
    before = host.allocated
    inference, spec = backend.decoder().open(2, 64), bundle.manifest.decoder
    logits = inference.prefill(1, np.full((9, spec.hidden_size), 0.1, np.float32))
    assert np.isfinite(logits).all()
    cache = 2 * 64 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * 2
    assert cache <= host.allocated - before < cache + (1 << 20)


def test_a_batch_counts_and_keeps_the_rows_of_the_engine(build, tmp_path):
    """Every row is as long as the engine was built for, however short a caption is."""
    bundle, backend = build("clip-mistral", max_length=512, rows=2)
    captioner, image = Captioner(bundle, backend), tmp_path / "image.png"
    Image.new("RGB", (32, 32), "red").save(image)
    row = bundle.manifest.cache_bytes * 512

    def batch(memory):
        how = Decoding(max_new_tokens=2)
        (result,) = captioner.caption_batch([image], decoding=how, memory=memory, isolate=False)
        assert result.caption is not None
        return captioner._loaded.scheduler.inference

    first = batch(2 * row - 1)
    assert (first.rows, first.max_length) == (1, 512)
    assert batch(row) is first
    assert batch(2 * row).rows == 2
    with pytest.raises(OptionError, match="of cache, the limit is"):
        batch(row - 1)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_batch_asks_for_no_more_rows_than_the_engine_has(strategy, build, tmp_path):
    bundle, backend = build("clip-mistral", max_length=512, rows=2)
    captioner, image = Captioner(bundle, backend), tmp_path / "image.png"
    Image.new("RGB", (32, 32), "red").save(image)
    how = Decoding(strategy=strategy, num_beams=2 if strategy == "beam" else None, max_new_tokens=2)
    results = list(captioner.caption_batch([image] * 3, decoding=how, isolate=False))
    assert [result.error for result in results] == [None] * 3
    assert captioner._loaded.scheduler.inference.rows == 2


def test_more_than_the_engine_was_built_for(build):
    _, backend = build("clip-mistral", max_length=64, rows=2)
    decoder = backend.decoder()
    assert [decoder.row_length(wanted) for wanted in (1, 64, 65)] == [64, 64, 65]
    with pytest.raises(OptionError, match=r"65 tokens, the engine was built for 64: .* build --max-length 65"):
        decoder.open(1, 65)
    with pytest.raises(OptionError, match=r"3 rows are asked for, the engine was built for 2: .* --rows 3"):
        decoder.open(3, 64)
    inference = decoder.open(1, 64)
    inference.prefill(0, np.zeros((64, decoder.spec.hidden_size), np.float32))
    with pytest.raises(OptionError, match="the cache holds 64 tokens a row"):
        inference.step(np.array([1]))


def test_an_engine_that_tensorrt_refuses(build, fake_library):
    _, backend = build("clip-mistral")
    fake_library.profiles.clear()
    with pytest.raises(TargetError, match=r"decoder: TensorRT does not load the engine \(complaint of TensorRT\)"):
        backend.decoder()


def test_engines_of_another_gpu_version_or_place(build, compiled, fake_library, host):
    bundle = Bundle.open(compiled("clip-mistral", "fp32", "tensorrt-rtx"))
    with pytest.raises(TargetError, match="no engine of vision was built: run intertitle build"):
        EngineBackend(bundle, "tensorrt-rtx", fake_library, host)
    build("clip-mistral")
    host.capability = "12.0"
    with pytest.raises(TargetError, match=r"vision was built for compute capability 8.9, but this GPU has 12.0"):
        EngineBackend(bundle, "tensorrt-rtx", fake_library, host)
    host.capability, fake_library.version = "8.9", "9.9"
    with pytest.raises(TargetError, match=r"vision does not fit: TensorRT is 9.9, it was built with 0.0.fake"):
        EngineBackend(bundle, "tensorrt-rtx", fake_library, host)


def test_devices_and_bundles_that_do_not_go_together(compiled):
    cpu = Bundle.open(compiled("clip-mistral", "fp32"))
    engines = Bundle.open(compiled("clip-mistral", "fp32", "tensorrt-rtx"))
    with pytest.raises(TargetError, match="device 'tpu' is not supported; this version knows: auto, cpu, cuda"):
        open_backend(cpu, "tpu")
    with pytest.raises(TargetError, match="is for cpu; for tensorrt compile the checkpoint with --target tensorrt"):
        open_backend(cpu, "tensorrt")
    with pytest.raises(TargetError, match="is for tensorrt-rtx; for cpu compile the checkpoint with --target cpu"):
        open_backend(engines, "cpu")
    backend, notes = open_backend(cpu)
    assert (backend.device, notes) == ("cpu", [])


def test_auto_names_what_is_missing_of_every_device(compiled):
    """A bundle of the standard dialect is for both TensorRTs; here there is a GPU for none."""
    bundle = Bundle.open(compiled("clip-mistral", "fp32", "tensorrt-rtx"))
    try:
        Cuda()
    except TargetError:
        with pytest.raises(TargetError, match=r"^tensorrt-rtx: .*; tensorrt: tensorrt is not installed: JetPack"):
            open_backend(bundle)
    else:
        pytest.skip("there is a GPU")


def test_a_gpu_without_room_for_the_activations(build, monkeypatch):
    _, backend = build("clip-mistral")
    decoder = backend.decoder()
    monkeypatch.setattr(type(decoder._engine._engine), "create_execution_context", lambda self, strategy: None)
    with pytest.raises(
        TargetError, match=r"decoder: the GPU has too little memory for the engine's activations \(comp"
    ):
        decoder.open(1, 64)


def test_shortlists_behind_engines(build, expected):
    """Contrastive and greedy captions of one batch, chosen from shortlists, are those chosen from all logits."""
    bundle, backend = build("auroracap-keep", rows=3)
    numbers = expected("auroracap-keep")
    captioner = Captioner(bundle, backend)
    decoder = captioner.open_inference(64, rows=3)
    assert decoder.shortlist_size == 64
    embeds = np.random.default_rng(0).standard_normal((9, bundle.manifest.decoder.hidden_size)).astype(np.float32) * 0.1
    for row in range(3):
        decoder.prefill(row, embeds[: 9 - 3 * row])
    ids = np.array([3, 4, 5])
    first, second = decoder.step_shortlist(ids, [Choice(0, 1, 0.5, float(np.log(0.2))), Choice(2)])
    logits = [each.copy() for each in first.fetch()]
    scores = Combination(0.5, 0.2)(*logits).copy()
    kept = np.isfinite(first.scores)
    order = np.argsort(-scores, kind="stable")
    assert first.ids[kept].tolist() == order[: kept.sum()].tolist()
    assert first.normalizer == pytest.approx(LogNormalizer()(logits[0]), abs=1e-4)
    (alone,) = second.fetch()
    assert second.ids[0] == alone.argmax()
    assert second.scores.tolist() == second.logits.tolist()
    how = [Decoding(max_new_tokens=8, contrast="temporal"), Decoding(max_new_tokens=8)]
    mine = [captioner.caption(frames=numbers["frames_uint8"], decoding=each) for each in how]
    captioner = Captioner(bundle, backend)
    captioner._loaded.backend = _WithoutSelection(backend)
    theirs = [captioner.caption(frames=numbers["frames_uint8"], decoding=each) for each in how]
    assert [each.token_ids for each in mine] == [each.token_ids for each in theirs]
    for got, want in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(got.token_logprobs, want.token_logprobs, atol=1e-4)


class _WithoutSelection:
    """A backend whose decoder gives logits only."""

    def __init__(self, backend) -> None:
        self._backend, self.device, self.component = backend, backend.device, backend.component

    def decoder(self):
        decoder = self._backend.decoder()
        decoder._selection = None
        return decoder
