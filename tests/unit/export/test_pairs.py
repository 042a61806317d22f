"""Graphs of pairs, tidied: the same numbers in the types that engines compute with."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import copied, kinds, model_of, node, pair_graph, run
from onnx import TensorProto

from sparse_exp.export.pairs import keep_inputs, tidy
from sparse_exp.sparsity.onnx_graph import constants

FLOATS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
CHANNELS = [1 / 127, 0.004, 0.02, 1.0, 0.01, 0.01]


@pytest.mark.parametrize("weight_scale", [1 / 127, CHANNELS], ids=["per tensor", "per channel"])
def test_a_tidy_graph_computes_the_same_with_stored_integers(weight_scale):
    model = pair_graph(bias=0.5, scale=0.01, weight_scale=weight_scale)
    changed = copied(model)
    tidy(changed.graph)
    # Biases are rounded to steps of input scale times weight scale.
    np.testing.assert_allclose(
        run(changed, FLOATS), run(model, FLOATS), atol=0.5 * 0.01 * np.max(weight_scale) + 1e-6
    )
    assert kinds(changed.graph) == [
        "Conv", *["DequantizeLinear"] * 3, "QuantizeLinear", "Reshape", "Transpose",
    ]  # fmt: skip
    arrays = constants(changed.graph)
    weight, zero = arrays["wq"], next(v for name, v in arrays.items() if name.endswith(".unsigned"))
    rounded = constants(model.graph)["w"] / np.reshape(weight_scale, (-1, 1, 1, 1)).astype(np.float32)
    np.testing.assert_array_equal(weight, rounded.round().clip(-128, 127))
    assert (weight.dtype, zero.dtype, int(zero)) == (np.int8, np.uint8, 10)
    assert [value.dtype for name, value in arrays.items() if name.endswith("bias_steps")] == [np.int32]
    assert "w" not in arrays


def test_a_tidy_graph_stays_as_it_is():
    model = pair_graph(bias=0.5, scale=0.01)
    tidy(model.graph)
    once = model.SerializeToString()
    tidy(model.graph)
    assert model.SerializeToString() == once


def test_an_empty_channel_with_a_tiny_scale_does_not_keep_the_bias_out_of_the_integers():
    """Of weights that are all 0 an observer gives the least scale that there is."""
    scales = np.array(CHANNELS, np.float32)
    scales[0] = np.finfo(np.float32).eps
    model = pair_graph(bias=5.0, scale=1e-4, weight_scale=scales)
    weight = next(item for item in model.graph.initializer if item.name == "w")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    wanted = run(model, FLOATS)
    tidy(model.graph)
    assert "Add" not in kinds(model.graph)
    np.testing.assert_allclose(run(model, FLOATS), wanted, atol=1e-4)


def pixel_graph(scale=1 / 255, zero=0, factor=1 / 255) -> onnx.ModelProto:
    nodes = [
        node("Cast", "images", "f", to=TensorProto.FLOAT),
        node("Mul", "f factor", "x"),
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("Flatten", "d", "y"),
    ]
    values = {"factor": np.float32(factor), "s": np.float32(scale), "z": np.uint8(zero)}
    return model_of(nodes, values, [("images", TensorProto.UINT8, ["n", 3, 8, 8])], [("y", ["n", 192])])


PIXELS = (np.arange(2 * 192) % 256).astype(np.uint8).reshape(2, 3, 8, 8)


def test_pixels_are_not_rounded_again():
    model = pixel_graph()
    wanted = run(model, PIXELS)
    tidy(model.graph)
    assert kinds(model.graph) == ["DequantizeLinear", "Flatten"]
    np.testing.assert_array_equal(run(model, PIXELS), wanted)


@pytest.mark.parametrize("other", [{"scale": 1 / 200}, {"zero": 3}, {"factor": 1 / 256}])
def test_images_that_are_rounded_otherwise_still_are(other):
    model = pixel_graph(**other)
    wanted = run(model, PIXELS)
    tidy(model.graph)
    assert kinds(model.graph) == ["Cast", "DequantizeLinear", "Flatten", "Mul", "QuantizeLinear"]
    np.testing.assert_array_equal(run(model, PIXELS), wanted)


def twice(first: float, second: float, kind: str) -> onnx.ModelProto:
    """A tensor that is quantized twice, for a `kind` of two inputs; and once again behind it."""
    nodes = [
        node("QuantizeLinear", "x s1 z", "q1"),
        node("DequantizeLinear", "q1 s1 z", "d1"),
        node("QuantizeLinear", "x s2 z", "q2"),
        node("DequantizeLinear", "q2 s2 z", "d2"),
        node(kind, "d1 d2", "c"),
        node("QuantizeLinear", "c s1 z", "q3"),
        node("DequantizeLinear", "q3 s1 z", "d3"),
        node("Flatten", "d3", "y"),
    ]
    values = {"s1": np.float32([first]), "s2": np.float32([second]), "z": np.uint8([128])}
    return model_of(nodes, values, [("x", TensorProto.FLOAT, ["n", 3, 8, 8])], [("y", ["n", 192])])


@pytest.mark.parametrize(("second", "pairs"), [(0.01, 2), (0.02, 3)])
def test_equal_pairs_of_one_tensor_become_one(second, pairs):
    model = twice(0.01, second, "Add")
    wanted = run(model, FLOATS)
    tidy(model.graph)
    assert kinds(model.graph).count("QuantizeLinear") == kinds(model.graph).count("DequantizeLinear") == pairs
    np.testing.assert_array_equal(run(model, FLOATS), wanted)
    assert all(value.ndim == 0 for value in constants(model.graph).values())


def test_only_pairs_that_convolutions_and_additions_read_are_kept():
    model = twice(0.01, 0.02, "Add")
    tidy(model.graph)
    keep_inputs(model.graph)
    assert kinds(model.graph) == ["Add", *["DequantizeLinear"] * 2, "Flatten", *["QuantizeLinear"] * 2]
    model = twice(0.01, 0.02, "Mul")
    keep_inputs(model.graph)
    assert kinds(model.graph) == ["Flatten", "Mul"]
    np.testing.assert_array_equal(run(model, FLOATS), (FLOATS * FLOATS).reshape(2, -1))
