"""Positions as an input of the decoder, and head sizes that the fused kernel does not rotate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import intertitle
import numpy as np
import onnx
import pytest
import torch
from intertitle.calibration.reference import Reference
from intertitle.calibration.verify import verify_bundle
from intertitle.errors import OptionError, TargetError
from intertitle.export.compile import compile_bundle
from intertitle.models import CaptionerCheckpoint, open_checkpoint
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.decoding import Decoding
from intertitle.runtime.inference import Inference
from intertitle.runtime.ort import OrtDecoder
from safetensors.torch import load_file, save_file

DEMO = Path(intertitle.__file__).parent / "calibration" / "clips" / "demo.mp4"


def relative_error(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def on_cpu(path: Path) -> OrtDecoder:
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    graph = bundle.file(manifest.components["decoder"].graph)
    return OrtDecoder(graph, manifest.decoder, bundle.embed, cache_dtype=manifest.cache_dtype)


def in_torch(checkpoint: CaptionerCheckpoint, rows: int, max_length: int) -> Inference:
    """The reference with positions as an input."""
    config = replace(checkpoint.config, decoder=replace(checkpoint.config.decoder, positions="explicit"))
    return Reference(CaptionerCheckpoint(checkpoint.checkpoint, config)).open(rows, max_length)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_counted_positions_give_the_same_captions(weights, compiled, expected):
    """A family that counts places, in the form whose positions are given: one input more, the same tokens."""
    frames = expected("clip-mistral")["frames_uint8"]
    captions, inputs = [], []
    for variant in ("clip-mistral", "clip-mistral-explicit"):
        bundle = compiled(variant, weights)
        captions.append(Captioner.load(bundle).caption(frames=frames, decoding=Decoding(max_new_tokens=32)))
        manifest = Bundle.open(bundle).manifest
        inputs.append([value.name for value in manifest.components["decoder"].inputs])
        assert manifest.decoder.positions == ("explicit" if variant.endswith("explicit") else "sequential")
    assert captions[0].token_ids == captions[1].token_ids
    assert [name for name in inputs[1] if name not in inputs[0]] == ["position_ids"]


def test_given_positions(compiled, data_dir):
    """In chunks, with gaps and repetitions, and what follows them, against PyTorch."""
    checkpoint = open_checkpoint(data_dir / "clip-mistral")
    random = np.random.default_rng(0)
    embeds = random.standard_normal((600, checkpoint.config.decoder.hidden_size)).astype(np.float32)
    positions = np.cumsum(random.integers(0, 4, 600))
    mine, theirs = on_cpu(compiled("clip-mistral-explicit")).open(2, 700), in_torch(checkpoint, 2, 700)
    logits = [each.prefill(0, embeds, 3, positions=positions) for each in (mine, theirs)]
    assert relative_error(*logits) < 1e-5
    for token in (5, 9):
        logits = [each.step(np.array([token])).copy() for each in (mine, theirs)]
        assert relative_error(*logits) < 1e-5
    # Without this the lines above could not tell given positions from counted ones.
    counted = on_cpu(compiled("clip-mistral-explicit")).open(1, 700)
    counted.prefill(0, embeds)
    assert relative_error(counted.step(np.array([5])), logits[0]) > 0.05


def test_transformers_has_the_same_rotation(data_dir):
    """The reference at given positions against transformers' Mistral."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(data_dir / "clip-mistral")
    decoder = checkpoint.config.decoder
    config = transformers.MistralConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.rms_norm_eps,
        rope_theta=decoder.rope_theta,
        max_position_embeddings=decoder.context_length,
        sliding_window=None,
    )
    model = transformers.MistralForCausalLM(config).eval()
    names = {name for name in checkpoint.checkpoint.tensors if "vision" not in name and "mm_projector" not in name}
    missing = model.load_state_dict(
        {name: checkpoint.checkpoint.tensor(name).float() for name in names if "inv_freq" not in name}, strict=True
    )
    assert not missing.missing_keys
    embeds = torch.randn(1, 20, decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 7, 7, 7, 8, 12, 13, 14, 20, 21, 25, 25, 26, 27, 28, 40, 41, 42])
    with torch.no_grad():
        # The position ids alone would be taken for several packed sequences.
        mask = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None]
        theirs = model(inputs_embeds=embeds, position_ids=positions[None], attention_mask=mask).logits[0].numpy()
    mine = in_torch(checkpoint, 1, 20).prefill(0, embeds[0].numpy(), 20, positions=positions.numpy())
    assert relative_error(mine, theirs) < 1e-5


def test_positions_that_cannot_be(compiled):
    decoder = on_cpu(compiled("clip-mistral-explicit"))
    embeds = np.zeros((3, decoder.spec.hidden_size), np.float32)
    inference = decoder.open(1, 16)
    with pytest.raises(OptionError, match="the position 4096, but the decoder's context is 4096"):
        inference.prefill(0, embeds, positions=np.array([0, 4096, 1]))
    for wrong in (np.arange(2), np.array([0, -1, 2])):
        with pytest.raises(ValueError, match="for 3 new tokens, or below 0"):
            inference.prefill(0, embeds, positions=wrong)
    inference.prefill(0, embeds, positions=np.array([0, 1, 4095]))
    with pytest.raises(OptionError, match="the position 4096"):
        inference.step(np.array([1]))
    counting = on_cpu(compiled("clip-mistral")).open(1, 16)
    with pytest.raises(ValueError, match="places in the row"):
        counting.prefill(0, embeds, positions=np.arange(3))


@pytest.fixture(scope="module")
def with_heads(data_dir, tmp_path_factory) -> Callable[[int], Path]:
    """``with_heads(size)``: the fixture's checkpoint with heads of another size, of random weights."""

    def make(size: int) -> Path:
        checkpoint = tmp_path_factory.mktemp("heads") / f"heads-{size}"
        shutil.copytree(data_dir / "clip-mistral", checkpoint)
        tensors = load_file(checkpoint / "model.safetensors")
        generator = torch.Generator().manual_seed(size)
        for name, value in tensors.items():
            if match := re.fullmatch(r"model\.layers\.\d+\.self_attn\.([qkvo])_proj\.weight", name):
                shape = (len(value), 4 * size) if match[1] == "o" else (len(value) // 32 * size, value.shape[1])
                tensors[name] = torch.randn(shape, generator=generator) * 0.1
        save_file(tensors, checkpoint / "model.safetensors")
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "head_dim": size}))
        return checkpoint

    return make


@pytest.mark.parametrize("size", [24, 40])
def test_heads_that_the_kernel_does_not_rotate(size, with_heads, tmp_path):
    """GroupQueryAttention of ONNX Runtime 1.23 to 1.32 rotates heads of multiples of 16, and takes those of 8."""
    checkpoint = with_heads(size)
    path = compile_bundle(checkpoint, tmp_path / "bundle", weights="fp32").path
    bundle = Bundle.open(path)
    shape = bundle.manifest.decoder
    assert (shape.head_dim, shape.positions) == (size, "explicit")
    graph = onnx.load(bundle.file("decoder.ort.onnx"), load_external_data=False).graph
    attributes = [onnx.helper.get_node_attr_value(n, "do_rotary") for n in graph.node if n.op_type[:5] == "Group"]
    assert attributes == [0] * shape.num_layers
    # From a clip to the greedy tokens, by PyTorch and by the bundle.
    report = verify_bundle(path, checkpoint, [DEMO], max_new_tokens=24)
    assert report.verdict == "PASS"
    (clip,) = report.clips
    assert clip.tokens is not None
    assert clip.tokens.equal == clip.tokens.compared >= 20


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_heads_that_nothing_takes(target, with_heads, tmp_path):
    with pytest.raises(TargetError, match=rf"target '{target}' takes .* a multiple of 8, but the decoder's have 20"):
        compile_bundle(with_heads(20), tmp_path / "bundle", target=target)
    assert not (tmp_path / "bundle").exists()
