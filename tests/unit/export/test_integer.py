"""The graph of integer convolutions, held against SparseML's (as recorded) and against the pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import copied, kinds, pair_graph, run
from onnx import numpy_helper

from sparse_exp.export.integer import to_integer_graph
from sparse_exp.export.pairs import tidy
from sparse_exp.sparsity.onnx_graph import constants, producers

RECORD = Path(__file__).parents[2] / "data" / "integer-graph"


def convolutions(graph: onnx.GraphProto) -> list[dict[str, np.ndarray]]:
    """Of each integer convolution the numbers that it computes with, whatever their types and names."""
    arrays, makers, found = constants(graph), producers(graph), []
    for scaling in [node for node in graph.node if node.op_type == "Mul" and node.input[1] in arrays]:
        cast = makers[scaling.input[0]]
        if cast.op_type != "Cast":
            continue
        add = makers[cast.input[0]]
        conv = makers[add.input[0]]
        data, weight, zero, weight_zero = conv.input
        assert data not in arrays
        found.append(
            {
                "weight": arrays[weight].astype(int) - arrays[weight_zero].reshape(-1, 1, 1, 1),
                "zero": arrays[zero].astype(int),
                "bias": arrays[add.input[1]],
                "scale": arrays[scaling.input[1]],
            }
        )
    return found


@pytest.fixture(params=["tensor", "channel"])
def record(request):
    """A graph of pairs, and what SparseML made of it."""
    return [onnx.load(str(RECORD / f"{request.param}.{kind}.onnx")) for kind in ("pairs", "sparseml")]


@pytest.fixture
def ours(record) -> onnx.ModelProto:
    model = copied(record[0])
    tidy(model.graph)
    to_integer_graph(model.graph)
    return model


def test_the_graph_is_that_of_sparseml(ours, record):
    theirs = record[1]
    assert kinds(ours.graph) == kinds(theirs.graph)
    pairs = list(zip(convolutions(ours.graph), convolutions(theirs.graph), strict=True))
    assert len(pairs) == 4
    for our, their in pairs:
        for name in our:
            np.testing.assert_array_equal(our[name], their[name], err_msg=name)
    assert ours.graph.input[0].type == theirs.graph.input[0].type


def test_it_computes_what_that_of_sparseml_computes(ours, record):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    for one in [one for one in record[1].graph.node if one.op_type == "ConvInteger"]:
        # ONNX Runtime does not run theirs with scales per channel: it takes one zero point.
        zero = next(item for item in record[1].graph.initializer if item.name == one.input[3])
        zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero).ravel()[0], zero.name))
    found, wanted = run(ours, images), run(record[1], images)
    np.testing.assert_array_equal(found, wanted)
    assert wanted.std() > 0.1


def test_it_computes_what_the_pairs_compute(ours, record):
    """But for biases, which the pairs hold in floating point: one step of many at most."""
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    difference = np.abs(run(ours, images) - run(record[0], images))
    assert difference.max() < 0.02
    assert difference.mean() < 0.001


@pytest.mark.parametrize("weight_scale", [1 / 127, [1 / 127, 0.004, 0.02, 1.0, 0.01, 0.01]])
def test_a_convolution_is_four_operators(weight_scale):
    model = pair_graph(bias=0.5, scale=0.01, weight_scale=weight_scale)
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    wanted = run(model, images)
    tidy(model.graph)
    to_integer_graph(model.graph)
    assert kinds(model.graph) == [
        "Add", "Cast", "ConvInteger", "Mul", "QuantizeLinear", "Reshape", "Transpose",
    ]  # fmt: skip
    np.testing.assert_allclose(run(model, images), wanted, atol=0.5 * 0.01 * np.max(weight_scale) + 1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-12])
def test_a_bias_that_int32_cannot_hold_is_added_in_floating_point(scale):
    model = pair_graph(bias=5.0, scale=scale)
    images = np.full((1, 3, 8, 8), 50 * scale, np.float32)
    wanted = run(model, images)
    tidy(model.graph)
    to_integer_graph(model.graph)
    assert [kind for kind in kinds(model.graph) if kind not in ("Reshape", "Transpose")] == [
        "Add", "Cast", "ConvInteger", "Mul", "QuantizeLinear",
    ]  # fmt: skip
    order = [node.op_type for node in model.graph.node]
    assert order.index("Mul") < order.index("Add")  # in int32 it would wrap around and turn its sign
    np.testing.assert_allclose(run(model, images), wanted, rtol=1e-5)
    assert np.abs(wanted[:, :, 0]).min() > 1


def test_what_is_not_quantized_stays():
    model = pair_graph(bias=0.5, scale=0.01)
    kept = [node for node in model.graph.node if not node.op_type.endswith("Linear")]
    names = {"xd": "x", "wd": "w"}
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    tidy(model.graph)
    before = kinds(model.graph)
    to_integer_graph(model.graph)
    assert kinds(model.graph) == before == ["Conv", "Reshape", "Transpose"]
