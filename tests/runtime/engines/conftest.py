"""A TensorRT that is none: its graphs run in ONNX Runtime on the processor, over the memory of ``HostDevice``.

What a session does with addresses, shapes, profiles and captured work is the real thing, and a wrong one shows in the
numbers: tensors are read from and written to exactly the addresses that were bound.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.engine.device.stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self.engine.profiles[self.profile].get(name) if self.engine.profiles else None
        if ranges is not None and not all(a <= b <= c for a, b, c in zip(ranges[0], shape, ranges[2], strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for given, value in self.engine.inputs.items():
            sizes |= {axis: self.shapes[given][i] for i, axis in enumerate(value.shape) if isinstance(axis, str)}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.engine.outputs[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.device.stream
        addresses, shapes, device = dict(self.addresses), dict(self.shapes), self.engine.device

        def run() -> None:
            assert (addresses, shapes) == (self.addresses, self.shapes), "a captured context was changed"
            feeds = {
                name: device.at(addresses[name], shapes[name], _TYPES[value.type])
                for name, value in self.engine.inputs.items()
            }
            results = self.engine.session.run(None, feeds)
            for (name, value), result in zip(self.engine.outputs.items(), results, strict=True):
                device.at(addresses[name], result.shape, _TYPES[value.type])[...] = result

        self.engine.device.queue(run)
        return True


class FakeRuntimeConfig:
    """``IRuntimeConfig`` of TensorRT for RTX."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> None:
        self.cache = cache


class FakeEngine:
    def __init__(self, graph: str, profiles: list, device) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.profiles, self.device, self.contexts = profiles, device, []
        self.num_optimization_profiles = max(len(profiles), 1)
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, settings: FakeRuntimeConfig | str) -> FakeContext:
        assert getattr(settings, "strategy", settings) == "on profile change"
        context = FakeContext(self)
        self.contexts.append((settings, weakref.ref(context)))
        return context


class FakeLibrary:
    """``library.Library`` whose plans are graphs' paths. ``profiles``: by graph, as they were built."""

    target, version = "tensorrt-rtx", "0.0.fake"

    def __init__(self, device) -> None:
        self.profiles: dict[str, list] = {}
        library = self

        class Runtime:
            def __init__(self, logger) -> None: ...

            def deserialize_cuda_engine(self, plan: bytes):
                graph = plan.decode(errors="replace")
                return FakeEngine(graph, library.profiles[graph], device) if graph in library.profiles else None

        strategies = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")
        self.module = SimpleNamespace(
            Runtime=Runtime,
            ExecutionContextAllocationStrategy=strategies,
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
            TensorIOMode=SimpleNamespace(INPUT="in"),
            __version__=self.version,
        )

    def check_gpu(self, capability: str) -> None: ...

    def logger(self, heard: list[str]) -> object:
        heard.append("complaint of TensorRT")
        return object()


@pytest.fixture
def fake_library(host) -> FakeLibrary:
    return FakeLibrary(host)


@pytest.fixture
def private_engines(tmp_path, monkeypatch):
    """An engine cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
