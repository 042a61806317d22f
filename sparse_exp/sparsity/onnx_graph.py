"""Reads an ONNX graph: its constants, which node makes a tensor, which layer a node comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

_OUTPUT_SUFFIX = re.compile(r"_output_\d+.*$|_quant$")  # how torch and SparseML continue a node's name
_CONVOLUTION = re.compile(r"Conv|BatchNorm")


def stored_constants(graph: GraphProto) -> dict[str, TensorProto]:
    """The constants of a graph as the file stores them, by name; a change to one changes the graph.

    Initializers, values of Constant nodes, and Identity nodes that give another name to either.
    """
    stored = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            stored[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    return stored


def constants(graph: GraphProto) -> dict[str, NDArray[Any]]:
    """The same constants as arrays."""
    return {name: numpy_helper.to_array(tensor) for name, tensor in stored_constants(graph).items()}


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """For each tensor that a node computes: that node."""
    return {output: node for node in graph.node for output in node.output}


def quantized_weight(node: NodeProto, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The integers that PyTorch makes of a stored floating-point weight, which a QuantizeLinear node rounds.

    PyTorch multiplies by the reciprocal of the scale, where ONNX divides: at ties, such as a tensor's
    smallest weight may be, the integers differ by one.

    Args:
        node: the node; its scale and zero point are for the whole weight or for each output channel.
        arrays: the constants of the graph, as `constants` returns them.

    Returns:
        The shape of the weight, in the type of the zero point.
    """
    weight, scale, zero = (arrays[name] for name in node.input)
    bounds = np.iinfo(zero.dtype)
    steps = np.rint(weight * (np.float32(1) / per_channel(scale))) + per_channel(zero)
    integers: NDArray[Any] = np.clip(steps, bounds.min, bounds.max).astype(zero.dtype)
    return integers


def per_channel(values: NDArray[Any]) -> NDArray[Any]:
    """Scales or zero points in a shape that broadcasts over a weight (out, in, height, width).

    Args:
        values: one for the whole weight, () or (1,), or one for each output channel, (out,).
    """
    return values.reshape(-1, 1, 1, 1) if values.ndim == 1 and values.size > 1 else values.reshape(())


def layer_name(node: str) -> str:
    """The model's name of a layer, from the name of its node or of that node's output.

    A convolution, and the batch norm that belongs to it, have the name of the module, as in
    ``sparsity.csv``; any other operator keeps its own name at the end.

    >>> layer_name("/model/model.2/cv1/conv/module/Conv_quant")
    'model.2.cv1.conv'
    >>> layer_name("/model/model.8/m/m.0/cv2/conv/module/bn/BatchNormalization_output_0_quant")
    'model.8.m.0.cv2.conv'
    >>> layer_name("/model.24/Mul_output_0")
    'model.24.Mul'
    """
    parts = [part for part in _OUTPUT_SUFFIX.sub("", node).split("/") if part not in ("", "module", "bn")]
    if len(parts) > 1 and _CONVOLUTION.match(parts[-1]):
        parts.pop()
    # The name of a container is repeated in those of its children: model/model.8/m/m.0.
    following = [*parts[1:], ""]
    kept = [part for part, after in zip(parts, following, strict=True) if not after.startswith(f"{part}.")]
    return ".".join(kept).removesuffix(".module")
