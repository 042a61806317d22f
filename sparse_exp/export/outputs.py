"""The graph for ONNX Runtime, in which every tensor is quantized but what the head puts out and the decoding.

ONNX Runtime (run: 1.26.0) computes a convolution on integers only where its output is quantized too, by one
QuantizeLinear that alone reads it; else in floating point, slower than a dense network. So pairs go behind
convolutions and the operators between them, which then all run on uint8. The head's sums, and the boxes that
are decoded from them, would be too coarse in 8 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from sparse_exp.engines import create_engine
from sparse_exp.export.graph import (
    DEQUANTIZE,
    QUANTIZE,
    add_constant,
    decoding_nodes,
    readers,
    rename_inputs,
    set_nodes,
)
from sparse_exp.export.pairs import is_quantized
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.quantization.scheme import LOWEST_OF_SILU
from sparse_exp.sparsity.onnx_graph import constants, producers

Images = Iterable[NDArray[np.uint8]]
Pair = tuple[NodeProto, NodeProto]

_KEEPING = ("MaxPool", "Resize")  # put out some of the values that they are given, in the same scale
_COMPUTING = ("Add", "Concat", "Mul", "Sigmoid")
_SIGMOID = (0.0, 255 / 256)  # the range of scale 1/256, in which 1 is missing


def quantize_outputs(model: ModelProto, images: Images) -> None:
    """Quantize what the operators of a quantized network put out, in place.

    The scale is that with which a later layer reads the tensor, where one does; that of sigmoids is 1/256;
    otherwise it follows from the tensor's range in the images, which begins at -8 at most before SiLU.

    Args:
        model: in the form that `sparse_exp.export.pairs` describes.
        images: batches to find ranges with, uint8 (N, 3, S, S).
    """
    graph, outputs = model.graph, quantizable_outputs(model.graph)
    computed = [tensor for tensor, kind in outputs.items() if kind not in _KEEPING]
    pairs = _pairs(graph, computed)
    unknown = [tensor for tensor in computed if tensor not in pairs]
    sigmoids = [tensor for tensor in unknown if outputs[tensor] == "Sigmoid"]
    ranges = find_ranges(model, [tensor for tensor in unknown if tensor not in sigmoids], images)
    reading = readers(graph)
    for tensor, (low, high) in (ranges | dict.fromkeys(sigmoids, _SIGMOID)).items():
        is_activated = {node.op_type for node in reading[tensor]} == {"Sigmoid", "Mul"}
        low = max(low, LOWEST_OF_SILU) if is_activated else low
        pairs[tensor] = _new_pair(tensor, _add_scale(graph, tensor, low, high))
    _insert(graph, outputs, pairs)


def quantizable_outputs(graph: GraphProto) -> dict[str, str]:
    """The tensors that can be quantized, in the order of the graph, and the operators that put them out.

    They are the outputs of quantized convolutions, and of operators all of whose inputs are quantized or can
    be; without the last convolutions and what follows them.
    """
    makers, floats = producers(graph), _added_in_float(graph)
    last = {node.output[0] for node in decoding_nodes(graph, with_head=True)}
    found: dict[str, str] = {}
    for node in graph.node:
        sources = node.input[:1] if node.op_type in _KEEPING else node.input
        read = [name in found or (name in makers and makers[name].op_type == DEQUANTIZE) for name in sources]
        computes = node.op_type in (*_COMPUTING, *_KEEPING) and all(read)
        if node.output[0] not in last | floats and (computes or is_quantized(node, makers)):
            found[node.output[0]] = node.op_type
    return found


def in_floating_point(graph: GraphProto) -> list[str]:
    """Names of the quantized convolutions that ONNX Runtime could compute on integers and does not."""
    reading, outputs = readers(graph), quantizable_outputs(graph)
    return [
        node.name
        for node in graph.node
        if node.op_type == "Conv"
        and node.output[0] in outputs
        and [reader.op_type for reader in reading[node.output[0]]] != [QUANTIZE]
    ]


def _added_in_float(graph: GraphProto) -> set[str]:
    """Tensors to which a constant is added, as the biases that int32 cannot hold."""
    arrays = constants(graph)
    added = [
        node for node in graph.node if node.op_type == "Add" and not arrays.keys().isdisjoint(node.input)
    ]
    return {name for node in added for name in node.input}


def find_ranges(model: ModelProto, tensors: Sequence[str], images: Images) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of tensors: means over the images, and 0 among them.

    Args:
        model: a detector; left as it is.
        tensors: float32 (N, ...) each.
        images: batches, uint8 (N, 3, S, S), at least one.
    """
    if not tensors:
        return {}
    with tempfile.TemporaryDirectory() as folder, closing(create_engine("onnxruntime")) as engine:
        path = Path(folder) / "ranges.onnx"
        onnx.save(_with_extremes(model, tensors), str(path))
        engine.load(path, batch_size=1, cores=usable_physical_cores())
        batches = [engine.run(batch)[1:] for batch in images]
    means = [float(np.concatenate(found).mean()) for found in zip(*batches, strict=True)]
    return {
        tensor: (min(0.0, low), max(0.0, high))
        for tensor, low, high in zip(tensors, means[::2], means[1::2], strict=True)
    }


def _with_extremes(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """A copy that also puts out, of each tensor, each image's smallest and largest value: (N,) each."""
    copied = ModelProto()
    copied.CopyFrom(model)
    for index, tensor in enumerate(tensors):
        for kind in ("ReduceMin", "ReduceMax"):
            flat, name = f"ranges.{index}.{kind}.flat", f"ranges.{index}.{kind}"
            copied.graph.node.append(helper.make_node("Flatten", [tensor], [flat]))
            copied.graph.node.append(helper.make_node(kind, [flat], [name], axes=[1], keepdims=0))
            copied.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]))
    return copied


def _pairs(graph: GraphProto, tensors: Iterable[str]) -> dict[str, Pair]:
    """The pair that reads a tensor, of those that one reads; of several the first."""
    reading, found = readers(graph), {}
    for tensor in tensors:
        for quantize in [node for node in reading.get(tensor, []) if node.op_type == QUANTIZE][:1]:
            found[tensor] = quantize, reading[quantize.output[0]][0]
    return found


def _new_pair(tensor: str, numbers: Sequence[str]) -> Pair:
    """A pair for a tensor, from the names of its scale and zero point."""
    quantized, floats = f"{tensor}.quantized", f"{tensor}.dequantized"
    return (
        helper.make_node(QUANTIZE, [tensor, *numbers], [quantized], quantized),
        helper.make_node(DEQUANTIZE, [quantized, *numbers], [floats], floats),
    )


def _add_scale(graph: GraphProto, tensor: str, low: float, high: float) -> tuple[str, str]:
    """Add scale and zero point for a range that holds 0; returns their names."""
    scale = np.array((high - low) / 255 or 1.0, np.float32)  # of a tensor that is always 0 any scale
    zero = np.rint(-low / scale).astype(np.uint8)
    return add_constant(graph, f"{tensor}.scale", scale), add_constant(graph, f"{tensor}.zero", zero)


def _insert(graph: GraphProto, outputs: Collection[str], pairs: Mapping[str, Pair]) -> None:
    """Put pairs directly behind the nodes whose outputs they quantize, and let the others read them.

    Args:
        graph: changed in place.
        outputs: the tensors, in the order of the graph.
        pairs: of those that do not take the scale over from what they are computed of.
    """
    before = {node.output[0] for pair in pairs.values() for node in pair}
    numbers = {node.output[0]: node.input[1:] for node in graph.node if node.op_type == DEQUANTIZE}
    names: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in [node for node in graph.node if node.output[0] not in before]:
        tensor = node.output[0]
        rename_inputs(node, names)
        nodes.append(node)
        if tensor in outputs:
            pair = pairs.get(tensor) or _new_pair(tensor, numbers[node.input[0]])
            names[tensor] = pair[1].output[0]
            numbers[names[tensor]] = pair[1].input[1:]
            nodes += pair
    set_nodes(graph, nodes)
