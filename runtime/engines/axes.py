"""Give a named axis of an ONNX graph a size without the package onnx, which a board need not have.

TensorRT needs the length of a static cache in the graph itself; a bundle has the axis ``max_length`` there. An axis is
a ``TensorShapeProto.Dimension`` with a name (field 2) or a size (field 1). The messages around it are copied with their
new lengths. Field numbers are those of onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

#: The path from a ModelProto to its dimensions: graph; inputs, outputs and values; type; tensor type; shape; dimension.
_PATH: tuple[tuple[int, ...], ...] = ((7,), (11, 12, 13), (2,), (1,), (2,), (1,))


def fix_axis(model: bytes, name: str, size: int) -> bytes:
    """The serialized model in which every axis ``name`` has the size ``size``. ``ValueError`` if it is not a model."""
    return _rewrite(model, 0, name.encode(), size)


def _rewrite(message: bytes, depth: int, name: bytes, size: int) -> bytes:
    parts: list[bytes] = []
    for field, start, payload, end in _fields(message):
        if depth == len(_PATH):
            named = field == 2 and payload is not None and message[payload:end] == name
            parts.append(b"\x08" + _varint(size) if named else message[start:end])
        elif payload is not None and field in _PATH[depth]:
            inner = _rewrite(message[payload:end], depth + 1, name, size)
            parts.append(_varint(field << 3 | 2) + _varint(len(inner)) + inner)
        else:
            parts.append(message[start:end])
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int, int | None, int]]:
    """Number, start, start of the payload and end of each field. Only length-delimited fields have a payload."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        payload = None
        if key & 7 == 0:
            _, position = _read_varint(message, position)
        elif key & 7 == 1:
            position += 8
        elif key & 7 == 2:
            length, payload = _read_varint(message, position)
            position = payload + length
        elif key & 7 == 5:
            position += 4
        else:
            raise ValueError(f"wire type {key & 7} is not of ONNX")
        if position > len(message):
            raise ValueError("a field ends behind its message")
        yield key >> 3, start, payload, position


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a number without an end")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
