"""Staged residency: never two components loaded, and the same caption."""

from __future__ import annotations

import gc
import weakref

import pytest
from intertitle.calibration.render import random_scene, write_clip
from intertitle.runtime.backends import OrtBackend
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.captioner import Captioner
from intertitle.runtime.decoding import Decoding


class Watched(OrtBackend):
    """Notes what is alive when something is loaded."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.alive: dict[str, weakref.ref] = {}
        self.beside: list[tuple[str, set[str]]] = []

    def _note(self, name: str, loaded):
        gc.collect()
        self.beside.append((name, {other for other, held in self.alive.items() if held() is not None}))
        self.alive[name] = weakref.ref(loaded)
        return loaded

    def component(self, name, graph):
        return self._note(name, super().component(name, graph))

    def decoder(self):
        return self._note("decoder", super().decoder())


@pytest.mark.parametrize("contrast", [None, "temporal", "noise"])
@pytest.mark.parametrize("confidence", [None, 0.0, -100.0])
def test_one_component_at_a_time(contrast, confidence, compiled, expected):
    """The contrasted view too, whether a confident caption needs it or not (0: never sure, -100: always)."""
    if contrast is None and confidence is not None:
        pytest.skip("confidence decides on a contrast")
    bundle, numbers = Bundle.open(compiled("av-qwen2")), expected("av-qwen2")
    media = {"frames": numbers["frames_uint8"], "waveform": numbers["audio_int16"], "sample_rate": 16000}
    how = Decoding(max_new_tokens=6, contrast=contrast, confidence=confidence)
    together, staged = Watched(bundle), Watched(bundle)
    want = Captioner(bundle, together).caption(**media, decoding=how)
    assert len(want.passes) == (2 if contrast and confidence == 0.0 else 1)
    captioner = Captioner(bundle, staged, staged=True)
    for _ in range(2):
        assert captioner.caption(**media, decoding=how).token_ids == want.token_ids
    assert [len(beside) for _, beside in together.beside] == [0, 1, 2, 3, 4]
    loads = [name for name, _ in staged.beside]
    encoders = ["vision", "frame_connector", "connector", "audio"]
    view = {None: [], "temporal": ["connector"], "noise": ["vision", "frame_connector", "connector"]}[contrast]
    assert loads == [*encoders, *view, "decoder"] * 2
    assert all(others == set() for _, others in staged.beside)


def test_a_prepared_clip_serves_any_decoding_later(compiled, expected):
    """One component at a time, where the decoder is loaded when the contrast is first asked for."""
    bundle, frames = Bundle.open(compiled("av-qwen2")), expected("av-qwen2")["frames_uint8"]
    watched = Watched(bundle)
    captioner, free = Captioner(bundle, watched, staged=True), Captioner(bundle)
    prepared = captioner.prepare(frames=frames)
    for contrast in (None, "temporal", "noise", "temporal"):
        how = Decoding(max_new_tokens=6, contrast=contrast)
        assert (
            captioner.caption(prepared, decoding=how).token_ids == free.caption(frames=frames, decoding=how).token_ids
        )
    how = Decoding("sample", max_new_tokens=4, contrast="noise")
    several = captioner.candidates(prepared, 3, decoding=how)
    theirs = free.candidates(frames=frames, count=3, decoding=how)
    assert [each.token_ids for each in several] == [each.token_ids for each in theirs]
    assert all(others == set() for _, others in watched.beside)


def test_a_view_is_encoded_once_for_all_candidates(compiled, expected, monkeypatch):
    captioner = Captioner(Bundle.open(compiled("av-qwen2")))
    made = []
    contrast = captioner.encoder.contrast

    def count(clip, encoded, view, stages):
        made.append(view)
        return contrast(clip, encoded, view, stages)

    monkeypatch.setattr(captioner.encoder, "contrast", count)
    for kind, views in (("temporal", 1), ("noise", 3)):
        made.clear()
        how = Decoding("sample", max_new_tokens=2, contrast=kind)
        captioner.candidates(frames=expected("av-qwen2")["frames_uint8"], count=3, decoding=how)
        assert len(made) == len(set(made)) == views


def test_a_batch_takes_its_clips_one_after_the_other(compiled, tmp_path):
    paths = [tmp_path / f"{seed}.mp4" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_clip(random_scene(seed, size=(64, 48), fps=8, seconds=1.0), path)
    bundle = Bundle.open(compiled("av-qwen2"))
    watched, how = Watched(bundle), Decoding(max_new_tokens=4, contrast="temporal")
    captions = [
        {one.index: one.caption.token_ids for one in captioner.caption_batch(paths, decoding=how, isolate=False)}
        for captioner in (Captioner(bundle, watched, staged=True), Captioner(bundle))
    ]
    assert captions[0] == captions[1]
    assert [name for name, _ in watched.beside].count("decoder") == 3
    assert all(others == set() for _, others in watched.beside)
