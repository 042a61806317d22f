"""Rewriting of ONNX graphs: constants in one place, tensors renamed, nothing left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, numpy_helper

from sparse_exp.sparsity.onnx_graph import constants, stored_constants

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def store_constants(graph: GraphProto) -> None:
    """Make an initializer of every constant, in place: no Constant nodes, and no second names."""
    arrays = constants(graph)
    set_nodes(graph, [node for node in graph.node if node.output[0] not in arrays])
    read = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    for name, array in arrays.items():
        if name in read:
            add_constant(graph, name, array)


def add_constant(graph: GraphProto, name: str, value: NDArray[Any]) -> str:
    """Add an initializer under a name that must be new, and return that name."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Give a graph other nodes, in place."""
    del graph.node[:]
    graph.node.extend(nodes)


def rename_inputs(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let a node read other tensors, in place; those that ``names`` does not hold stay."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)


def readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """For each tensor the nodes that read it."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes and initializers that nothing reads, in place."""
    read, kept = {output.name for output in graph.output}, []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            read.update(node.input)
            kept.append(node)
    set_nodes(graph, kept[::-1])
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)


def make_scalars(graph: GraphProto) -> None:
    """Store scales and zero points of whole tensors as scalars instead of lists of one, in place.

    ONNX Runtime's fused operators take scalars only (run: 1.26.0, residual adds).
    """
    stored = stored_constants(graph)
    for node in graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            for tensor in [stored[name] for name in node.input[1:] if list(stored[name].dims) == [1]]:
                del tensor.dims[:]


def decoding_nodes(graph: GraphProto, *, with_head: bool = False) -> list[NodeProto]:
    """The nodes that no convolution follows, the last first.

    Args:
        graph: of a detector, not with integer convolutions.
        with_head: also those of these nodes that are convolutions themselves: the last.
    """
    before: set[str] = set()  # tensors that a convolution depends on
    found = []
    for node in reversed(graph.node):
        is_convolution, leads_to_one = node.op_type == "Conv", not before.isdisjoint(node.output)
        if is_convolution or leads_to_one:
            before.update(node.input)
        if not leads_to_one and (with_head or not is_convolution):
            found.append(node)
    return found
