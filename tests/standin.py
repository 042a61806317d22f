"""A detector in a small ONNX file that reads the colours of an image back as boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 32
NAMES = ("tree", "car")


def write_detector(path: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Write the detector, for images of 32 px.

    Of the pixel (r, g, b) in the middle of the square it makes two boxes: a car of score 0.9 with the centre
    (r, g), width b and height 16; and a tree of score 0.5 with the centre (16, 16) and sides of 8.

    Args:
        path: of the file.
        names: of the classes, in the file's metadata.
    """
    car, tree = [0, 0, 0, 16, 1.0, 0.0, 0.9], [16, 16, 8, 8, 1.0, 0.5, 0.0]
    colours = np.zeros((3, 14), np.float32)
    colours[range(3), range(3)] = 1
    constants = {
        "middle": np.array(SIDE // 2, np.int64),
        "colours": colours,
        "rest": np.array(car + tree, np.float32),
        "rows": np.array([-1, 2, 7], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["images", "middle"], ["row"], axis=2),
        helper.make_node("Gather", ["row", "middle"], ["pixel"], axis=2),
        helper.make_node("Cast", ["pixel"], ["colour"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["colour", "colours"], ["boxes"]),
        helper.make_node("Add", ["boxes", "rest"], ["flat"]),
        helper.make_node("Reshape", ["flat", "rows"], ["predictions"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stand_in",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("predictions", TensorProto.FLOAT, ["batch", 2, 7])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if names:
        helper.set_model_props(model, {"names": json.dumps(list(names))})
    onnx.save(model, str(path))
    return path
