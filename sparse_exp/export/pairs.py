"""The graph of quantize-dequantize (QDQ) pairs, from which the file of each engine is made.

PyTorch exports fake quantization as pairs around floating-point numbers. Here they become what an engine can
compute with: uint8 images and activations, int8 weights and int32 biases, stored as such, and one pair where
several say the same. OpenVINO runs this graph as it is; `sparse_exp.export.integer` and
`sparse_exp.export.outputs` go on from it. A convolution is quantized where its input and its weight are:

    image or Q(x) -> DQ --+
    int8 weight   -> DQ --+-> Conv
    int32 bias    -> DQ --+       the bias in steps of input scale times weight scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper

from sparse_exp.export.graph import (
    DEQUANTIZE,
    QUANTIZE,
    add_constant,
    drop_unused,
    make_scalars,
    readers,
    rename_inputs,
    set_nodes,
    store_constants,
)
from sparse_exp.sparsity.onnx_graph import constants, producers, quantized_weight

Arrays = Mapping[str, NDArray[Any]]

_BIAS_LIMIT = 2.0**30  # steps; leaves the sum of products as much room in 32 bits
_QUANTIZED_INPUTS = ("Conv", "Add")


def tidy(graph: GraphProto) -> None:
    """Rewrite a graph, as PyTorch exports fake quantization, to the form that this module describes.

    Args:
        graph: changed in place. What is in that form already stays as it is. Quantized tensors that neither
            a convolution nor an addition reads, as where outputs were trained for ONNX Runtime, stay too:
            see `keep_inputs`.
    """
    store_constants(graph)
    _store_weights(graph)
    _unsign_activations(graph)
    _read_pixels(graph)
    _merge(graph)
    _store_biases(graph)
    make_scalars(graph)
    drop_unused(graph)


def keep_inputs(graph: GraphProto) -> None:
    """Take out the pairs that neither a convolution nor an addition reads, in place.

    OpenVINO and DeepSparse quantize what they must for a layer that follows; every other pair is work.
    """
    reading, names = readers(graph), dict[str, str]()
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == QUANTIZE}
    for node in graph.node:
        kinds = {reader.op_type for reader in reading.get(node.output[0], [])}
        if node.op_type == DEQUANTIZE and node.input[0] in quantizers and kinds.isdisjoint(_QUANTIZED_INPUTS):
            quantized = quantizers[node.input[0]].input[0]
            names[node.output[0]] = names.get(quantized, quantized)
    for node in graph.node:
        rename_inputs(node, names)
    drop_unused(graph)


def is_quantized(node: NodeProto, makers: Mapping[str, NodeProto]) -> bool:
    """Whether a node is a convolution whose input and weight are quantized."""
    return node.op_type == "Conv" and all(_kind(name, makers) == DEQUANTIZE for name in node.input[:2])


def _kind(name: str, makers: Mapping[str, NodeProto]) -> str:
    return makers[name].op_type if name in makers else ""


def _store_weights(graph: GraphProto) -> None:
    """Store weights as the integers that they are rounded to: the same numbers in a quarter of the bytes."""
    arrays, kept = constants(graph), []
    for node in graph.node:
        if node.op_type == QUANTIZE and node.input[0] in arrays:
            add_constant(graph, node.output[0], quantized_weight(node, arrays))
        else:
            kept.append(node)
    set_nodes(graph, kept)


def _unsign_activations(graph: GraphProto) -> None:
    """Make activations uint8 where they are int8.

    Both mean the same numbers: integers and zero points move by 128 together. But OpenVINO (run: 2026.4.1,
    AVX2) drops the scale of signed activations where a concatenation is quantized, and every convolution
    behind it computes nonsense. Weights stay int8.
    """
    arrays, names = constants(graph), {}
    for node in graph.node:
        signed = node.op_type == QUANTIZE and arrays[node.input[2]].dtype == np.int8
        if signed and node.input[2] not in names:
            zero = (arrays[node.input[2]].astype(np.int16) + 128).astype(np.uint8)
            names[node.input[2]] = add_constant(graph, f"{node.input[2]}.unsigned", zero)
    for node in graph.node:
        if node.op_type == QUANTIZE or (node.op_type == DEQUANTIZE and node.input[0] not in arrays):
            rename_inputs(node, names)


def _read_pixels(graph: GraphProto) -> None:
    """Take the pixels as they are where quantizing them gives them back.

    That is so where uint8 images are divided by 255 and quantized with scale 1/255 and zero point 0, as
    `sparse_exp.quantization.quantizers.pin_input_quantizer` leaves it.
    """
    arrays, makers, names = constants(graph), producers(graph), {}
    for node in graph.node:
        scaling = makers.get(node.input[0]) if node.op_type == QUANTIZE else None
        cast = makers.get(scaling.input[0]) if scaling is not None and scaling.op_type == "Mul" else None
        if scaling is not None and cast is not None and cast.op_type == "Cast":
            numbers = [arrays.get(name) for name in (scaling.input[1], *node.input[1:])]
            if _close(numbers[0], 1 / 255) and _close(numbers[1], 1 / 255) and _close(numbers[2], 0):
                names[node.output[0]] = cast.input[0]
    for node in graph.node:
        rename_inputs(node, names)


def _close(found: NDArray[Any] | None, wanted: float) -> bool:
    return found is not None and found.size == 1 and bool(np.isclose(float(found.item()), wanted, rtol=1e-6))


def _merge(graph: GraphProto) -> None:
    """Keep one of several nodes that quantize, or dequantize, one tensor in the same way."""
    arrays, kept = constants(graph), []
    seen: dict[object, str] = {}
    names: dict[str, str] = {}
    for node in graph.node:
        rename_inputs(node, names)
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            numbers = [arrays[name] for name in node.input[1:]]
            key = (node.op_type, node.input[0], *((value.dtype, value.tobytes()) for value in numbers))
            if key in seen:
                names[node.output[0]] = seen[key]
                continue
            seen[key] = node.output[0]
        kept.append(node)
    set_nodes(graph, kept)


def _store_biases(graph: GraphProto) -> None:
    """Store the biases of quantized convolutions as integers."""
    arrays, makers, kept = constants(graph), producers(graph), []
    for node in graph.node:
        if is_quantized(node, makers) and len(node.input) > 2 and node.input[2] in arrays:
            kept += _with_bias(graph, node, makers, arrays)
        else:
            kept.append(node)
    set_nodes(graph, kept)


def _with_bias(
    graph: GraphProto, conv: NodeProto, makers: Mapping[str, NodeProto], arrays: Arrays
) -> list[NodeProto]:
    """A convolution and the node that gives it its bias.

    Where a layer's inputs are all nearly 0, as in a detector that has hardly been trained, steps are so
    small that the bias would not fit into 32 bits. Such a bias is added in floating point.
    """
    name, bias = conv.name or conv.output[0], arrays[conv.input[2]].astype(np.float64)
    data, weight = (makers[tensor] for tensor in conv.input[:2])
    input_scale, weight_scale = arrays[data.input[1]].reshape(()), arrays[weight.input[1]]
    if weight_scale.size > 1:
        weight_scale = _scale_of_empty_channels(weight_scale, arrays[weight.input[0]], bias / input_scale)
        weight.input[1] = add_constant(graph, f"{name}.weight_scale", weight_scale)
    step = input_scale * weight_scale
    steps = np.rint(bias / step.astype(np.float64))
    if np.abs(steps).max() >= _BIAS_LIMIT:
        added = add_constant(graph, f"{name}.bias_added", bias.astype(np.float32).reshape(1, -1, 1, 1))
        output, conv.output[0] = conv.output[0], f"{conv.output[0]}.without_bias"
        del conv.input[2]
        return [conv, helper.make_node("Add", [conv.output[0], added], [output], f"{name}.bias")]
    inputs = [
        add_constant(graph, f"{name}.bias_steps", steps.astype(np.int32)),
        add_constant(graph, f"{name}.bias_step", step),
    ]
    conv.input[2] = f"{name}.bias_dequantized"
    dequantize = helper.make_node(DEQUANTIZE, inputs, [conv.input[2]], f"{name}.bias")
    if step.size > 1:
        dequantize.attribute.append(helper.make_attribute("axis", 0))
    return [dequantize, conv]


def _scale_of_empty_channels(scale: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    """The layer's largest scale for channels without weights whose own is too small for their bias.

    Of weights that are all 0 any scale says the same.

    Args:
        scale: (out,).
        weight: integers (out, in, height, width), 0 standing for 0.
        bias: (out,), in units of the input's scale.
    """
    empty = ~weight.reshape(len(weight), -1).any(axis=1)
    too_large = np.abs(bias) >= _BIAS_LIMIT * scale
    return np.where(empty & too_large, scale.max(), scale)
