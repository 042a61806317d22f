"""Inputs and outputs are read as the ONNX file says, and other models are refused in one line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_exp.engines import create_engine
from sparse_exp.engines.signature import Port, read_signature
from sparse_exp.errors import EngineError

NAMES = {TensorProto.UINT8: "uint8", TensorProto.FLOAT: "float32"}


def by_the_package(path):
    graph = onnx.load(path).graph
    constants = {constant.name for constant in graph.initializer}

    def ports(values):
        return [
            (
                value.name,
                NAMES[value.type.tensor_type.elem_type],
                tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
            if value.name not in constants
        ]

    return ports(graph.input), ports(graph.output)


@pytest.mark.parametrize("name", ["dense.onnx", "model.onnx", "model.qdq.onnx"])
def test_an_exported_model_is_read_as_the_onnx_package_reads_it(name, deployment):
    signature = read_signature(deployment / name)
    inputs, outputs = (
        [(port.name, port.dtype, port.shape) for port in ports]
        for ports in (signature.inputs, signature.outputs)
    )
    assert (inputs, outputs) == by_the_package(deployment / name)
    assert signature.size == (64, 64)
    assert signature.batch is None


def write(path, inputs=(("images", TensorProto.UINT8, ["n", 3, 32, 32]),), output=("n", None, 8), dtype=1):
    """A model of the given inputs and output; whether it could run does not matter here."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [inputs[0][0]], ["output"])],
        "any",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info("output", dtype, output)],
        [numpy_helper.from_array(np.zeros(3, np.float32), "weight")],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protobuf message, as https://protobuf.dev/programming-guides/encoding says: one short."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


def port(name: bytes, dtype: int, *dims: bytes | int) -> bytes:
    """A ValueInfoProto of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; dims by value or name."""
    sizes = [field(1, field(1, dim) if isinstance(dim, int) else field(2, dim)) for dim in dims]
    tensor = field(1, dtype) + field(2, b"".join(sizes))
    return field(1, name) + field(2, field(1, tensor))


def test_a_file_written_by_hand_is_read(tmp_path):
    fields = [
        field(5, field(8, b"w")),  # an initializer, which is listed as an input as well
        field(11, port(b"w", 1, 5)),
        field(11, port(b"images", 2, b"n", 3, 32, 64)),
        field(12, port(b"output", 1, b"n", 84, 8)),
        *(field(12, port(b"o", dtype)) for dtype in (10, 11, 16, 99)),
        field(12, field(1, b"unknown")),
    ]
    path = tmp_path / "by_hand.onnx"
    graph = b"".join(fields)
    length = bytes([128 | len(graph) & 127, len(graph) >> 7])  # above 127 it takes two bytes
    path.write_bytes(field(1, 8) + b"\x3a" + length + graph)
    signature = read_signature(path)
    assert signature.inputs == (Port("images", "uint8", (None, 3, 32, 64)),)
    first, *others, unknown = signature.outputs
    assert first == Port("output", "float32", (None, 84, 8))
    assert [other.dtype for other in others] == ["float16", "float64", "bfloat16", "another type"]
    assert unknown == Port("unknown", "", None)
    assert (signature.batch, signature.size) == (None, (32, 64))


def test_a_weight_that_is_listed_as_an_input_is_none(tmp_path):
    images, weight = ("images", TensorProto.UINT8, ["n", 3, 32, 32]), ("weight", TensorProto.FLOAT, [3])
    path = write(tmp_path / "old.onnx", (weight, images))
    assert [port.name for port in read_signature(path).inputs] == ["images"]


U8, F32 = TensorProto.UINT8, TensorProto.FLOAT
OTHERS = {
    "a classifier": ({"output": ("n", 1000)}, "(N, A, 5 + classes)"),
    "a model of float images": (
        {"inputs": (("images", F32, ["n", 3, 32, 32]),)},
        "'images' float32 (?, 3, 32, 32)",
    ),
    "a language model": ({"inputs": (("ids", TensorProto.INT64, ["n", 9]),)}, "'ids' int64"),
    "channels last": ({"inputs": (("images", U8, ["n", 32, 32, 3]),)}, "(N, 3, H, W)"),
    "two inputs": ({"inputs": (("a", U8, ["n", 3, 32, 32]), ("b", U8, ["n", 3, 32, 32]))}, "'b' uint8"),
    "any size": ({"inputs": (("images", U8, ["n", 3, "h", "w"]),)}, "one size"),
    "boxes only": ({"output": ("n", None, 4)}, "5 + classes"),
    "another batch": ({"inputs": (("images", U8, [4, 3, 32, 32]),)}, "batches of 1"),
    "int8 predictions": ({"dtype": TensorProto.INT8}, "'output' int8"),
}


@pytest.mark.parametrize(("given", "words"), OTHERS.values(), ids=list(OTHERS))
def test_the_onnx_file_of_another_model_is_refused_in_one_line_that_names_it(given, words, tmp_path):
    path = write(tmp_path / "another.onnx", **given)
    with pytest.raises(EngineError) as error:
        create_engine("onnxruntime").load(path, batch_size=1, cores=1)
    assert words in str(error.value)
    assert "another.onnx" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.1, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(kept, deployment, tmp_path):
    whole = (deployment / "dense.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(EngineError, match=r"whole.*cut\.onnx"):
        read_signature(path)


@pytest.mark.parametrize(
    "content", [b"\x00" * 64, b"\x80" * 64, b"PK\x03\x04" + b"a" * 99, b"\x3a\x02\x08\x01"]
)
def test_other_bytes_are_no_detector(content, tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"other\.onnx"):
        create_engine("onnxruntime").load(path, batch_size=1, cores=1)
