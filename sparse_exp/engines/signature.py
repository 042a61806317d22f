"""What an ONNX file takes and gives, read without its weights and without a runtime.

The file is a serialized protobuf message (https://protobuf.dev/programming-guides/encoding, fields from
``onnx.proto``: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Only the path to the graph's inputs
and outputs is walked; weights are stepped over. So the check costs no memory, which would count as the
engine's, and a millisecond, and it says the same whichever engine is asked.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_exp.errors import EngineError, expected

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_INITIALIZER_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_DTYPE, _TENSOR_SHAPE = 1, 2
_SHAPE_DIM = 1
_DIM_VALUE = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
_EXPORT = "Choose a file that this program exported: those of others want other pixels, or say other things."

Span = tuple[int, int]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Port:
    """An input or an output of a model.

    Attributes:
        name: as in the file.
        dtype: as NumPy names it, such as ``"uint8"``; empty where unknown.
        shape: size of each dimension, None where it varies; None where not even their number is known.
    """

    name: str
    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        shape = ", ".join("?" if size is None else str(size) for size in self.shape or ())
        return f"{self.name!r} {self.dtype} ({shape})"


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: in the order of the file, constants left out.
        outputs: in the order of the file.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def batch(self) -> int | None:
        """Images of one inference; None: any number."""
        shape = self.inputs[0].shape
        return shape[0] if shape else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels; None: any."""
        shape = self.inputs[0].shape or ()
        height, width = shape[-2:] if len(shape) == 4 else (None, None)
        return (height, width) if height and width else None


def read_signature(model: Path) -> Signature:
    """Read the inputs and outputs of an ONNX file.

    Args:
        model: an existing file.

    Raises:
        EngineError: it is no ONNX file, or it is cut off.
    """
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).signature()
    except (OSError, ValueError) as error:
        do = "Export the model again, or check the path."
        raise EngineError(expected("the model", "an ONNX file that is whole", str(model), do)) from error


def check_detector(model: Path, signature: Signature, batch_size: int) -> None:
    """Refuse what is no detector of the kind that is exported here.

    Args:
        model: its file, for the message.
        signature: of it.
        batch_size: images of one inference.

    Raises:
        EngineError: it does not take one batch of uint8 RGB images of one size, or its first output is not
            float32 (N, A, 5 + nc).
    """
    ports = signature.inputs
    if len(ports) != 1 or ports[0].dtype != "uint8" or not _fits(ports[0].shape, (None, 3, None, None)):
        should_be = "a detector of uint8 images (N, 3, H, W)"
        raise EngineError(expected(f"the model {model}", should_be, _list(ports), _EXPORT))
    if signature.size is None:
        do = "Export it for one size of images."
        raise EngineError(expected(f"the model {model}", "for images of one size", _list(ports), do))
    if signature.batch not in (None, batch_size):
        do = f"Export it with a batch dimension that varies, or ask for batches of {signature.batch}."
        raise EngineError(expected(f"the model {model}", f"for batches of {batch_size}", _list(ports), do))
    outputs = signature.outputs
    if not outputs or outputs[0].dtype not in ("float32", "") or not _predicts(outputs[0].shape):
        should_be = "a detector whose first output is float32 (N, A, 5 + classes)"
        raise EngineError(expected(f"the model {model}", should_be, _list(outputs), _EXPORT))


def _predicts(shape: Shape | None) -> bool:
    return shape is None or (len(shape) == 3 and (shape[2] is None or shape[2] > 5))


def _fits(shape: Shape | None, pattern: Shape) -> bool:
    if shape is None or len(shape) != len(pattern):
        return False
    return all(want is None or size == want for size, want in zip(shape, pattern, strict=True))


def _list(ports: tuple[Port, ...]) -> str:
    return ", ".join(str(port) for port in ports[:3]) + (", ..." if len(ports) > 3 else "")


class _Walk:
    """Steps through the fields of protobuf messages, which are spans of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data

    def signature(self) -> Signature:
        graph = self._last((0, len(self._data)), _MODEL_GRAPH)
        if graph is None:
            raise ValueError("no graph")
        inputs, outputs, constants = [], [], set()
        for number, value in self._fields(graph):
            if isinstance(value, int):
                continue
            if number == _GRAPH_INPUT:
                inputs.append(self._port(value))
            elif number == _GRAPH_OUTPUT:
                outputs.append(self._port(value))
            elif number == _GRAPH_INITIALIZER:
                constants.add(self._text(self._last(value, _INITIALIZER_NAME)))
        return Signature(tuple(port for port in inputs if port.name not in constants), tuple(outputs))

    def _port(self, value: Span) -> Port:
        tensor = self._last(self._last(value, _VALUE_TYPE), _TYPE_TENSOR)
        shape = self._last(tensor, _TENSOR_SHAPE)
        dtypes = [v for n, v in self._fields(tensor) if n == _TENSOR_DTYPE and isinstance(v, int)]
        dims = [v for n, v in self._fields(shape) if n == _SHAPE_DIM and not isinstance(v, int)]
        return Port(
            self._text(self._last(value, _VALUE_NAME)),
            _DTYPES.get(dtypes[-1], "another type") if dtypes else "",
            None if shape is None else tuple(self._size(dim) for dim in dims),
        )

    def _size(self, dim: Span) -> int | None:
        sizes = [v for n, v in self._fields(dim) if n == _DIM_VALUE and isinstance(v, int)]
        return sizes[-1] if sizes and 0 < sizes[-1] < 2**31 else None

    def _text(self, span: Span | None) -> str:
        return self._data[span[0] : span[1]].decode(errors="replace") if span else ""

    def _last(self, message: Span | None, number: int) -> Span | None:
        """The field of that number which holds bytes; the last one counts, as the format wants it."""
        found = [v for n, v in self._fields(message) if n == number and not isinstance(v, int)]
        return found[-1] if found else None

    def _fields(self, message: Span | None) -> Iterator[tuple[int, int | Span]]:
        """Number and value of each field: the integer itself, or where its bytes begin and end."""
        at, end = message or (0, 0)
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
                yield number, value
                continue
            length, at = self._length(kind, at, end)
            if number == 0 or at + length > end:
                raise ValueError("not a message, or cut off")
            yield number, (at, at + length)
            at += length

    def _length(self, kind: int, at: int, end: int) -> tuple[int, int]:
        if kind == _BYTES:
            return self._varint(at, end)
        if kind in (_FIXED64, _FIXED32):
            return (8 if kind == _FIXED64 else 4), at
        raise ValueError("not a message")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            value, at = value | (byte & 127) << shift, at + 1
            if byte < 128:
                return value, at
        raise ValueError("not a number, or cut off")
