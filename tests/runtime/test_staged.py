"""Staged residency: never two components loaded, and the same caption."""

from __future__ import annotations

import gc
import weakref

import pytest
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


@pytest.mark.parametrize("contrast", [None, "temporal"])
def test_one_component_at_a_time(contrast, compiled, expected):
    bundle, numbers = Bundle.open(compiled("av-qwen2")), expected("av-qwen2")
    media = {"frames": numbers["frames_uint8"], "waveform": numbers["audio_int16"], "sample_rate": 16000}
    how = Decoding(max_new_tokens=6, contrast=contrast)
    together, staged = Watched(bundle), Watched(bundle)
    want = Captioner(bundle, together).caption(**media, decoding=how)
    captioner = Captioner(bundle, staged, staged=True)
    for _ in range(2):
        assert captioner.caption(**media, decoding=how).token_ids == want.token_ids
    assert [len(beside) for _, beside in together.beside] == [0, 1, 2, 3, 4]
    loads = [name for name, _ in staged.beside]
    assert loads[:5] == ["vision", "frame_connector", "connector", "audio", "decoder"]
    assert loads.count("vision") == loads.count("decoder") == 2
    # The contrasted view is connected once the decoder is there.
    beside = [(name, others) for name, others in staged.beside if others]
    assert beside == ([] if contrast is None else [("connector", {"decoder"})] * 2)
