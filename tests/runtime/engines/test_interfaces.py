"""What the code calls by name is there in the real libraries: the GPU's own tests run where there is one."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress

import pytest
from intertitle.errors import TargetError
from intertitle.runtime import cuda
from intertitle.runtime.engines import build, library, session


def test_cuda_python_has_every_name_that_is_used():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = set(re.findall(r"\b(?:api|_api|runtime)\.(cuda\w+)", inspect.getsource(cuda)))
    assert len(names) > 20
    assert [name for name in sorted(names) if not hasattr(runtime, name)] == []


@pytest.mark.parametrize(
    ("owner", "source", "pattern"),
    [
        ("IExecutionContext", session, r"\b(?:_context|context)\.(set_\w+|get_\w+|execute_\w+)"),
        ("ICudaEngine", session, r"\b_engine\.(create_\w+|num_\w+|get_\w+)"),
        ("IAttentionInputLayer", build, r"\blayer\.(attention|type)\b"),
        ("IAttention", build, r"\battention\.(\w+)"),
        ("IBuilderConfig", build, r"\bconfig\.(\w+)"),
        ("Builder", build, r"\bbuilder\.(\w+)"),
        ("INetworkDefinition", build, r"\bnetwork\.(\w+)"),
        ("OnnxParser", build, r"\bparser\.(\w+)"),
    ],
)
def test_tensorrt_has_every_name_that_is_used(owner, source, pattern):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    names = set(re.findall(pattern, inspect.getsource(source)))
    assert names
    assert [name for name in sorted(names) if not hasattr(getattr(trt, owner), name)] == []


def test_no_gpu_is_one_line():
    pytest.importorskip("cuda.bindings.runtime")
    with suppress(TargetError):
        gpu = cuda.Cuda()
        assert re.fullmatch(r"\d+\.\d", gpu.capability)
        assert library.built_for("current", library.load_library("tensorrt-rtx")) == ((gpu.capability,), True)
        return
    with pytest.raises(TargetError, match=r"\Ano NVIDIA GPU[^\n]*\Z"):
        cuda.Cuda()
