import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_exp.sparsity.onnx_graph import (
    constants,
    layer_name,
    per_channel,
    producers,
    quantized_weight,
    stored_constants,
)

VALUES = {"stored": [1.0, 2.0], "scale": [[0.5]]}


@pytest.fixture
def graph():
    """Two initializers, a constant that has two more names, and nodes that compute something."""
    constant = numpy_helper.from_array(np.array([7], np.int64))
    nodes = [
        helper.make_node("Constant", [], ["seven"], value=constant),
        helper.make_node("Constant", [], ["text"], value_string=b"none of ours"),
        helper.make_node("Identity", ["seven"], ["again"]),
        helper.make_node("Identity", ["again"], ["thrice"]),
        helper.make_node("Identity", ["x"], ["computed"]),
        helper.make_node("Split", ["computed"], ["left", "right"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in VALUES.items()
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "left")]
    return helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)


def test_constants_are_initializers_constant_nodes_and_their_other_names(graph):
    found = constants(graph)
    assert {name: array.tolist() for name, array in found.items()} == {
        **VALUES,
        "seven": [7],
        "again": [7],
        "thrice": [7],
    }
    assert (found["stored"].dtype, found["thrice"].dtype) == (np.float32, np.int64)


def test_a_change_to_a_stored_constant_changes_the_graph_under_each_of_its_names(graph):
    stored = stored_constants(graph)
    del stored["thrice"].dims[:]
    del stored["scale"].dims[:]
    assert [constants(graph)[name].shape for name in ("seven", "again", "scale")] == [(), (), ()]


def test_each_tensor_is_made_by_one_node(graph):
    makers = producers(graph)
    assert makers["left"] is makers["right"]
    assert makers["left"].op_type == "Split"
    assert {name for name, node in makers.items() if node.op_type == "Identity"} == {
        "again",
        "thrice",
        "computed",
    }
    assert not {"x", *VALUES} & set(makers)


@pytest.mark.parametrize(
    ("scale", "zero", "integers"),
    [  # by hand: round(weight / scale) + zero, held in the range of 8 bits
        (np.float32(0.5), np.int8(0), [[1, -2], [127, 0]]),
        (np.array([0.5], np.float32), np.array([128], np.uint8), [[129, 126], [255, 128]]),
        (np.array([0.5, 50.0], np.float32), np.array([0, 1], np.int8), [[1, -2], [3, 1]]),
    ],
)
def test_a_weight_is_rounded_for_the_whole_or_for_each_channel(scale, zero, integers):
    weight = np.array([[0.6, -1.0], [100.0, 0.1]], np.float32).reshape(2, 2, 1, 1)
    node = helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"])
    found = quantized_weight(node, {"w": weight, "s": scale, "z": zero})
    assert found.dtype == zero.dtype
    assert found.reshape(2, 2).tolist() == integers


def test_one_value_for_each_channel_meets_the_output_channels():
    assert per_channel(np.arange(3)).shape == (3, 1, 1, 1)
    assert per_channel(np.array([4])).shape == per_channel(np.array(4)).shape == ()


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("/model.0/conv/Conv", "model.0.conv"),
        ("/model/model.2/cv1/conv/module/Conv_quant", "model.2.cv1.conv"),
        ("/model/model.8/m/m.0/cv1/conv/Conv", "model.8.m.0.cv1.conv"),
        ("/model/model.6/m/m.0/cv2/conv/module/bn/BatchNormalization_output_0_quant", "model.6.m.0.cv2.conv"),
        ("/model.24/m.2/module/Conv_output_0_quant", "model.24.m.2"),
        ("/model.24/m/m.1/m.1.module/Conv", "model.24.m.1"),
        ("/model.24/Mul_output_0", "model.24.Mul"),
        ("model.2.cv1.conv", "model.2.cv1.conv"),  # a name of the model is its own
        ("shuffle_5", "shuffle_5"),
        ("Conv_12", "Conv_12"),
    ],
)
def test_a_node_has_the_name_of_its_layer(node, name):
    assert layer_name(node) == name
