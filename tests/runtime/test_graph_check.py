"""Graphs that a bundle may not hold, made by the onnx package, and what ONNX Runtime would have done with them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intertitle.errors import BundleError
from intertitle.runtime.bundle import Bundle
from intertitle.runtime.graph_check import check_graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
FLOAT, INT32, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
node, value_info, attribute = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.helper.make_attribute

DATA, SIZE = "x.onnx.data", 64


def external(location: str, **entries: str) -> Any:
    """A float32 tensor [4] whose data lie in another file."""
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*nodes: Any, tensors: Any = (), inputs: Any = None, functions: Any = ()) -> bytes:
    """A model that adds ``w`` to its input, unless there are other nodes."""
    nodes = nodes or (node("Add", ["x", "w"], ["y"]),)
    inputs = [value_info("x", FLOAT, ["rows", 4])] if inputs is None else inputs
    graph = onnx.helper.make_graph(list(nodes), "g", inputs, [value_info("y", FLOAT, ["rows", 4])], list(tensors))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(
        graph, functions=list(functions), opset_imports=opsets, ir_version=10
    ).SerializeToString()


def body() -> Any:
    """A loop's body that counts and never ends."""
    inputs = [value_info("i", INT64, []), value_info("on", onnx.TensorProto.BOOL, []), value_info("a", FLOAT, [4])]
    outputs = [value_info("more", onnx.TensorProto.BOOL, []), value_info("b", FLOAT, [4])]
    return onnx.helper.make_graph(
        [node("Identity", ["on"], ["more"]), node("Identity", ["a"], ["b"])], "body", inputs, outputs
    )


def attention(lengths: str, total: str) -> bytes:
    """Attention over a cache of 8 slots, with lengths from the named values."""
    inputs = [value_info("x", FLOAT, [1, 1, 16]), value_info("n", INT32, [1]), value_info("t", INT32, [])]
    inputs += [value_info(name, FLOAT, [1, 1, 8, 16]) for name in ("k", "v")]
    constants = [
        onnx.helper.make_tensor("far", INT32, [1], [1_000_000]),
        onnx.helper.make_tensor("most", INT32, [], [1_000_001]),
    ]
    names = ["x", "x", "x", "k", "v", lengths, total]
    group = node("GroupQueryAttention", names, ["y", "p", "q"], domain="com.microsoft", num_heads=1, kv_num_heads=1)
    return model(node("Identity", ["far"], ["moved"]), group, tensors=constants, inputs=inputs)


def with_tensor(tensor: Any) -> bytes:
    constant = node("Constant", [], ["w"])
    constant.attribute.append(attribute("value", tensor))
    return model(constant, node("Add", ["x", "w"], ["y"]))


def foreign_function() -> bytes:
    function = onnx.helper.make_function(
        "own", "f", ["a"], ["b"], [node("Identity", ["a"], ["b"])], [onnx.helper.make_opsetid("", 21)]
    )
    return model(functions=[function])


def sparse() -> bytes:
    values = onnx.helper.make_tensor("w", FLOAT, [1], [1.0])
    tensor = onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor("i", INT64, [1], [0]), [4])
    whole = onnx.ModelProto.FromString(model())
    whole.graph.sparse_initializer.append(tensor)
    return whole.SerializeToString()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a file beside": (lambda: model(tensors=[external("secret.bin")]), "'secret.bin', which is not the graph's"),
    "a file above": (lambda: model(tensors=[external("../secret.bin")]), "'../secret.bin', which is not"),
    "an absolute path": (lambda: model(tensors=[external("/etc/passwd")]), "'/etc/passwd', which is not"),
    "its file by a detour": (lambda: model(tensors=[external(f"./{DATA}")]), "which is not the graph's"),
    "memory": (lambda: model(tensors=[external("*/_ORT_MEM_ADDR_/*")]), "which is not the graph's"),
    "no file": (lambda: model(tensors=[external("")]), "'', which is not the graph's"),
    "beyond the end": (lambda: model(tensors=[external(DATA, offset="49")]), "beyond the end"),
    "beyond all numbers": (lambda: model(tensors=[external(DATA, offset="9" * 400)]), "does not say where"),
    "a negative offset": (lambda: model(tensors=[external(DATA, offset="-16")]), "does not say where"),
    "no length": (lambda: model(tensors=[external(DATA, length="")]), "does not say where"),
    "another key": (lambda: model(tensors=[external(DATA, basepath="/etc")]), "'basepath'"),
    "an attribute elsewhere": (lambda: with_tensor(external(DATA)), "attribute has its data in another file"),
    "a loop": (
        lambda: model(node("Loop", ["", "", "x"], ["y"], body=body())),
        "control flow",
    ),
    "a subgraph of another name": (lambda: model(node("Add", ["x", "x"], ["y"], body=body())), "subgraph"),
    "a function": (foreign_function, "functions of its own"),
    "a foreign domain": (lambda: model(node("Run", ["x"], ["y"], domain="evil")), "'Run' of 'evil'"),
    "another fused operator": (
        lambda: model(node("Tokenizer", ["x"], ["y"], domain="com.microsoft")),
        "'Tokenizer' of 'com.microsoft'",
    ),
    "memory for nothing": (lambda: model(node("ConstantOfShape", ["x"], ["y"])), "'ConstantOfShape'"),
    "sparse tensors": (sparse, "sparse"),
    "a constant length": (lambda: attention("far", "t"), "GroupQueryAttention takes a length"),
    "a constant total": (lambda: attention("n", "most"), "GroupQueryAttention takes a length"),
    "a constant length that was moved": (lambda: attention("moved", "t"), "GroupQueryAttention takes a length"),
    "no length at all": (lambda: attention("", "t"), "GroupQueryAttention takes a length"),
    "two graphs": (lambda: model() * 2, "not an ONNX model"),
    "nothing": (lambda: b"", "not an ONNX model"),
    "a group": (lambda: b"\x3b", "malformed protobuf"),
    "a number without an end": (lambda: b"\xff" * 64, "malformed protobuf"),
    "a field beyond the end": (lambda: b"\x3a\xff\xff\xff\xff\x0f", "ends in the middle"),
    "a text": (lambda: b"version https://git-lfs", "not an ONNX model"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(case: str):
    make, message = HOSTILE[case]
    with pytest.raises(BundleError) as caught:
        check_graph(make(), DATA, SIZE)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_accepted():
    facts = check_graph(model(tensors=[external(DATA, offset="48")]), DATA, SIZE)
    assert [(value.name, value.dtype, value.shape) for value in facts.inputs] == [("x", "float32", ["rows", 4])]
    assert [(value.name, value.dtype, value.shape) for value in facts.outputs] == [("y", "float32", ["rows", 4])]
    inside = onnx.helper.make_tensor("w", FLOAT, [4], [1, 2, 3, 4])
    check_graph(with_tensor(inside), None, 0)
    assert [value.name for value in check_graph(attention("n", "t"), None, 0).inputs] == ["x", "n", "t", "k", "v"]


def test_a_length_that_is_an_input_with_a_constant_behind_it():
    whole = onnx.ModelProto.FromString(attention("n", "t"))
    whole.graph.initializer.append(onnx.helper.make_tensor("n", INT32, [1], [1_000_000]))
    with pytest.raises(BundleError, match="GroupQueryAttention takes a length"):
        check_graph(whole.SerializeToString(), None, 0)


def test_a_field_twice_is_looked_at_twice():
    """Protobuf joins two values of one field, so the harmless one must not hide the other."""
    first, second = (onnx.ModelProto.FromString(model(tensors=[tensor])) for tensor in (external(DATA), external("/x")))
    joined = first.graph.SerializeToString() + second.graph.SerializeToString()
    data, size = bytes([0x3A]), len(joined)
    while size > 127:
        data, size = data + bytes([size & 127 | 128]), size >> 7
    with pytest.raises(BundleError, match="which is not the graph's"):
        check_graph(data + bytes([size]) + joined, DATA, SIZE)


def test_the_runtime_is_never_asked_to_open_another_file(
    tmp_path: Path, write_bundle: Any, manifest_json: dict[str, Any], bundle_files: dict[str, bytes]
):
    """ONNX Runtime before 1.24.1 gives the contents of the secret as its output; later ones refuse on their own."""
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    bundle_files["connector.onnx"] = model(tensors=[external("../secret.bin")])
    path = write_bundle(tmp_path / "bundle")
    version = tuple(int(part) for part in ort.__version__.split(".")[:3])
    if version < (1, 24, 1):
        session = ort.InferenceSession(str(path / "connector.onnx"), providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": np.zeros((1, 4), np.float32)})[0].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert "'connector.onnx': the tensor 'w' has its data in '../secret.bin'" in str(caught.value)


def test_other_inputs_than_the_manifest_says(tmp_path: Path, write_bundle: Any, manifest_json: dict[str, Any]):
    # Any number of frames is right for the manifest, but the graph does not take three alone.
    manifest_json["components"]["vision"]["inputs"][0]["shape"][0] = 3
    with pytest.raises(BundleError, match=r"'vision.onnx': its inputs are not those in bundle.json \('pixel_values"):
        Bundle.open(write_bundle(tmp_path / "bundle"))


def test_bytes_changed_at_random_end_the_walk_soon():
    """Right or refused, within a second, whatever the bytes."""
    seeds = [attention("n", "t"), model(tensors=[external(DATA)]), with_tensor(external(DATA))]
    chance, refused, longest = random.Random(0), 0, 0.0
    for _ in range(3000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        began = time.perf_counter()
        try:
            check_graph(bytes(data), DATA, SIZE)
        except BundleError as error:
            refused += str(error).isprintable()
        longest = max(longest, time.perf_counter() - began)
    assert 1000 < refused < 3000
    assert longest < 1
