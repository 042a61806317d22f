"""The graph of integer convolutions, which DeepSparse runs.

DeepSparse (run: 1.8.0) computes a convolution on integers where the graph says so in so many words:

    uint8 -> ConvInteger -> Add (int32 bias) -> Cast -> Mul (input scale times weight scale) -> float

What is quantized for a convolution is not dequantized; residual additions keep their pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper

from sparse_exp.export.graph import add_constant, drop_unused, set_nodes
from sparse_exp.export.pairs import is_quantized
from sparse_exp.sparsity.onnx_graph import constants, producers


def to_integer_graph(graph: GraphProto) -> None:
    """Convert a graph of quantize-dequantize pairs to integer convolutions, in place.

    Args:
        graph: in the form that `sparse_exp.export.pairs` describes.
    """
    arrays, makers = constants(graph), producers(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _integer(graph, node, makers, arrays) if is_quantized(node, makers) else [node]
    set_nodes(graph, nodes)
    drop_unused(graph)


def _integer(
    graph: GraphProto, conv: NodeProto, makers: Mapping[str, NodeProto], arrays: Mapping[str, NDArray[Any]]
) -> list[NodeProto]:
    name, (data, weight) = conv.name or conv.output[0], (makers[tensor] for tensor in conv.input[:2])
    sums, floats = f"{name}.sums", f"{name}.floats"
    # One zero point also of weights with scales per channel: ONNX Runtime's ConvInteger takes no more.
    zeros = np.unique(arrays[weight.input[2]])
    zero = add_constant(graph, f"{name}.zero", zeros.reshape(())) if len(zeros) == 1 else weight.input[2]
    inputs = [data.input[0], weight.input[0], data.input[2], zero]
    integer = helper.make_node("ConvInteger", inputs, [sums], conv.name)
    integer.attribute.extend(conv.attribute)
    nodes = [integer]
    if len(conv.input) > 2:
        steps = arrays[makers[conv.input[2]].input[0]]
        bias = add_constant(graph, f"{name}.bias", steps.reshape(1, -1, 1, 1))
        nodes.append(helper.make_node("Add", [sums, bias], [f"{sums}.biased"], f"{name}.add"))
    scale = arrays[data.input[1]] * arrays[weight.input[1]]
    step = add_constant(graph, f"{name}.step", scale.reshape(1, -1, 1, 1) if scale.size > 1 else scale)
    return [
        *nodes,
        helper.make_node("Cast", [nodes[-1].output[0]], [floats], f"{name}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [floats, step], [conv.output[0]], f"{name}.scale"),
    ]
