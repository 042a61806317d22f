"""A detector in a small ONNX file that reads the colours of an image back as boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 32
NAMES = ("tree", "car")


def write_detector(path: Path, names: tuple[str, ...] = NAMES, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Write the detector, for images of 32 px or another size.

    Of the pixel (r, g, b) in the middle of the image it makes two boxes: a car of score 0.9 with the centre
    (r, g), width b and height 16; and a tree of score 0.5 with the centre (16, 16) and sides of 8.

    Args:
        path: of the file.
        names: of the classes, in the file's metadata.
        size: height and width of the images, px.
    """
    car, tree = [0, 0, 0, 16, 1.0, 0.0, 0.9], [16, 16, 8, 8, 1.0, 0.5, 0.0]
    colours = np.zeros((3, 14), np.float32)
    colours[range(3), range(3)] = 1
    constants = {
        "row_of_it": np.array(size[0] // 2, np.int64),
        "column_of_it": np.array(size[1] // 2, np.int64),
        "colours": colours,
        "rest": np.array(car + tree, np.float32),
        "rows": np.array([-1, 2, 7], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["images", "row_of_it"], ["row"], axis=2),
        helper.make_node("Gather", ["row", "column_of_it"], ["pixel"], axis=2),
        helper.make_node("Cast", ["pixel"], ["colour"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["colour", "colours"], ["boxes"]),
        helper.make_node("Add", ["boxes", "rest"], ["flat"]),
        helper.make_node("Reshape", ["flat", "rows"], ["predictions"]),
    ]
    model = _model_of(nodes, constants, size, [2, 7])
    if names:
        helper.set_model_props(model, {"names": json.dumps(list(names))})
    onnx.save(model, str(path))
    return path


def write_cells_detector(path: Path, size: tuple[int, int]) -> Path:
    """Write a detector that makes a box of each pixel in the middle of 8 x 8: its centre is the pixel.

    The box of a pixel (r, g, b) has the score r / 255, the width g and the height b.

    Args:
        path: of the file.
        size: height and width of the images, px; multiples of 8.
    """
    y, x = np.meshgrid(*(np.arange(4, side, 8) for side in size), indexing="ij")
    rest = np.zeros((x.size, 6), np.float32)
    rest[:, 0], rest[:, 1], rest[:, 5] = x.ravel(), y.ravel(), 1
    colours = np.zeros((3, 6), np.float32)
    colours[0, 4], colours[1, 2], colours[2, 3] = 1 / 255, 1, 1
    constants = {
        "starts": np.array([4, 4], np.int64),
        "ends": np.array(size, np.int64),
        "axes": np.array([2, 3], np.int64),
        "steps": np.array([8, 8], np.int64),
        "flat": np.array([0, 3, -1], np.int64),
        "colours": colours,
        "rest": rest,
    }
    nodes = [
        helper.make_node("Slice", ["images", "starts", "ends", "axes", "steps"], ["cells"]),
        helper.make_node("Reshape", ["cells", "flat"], ["planes"]),
        helper.make_node("Cast", ["planes"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["pixels"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["pixels", "colours"], ["sizes"]),
        helper.make_node("Add", ["sizes", "rest"], ["predictions"]),
    ]
    onnx.save(_model_of(nodes, constants, size, [x.size, 6]), str(path))
    return path


def _model_of(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], size: tuple[int, int], outputs: list[int]
) -> onnx.ModelProto:
    """A model of nodes between ``images`` and ``predictions``; ``outputs``: the shape of these but batch."""
    graph = helper.make_graph(
        nodes,
        "stand_in",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, *size])],
        [helper.make_tensor_value_info("predictions", TensorProto.FLOAT, ["batch", *outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
