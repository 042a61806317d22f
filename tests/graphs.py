"""Small graphs of quantize-dequantize pairs, and ONNX Runtime to run any graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from sparse_exp.sparsity.onnx_graph import constants

LEVELS = onnxruntime.GraphOptimizationLevel


def node(kind: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=output, **attributes)


def pair_graph(*, bias: float, scale: float, weight_scale=1 / 127) -> ModelProto:
    """Input (N, 3, 8, 8) -> pair in int8 -> 1x1 convolution with a bias -> (N, 64, 6)."""
    axis = {"axis": 0} if np.ndim(weight_scale) else {}
    nodes = [
        node("Identity", "zx", "zy"),
        node("QuantizeLinear", "x sx zy", "xq"),
        node("DequantizeLinear", "xq sx zy", "xd"),
        node("QuantizeLinear", "w sw zw", "wq", **axis),
        node("DequantizeLinear", "wq sw zw", "wd", **axis),
        node("Conv", "xd wd b", "c"),
        node("Reshape", "c shape", "r"),
        node("Transpose", "r", "y", perm=[0, 2, 1]),
    ]
    rng = np.random.default_rng(0)
    values = {
        "sx": np.float32(scale),
        "zx": np.int8(-118),
        "w": rng.normal(size=(6, 3, 1, 1)).astype(np.float32) / 4,
        "sw": np.float32(weight_scale),
        "zw": np.zeros(np.shape(weight_scale), np.int8),
        "b": np.array([bias, 0.0, -bias, 0.1, 0.2, -0.3], np.float32),
        "shape": np.array([0, 6, 64]),
    }
    return model_of(nodes, values, [("x", TensorProto.FLOAT, ["n", 3, 8, 8])], [("y", ["n", 64, 6])])


def model_of(nodes, values: dict, inputs, outputs) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def run(model: ModelProto, images: np.ndarray, level=LEVELS.ORT_DISABLE_ALL) -> np.ndarray:
    """What ONNX Runtime computes; as written, where it is not told to optimize."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {model.graph.input[0].name: images})[0]


def kinds(graph: GraphProto) -> list[str]:
    return sorted(one.op_type for one in graph.node)


def copied(model: ModelProto) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(model)
    return other


def integers(graph: GraphProto) -> dict[str, np.ndarray]:
    """The constants of a graph, but for those in floating point."""
    return {name: value for name, value in constants(graph).items() if value.dtype.kind in "iu"}
