"""What the graph of a bundle may hold, checked in its bytes before a runtime sees it.

An ONNX file is a protobuf message. This module walks it without ``onnx``: the field numbers are those of ``onnx.proto``
in the onnx package, and protobuf's encoding documentation describes the bytes. The walk is needed since ONNX Runtime
before 1.24.1 opens any file that a graph names as its external data (microsoft/onnxruntime#26776), and since no runtime
stops a ``Loop`` that never ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import BundleError

#: Increased when the check becomes stricter, so that graphs that an older one passed are looked at again.
CHECK_VERSION = 1

#: Operators of ONNX itself, under both of its names.
_DOMAINS = frozenset({b"", b"ai.onnx"})
#: Operators of ONNX Runtime that graphs are compiled to. There are a hundred more, many of which trust their inputs.
_FUSED = frozenset(
    {
        b"GroupQueryAttention",
        b"MatMulNBits",
        b"MultiHeadAttention",
        b"QuickGelu",
        b"SkipSimplifiedLayerNormalization",
    }
)
#: Take their size from values instead of from inputs, so that a few bytes ask for any amount of memory.
_REFUSED_OPERATORS = frozenset({b"ConstantOfShape"})
#: Operators of control flow, by name beside their subgraphs, for a clear message.
_CONTROL_FLOW = frozenset({b"If", b"Loop", b"Scan", b"SequenceMap"})

#: The largest graph without its weights that is read; those of the released models take less than 4 MB.
MOST_GRAPH_BYTES = 64 << 20
#: Inputs of GroupQueryAttention that hold lengths: older kernels do not check them against the cache.
_GQA_LENGTHS = (5, 6)

#: ``TensorProto.DataType`` to the names in ``bundle.json``.
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


@dataclass
class GraphTensor:
    """An input or output of a graph; ``shape`` as in ``bundle.TensorSpec``."""

    name: str
    dtype: str | None = None
    shape: list[int | str] = field(default_factory=list)


@dataclass
class GraphFacts:
    """What a graph says of itself."""

    inputs: list[GraphTensor]
    outputs: list[GraphTensor]


def check_graph(data: bytes, data_file: str | None, data_size: int) -> GraphFacts:
    """Check a graph and return its inputs and outputs.

    ``data``: the file ``*.onnx``. ``data_file``: the only file that its weights may lie in, which has ``data_size``
    bytes; ``None``: it may have no external weights. ``BundleError``, without the file's name, for a graph that is not
    protobuf, names other files or bytes beyond the end, holds subgraphs, functions, sparse tensors or operators of a
    foreign domain, or feeds attention lengths that are constants.
    """
    graphs = []
    for number, value in _fields(memoryview(data)):
        if number == 7:
            graphs.append(_message(value))
        elif number == 25:
            raise BundleError("the graph defines functions of its own")
        elif number == 20:
            raise BundleError("the graph holds training information")
    if len(graphs) != 1:
        raise BundleError("not an ONNX model")
    return _Walk(data_file, data_size).graph(graphs[0])


class _Walk:
    def __init__(self, data_file: str | None, data_size: int) -> None:
        self._location = None if data_file is None else data_file.encode()
        self._data_size = data_size

    def graph(self, data: memoryview) -> GraphFacts:
        facts, constants, attentions = GraphFacts([], []), set[bytes](), list[list[bytes]]()
        for number, value in _fields(data):
            if number == 1:
                operator, inputs = self._node(_message(value))
                if operator == b"GroupQueryAttention":
                    attentions.append(inputs)
            elif number == 5:
                constants.add(self._tensor(_message(value), external=True))
            elif number in (11, 12):
                (facts.inputs if number == 11 else facts.outputs).append(_value_info(_message(value)))
            elif number == 15:
                raise BundleError("the graph holds sparse tensors")
        given = {value.name.encode() for value in facts.inputs} - constants
        for inputs in attentions:
            for place in _GQA_LENGTHS:
                if place >= len(inputs) or inputs[place] not in given:
                    raise BundleError("GroupQueryAttention takes a length that is no input of the graph")
        return facts

    def _node(self, data: memoryview) -> tuple[bytes, list[bytes]]:
        inputs, operator, domain = list[bytes](), b"", b""
        for number, value in _fields(data):
            if number == 1:
                inputs.append(bytes(_message(value)))
            elif number == 4:
                operator = bytes(_message(value))
            elif number == 7:
                domain = bytes(_message(value))
            elif number == 5:
                self._attribute(_message(value))
        if operator in _CONTROL_FLOW:
            raise BundleError(f"the graph has control flow ({_shown(operator)})")
        if domain not in _DOMAINS and not (domain == b"com.microsoft" and operator in _FUSED):
            raise BundleError(
                f"the graph has the operator {_shown(operator)} of {_shown(domain)}, which no compiled graph has"
            )
        if operator in _REFUSED_OPERATORS:
            raise BundleError(f"the graph has the operator {_shown(operator)}, which no compiled graph has")
        return operator, inputs

    def _attribute(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number in (6, 11):
                raise BundleError("the graph holds a subgraph (control flow)")
            if number in (22, 23):
                raise BundleError("the graph holds sparse tensors")
            if number in (5, 10):
                self._tensor(_message(value), external=False)

    def _tensor(self, data: memoryview, external: bool) -> bytes:
        """Check one tensor; its name."""
        name, elsewhere, entries = b"", False, dict[bytes, bytes]()
        for number, value in _fields(data):
            if number == 8:
                name = bytes(_message(value))
            elif number == 14:
                elsewhere = elsewhere or value != 0
            elif number == 13:
                key, text = b"", b""
                for inner, part in _fields(_message(value)):
                    if inner == 1:
                        key = bytes(_message(part))
                    elif inner == 2:
                        text = bytes(_message(part))
                if key in entries:
                    raise BundleError(f"the tensor {_shown(name)} says twice where its data are")
                entries[key] = text
        if elsewhere or entries:
            if not external:
                raise BundleError("an attribute has its data in another file")
            self._span(name, entries)
        return name

    def _span(self, name: bytes, entries: dict[bytes, bytes]) -> None:
        location = entries.get(b"location", b"")
        if self._location is None or location != self._location:
            raise BundleError(f"the tensor {_shown(name)} has its data in {_shown(location)}, which is not the graph's")
        if unknown := sorted(set(entries) - {b"location", b"offset", b"length"}):
            raise BundleError(f"the tensor {_shown(name)} has external data with {_shown(unknown[0])}")
        numbers = [entries.get(key) for key in (b"offset", b"length")]
        if not all(text is not None and len(text) < 20 and text.isdigit() for text in numbers):
            raise BundleError(f"the tensor {_shown(name)} does not say where its data begin and end")
        if sum(int(text) for text in numbers if text is not None) > self._data_size:
            raise BundleError(f"the tensor {_shown(name)} lies beyond the end of {_shown(location)}")


def _value_info(data: memoryview) -> GraphTensor:
    name, dtype, shape = "", None, list[int | str]()
    for number, value in _fields(data):
        if number == 1:
            name = _text(_message(value))
        elif number == 2:
            for kind, inner in _fields(_message(value)):
                if kind != 1:
                    continue
                for part, content in _fields(_message(inner)):
                    if part == 1:
                        dtype = _TYPES.get(content if isinstance(content, int) else 0)
                    elif part == 2:
                        shape = [_dimension(_message(dim)) for key, dim in _fields(_message(content)) if key == 1]
    return GraphTensor(name, dtype, shape)


def _dimension(data: memoryview) -> int | str:
    found: int | str = "?"
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            found = value
        elif number == 2:
            found = _text(_message(value))
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: number, and value (bytes, or a number where the wire type is one).

    Each step goes forward, so the walk ends. Groups, which protobuf has given up, are refused.
    """
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise BundleError("not an ONNX model: malformed protobuf")
        if size > end - place:
            raise BundleError("not an ONNX model: it ends in the middle")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
        shift += 7
    raise BundleError("not an ONNX model: malformed protobuf")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise BundleError("not an ONNX model: malformed protobuf")
    return value


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")


def _shown(value: bytes) -> str:
    text = value[:80].decode("utf-8", "replace")
    return "'" + "".join(character if character.isprintable() else "?" for character in text) + "'"
