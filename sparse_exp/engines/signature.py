"""The inputs and outputs of an ONNX file, and the check that it is a detector as exported here.

The file is read with the onnx package and without an engine, so that every engine refuses the same files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_exp.errors import EngineError, expected

if TYPE_CHECKING:
    from onnx import ValueInfoProto  # type: ignore[attr-defined]

_EXPORT = "Choose a file that this program exported: others take other pixels, or give other outputs."

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
    """The inputs and outputs of a model.

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

    This takes about twice the size of the file in memory, of which glibc may keep a part.

    Args:
        model: the file.

    Raises:
        EngineError: there is no such file, it is no ONNX file, or it is cut off.
    """
    # Not at the top: an engine in a process of its own is given the signature, and its memory is measured.
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import TensorProto  # type: ignore[attr-defined]

    try:
        loaded = onnx.load(str(model), load_external_data=False)
        if not loaded.HasField("graph"):
            raise _not_whole(model)
        dtypes = {number: name.lower() for name, number in TensorProto.DataType.items()}
        dtypes |= {0: "", TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
        graph = loaded.graph
        constants = {constant.name for constant in graph.initializer}
        inputs = tuple(_port(value, dtypes) for value in graph.input if value.name not in constants)
        return Signature(inputs, tuple(_port(value, dtypes) for value in graph.output))
    except (OSError, ValueError, DecodeError) as error:  # a name may be no text
        raise _not_whole(model) from error


def _not_whole(model: Path) -> EngineError:
    do = "Export the model again, or check the path."
    return EngineError(expected("the model", "an ONNX file that is whole", str(model), do))


def _port(value: ValueInfoProto, dtypes: dict[int, str]) -> Port:
    tensor = value.type.tensor_type
    sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    dtype = dtypes.get(tensor.elem_type, "another type")
    return Port(value.name, dtype, sizes if tensor.HasField("shape") else None)


def check_detector(model: Path, signature: Signature, batch_size: int) -> None:
    """Refuse a model that is no detector as exported here.

    Args:
        model: its file, for the message.
        signature: its inputs and outputs.
        batch_size: images of one inference.

    Raises:
        EngineError: it does not take one batch of uint8 RGB images of one size, or its first output is not
            float32 (N, A, 5 + nc).
    """
    ports = signature.inputs
    if len(ports) != 1 or ports[0].dtype != "uint8" or not _takes_images(ports[0].shape):
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


def _takes_images(shape: Shape | None) -> bool:
    return shape is not None and len(shape) == 4 and shape[1] == 3


def _predicts(shape: Shape | None) -> bool:
    return shape is None or (len(shape) == 3 and (shape[2] is None or shape[2] > 5))


def _list(ports: tuple[Port, ...]) -> str:
    return ", ".join(str(port) for port in ports[:3]) + (", ..." if len(ports) > 3 else "")
