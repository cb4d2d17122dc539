"""The devices on which bundles run, as records. ``runtime/backends.py`` opens them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device, or a runtime for a device, that ``--device`` may name.

    ``runtime``: what opens it (a key of ``runtime/backends.py``). ``needs``: the hardware and what the system brings.
    ``install``: how a user installs the runtime. ``modules``: the Python modules of the runtime, in the order in which
    they are tried. ``options``: the runtime takes options for each component.
    """

    name: str
    runtime: str
    needs: str
    install: str
    modules: tuple[str, ...]
    options: bool = False


_TENSORRT = Device(
    "tensorrt",
    runtime="tensorrt",
    needs="an NVIDIA GPU (data centre, Jetson)",
    install="JetPack brings it (apt install python3-libnvinfer); elsewhere pip install 'intertitle[tensorrt]'",
    modules=("tensorrt",),
)

DEVICES = {
    each.name: each
    for each in (
        Device(
            "cpu",
            runtime="onnxruntime",
            needs="a processor",
            install="pip install 'intertitle[cpu]'",
            modules=("onnxruntime",),
        ),
        Device(
            "cuda",
            runtime="onnxruntime-cuda",
            needs="an NVIDIA GPU",
            install="pip install 'intertitle[cuda]'",
            modules=("onnxruntime",),
            options=True,
        ),
        Device(
            "tensorrt-rtx",
            runtime="tensorrt",
            needs="an NVIDIA GPU (desktop)",
            install="pip install 'intertitle[tensorrt-rtx]'",
            modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        ),
        _TENSORRT,
        Device("tensorrt-10.3", _TENSORRT.runtime, "a Jetson with JetPack 6", _TENSORRT.install, _TENSORRT.modules),
    )
}
