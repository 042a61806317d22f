"""The second door to SparseML: from a QDQ graph to the integer graph that DeepSparse runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper  # type: ignore[attr-defined]

from sparse_exp.sparsity.onnx_graph import constants, producers, quantized_weight, stored_constants

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sparseml 1.8 imports pkg_resources, which warns
    from sparseml.exporters.onnx_to_deepsparse import ONNXToDeepsparse
    from sparseml.exporters.transforms import onnx_transform

logging.getLogger("sparseml").setLevel(logging.WARNING)  # it reports every transformation

_BIAS_LIMIT = 2.0**30  # steps; leaves the sum of products as much room in 32 bits


def to_integer_graph(qdq: Path, destination: Path) -> None:
    """Convert a quantize-dequantize graph with floating-point input to integer convolutions.

    The quantize node at the input goes away, and the graph then reads uint8 images: this is exact when
    the input's scale is 1/255 and its zero point 0 (see `sparse_exp.recipes.recipe.pin_input_quantizer`).

    Args:
        qdq: ONNX file with fake quantization exported as QuantizeLinear and DequantizeLinear.
        destination: file to write; may be the same.
    """
    exporter = ONNXToDeepsparse(skip_input_quantize=True, inplace=True)
    kinds = [type(transform).__name__ for transform in exporter.transforms]
    keeper = SimpleNamespace(apply=keep_large_biases)  # all that SparseML wants of a transformation
    exporter.transforms.insert(kinds.index("ConvToConvIntegerAddCastMul"), keeper)
    with warnings.catch_warnings(), _unchecked():
        warnings.simplefilter("ignore")
        model = exporter.apply(onnx.load(str(qdq)))
    _broadcast_scales(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(destination))


@contextmanager
def _unchecked() -> Iterator[None]:
    """SparseML checks the whole model before and after each of its 19 steps, which takes longer than they."""
    check, onnx_transform.validate_onnx = onnx_transform.validate_onnx, lambda model: None
    try:
        yield
    finally:
        onnx_transform.validate_onnx = check


def _broadcast_scales(model: ModelProto) -> None:
    """Shape scales of output channels so that they meet the channels, in place.

    Where a convolution has no bias, as after `keep_large_biases`, SparseML leaves them as a list.
    """
    stored = {item.name: item for item in model.graph.initializer}
    summed = {node.output[0] for node in model.graph.node if node.op_type == "ConvInteger"}
    casts = {
        node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in summed
    }
    for node in [node for node in model.graph.node if node.op_type == "Mul"]:
        scale = stored.get(node.input[1]) if node.input[0] in casts else None
        if scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1:
            scale.dims[:] = [1, scale.dims[0], 1, 1]


def keep_large_biases(model: ModelProto) -> ModelProto:
    """Take biases that would not fit into 32-bit integers out of their convolutions, in place.

    The integer graph stores a bias in steps of input scale times weight scale. Where a layer's inputs
    are all nearly 0, as in a detector that has hardly been trained, the steps are so small that
    SparseML's int32 overflows without a word. Such a bias is added in floating point instead.

    Args:
        model: quantize-dequantize graph whose constants are initializers.

    Returns:
        The same model.
    """
    arrays, makers = constants(model.graph), producers(model.graph)
    for conv in [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3]:
        feeders = [makers.get(name) for name in conv.input[:2]]
        if any(feeder is None or feeder.op_type != "DequantizeLinear" for feeder in feeders):
            continue
        step = np.prod([float(np.max(arrays[feeder.input[1]])) for feeder in feeders if feeder])
        bias = arrays[conv.input[2]]
        if np.abs(bias).max() >= _BIAS_LIMIT * step:
            _split_bias(model, conv, bias)
    return model


def _split_bias(model: ModelProto, conv: NodeProto, bias: NDArray[Any]) -> None:
    name, output = f"{conv.name}.bias_float", conv.output[0]
    model.graph.initializer.append(numpy_helper.from_array(bias.reshape(1, -1, 1, 1), name))
    del conv.input[2]
    conv.output[0] = f"{output}_without_bias"
    add = helper.make_node("Add", [conv.output[0], name], [output], name)
    model.graph.node.insert(list(model.graph.node).index(conv) + 1, add)


def unsign_activations(path: Path) -> None:
    """Rewrite a quantize-dequantize graph so that its activations are uint8 instead of int8, in place.

    Both mean the same numbers: integers and zero points move by 128 together. But OpenVINO (run:
    2026.4.1, AVX2) drops the scale of signed activations where a concatenation is quantized, and every
    convolution behind it computes nonsense. Weights stay int8.

    Args:
        path: ONNX file, as PyTorch exports fake quantization.
    """
    model = onnx.load(str(path))
    arrays = constants(model.graph)
    moved: dict[str, str] = {}
    consumers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        zero = quantize.input[2]
        if quantize.input[0] in arrays or arrays[zero].dtype != np.int8:
            continue
        if zero not in moved:
            moved[zero] = f"{zero}.unsigned"
            shifted = (arrays[zero].astype(np.int16) + 128).astype(np.uint8)
            model.graph.initializer.append(numpy_helper.from_array(shifted, moved[zero]))
        quantize.input[2] = consumers[quantize.output[0]].input[2] = moved[zero]
    _make_scalar(model)
    onnx.save(model, str(path))


def store_integers(path: Path) -> None:
    """Store the weights of a quantize-dequantize graph as the integers that they are rounded to, in place.

    PyTorch exports them in fp32 with a node that rounds them whenever the file is loaded. The numbers are
    the same, in a quarter of the bytes.

    Args:
        path: ONNX file, as PyTorch exports fake quantization.
    """
    model = onnx.load(str(path))
    graph, arrays = model.graph, constants(model.graph)
    for rounding in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if rounding.input[0] in arrays:
            integers = quantized_weight(rounding, arrays)
            graph.initializer.append(numpy_helper.from_array(integers, rounding.output[0]))
            graph.node.remove(rounding)
    _drop_unused(model)
    onnx.save(model, str(path))


def _drop_unused(model: ModelProto) -> None:
    """Remove nodes and initializers that nothing reads, in place."""
    graph = model.graph
    read = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)


def _make_scalar(model: ModelProto) -> None:
    """Store scales and zero points of whole tensors as scalars instead of lists of one, in place.

    ONNX Runtime (run: 1.26.0) fuses residual adds of the graphs that older recipes make, and its fused
    operator takes scalars only.
    """
    stored = stored_constants(model.graph)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for tensor in [stored[name] for name in node.input[1:] if list(stored[name].dims) == [1]]:
                del tensor.dims[:]
