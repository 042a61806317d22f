"""The graph for ONNX Runtime: what it runs after its own optimization, and that it is the same network."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import LEVELS, copied, kinds, model_of, node, run
from onnx import TensorProto

from sparse_exp.errors import ExportError
from sparse_exp.export.outputs import find_ranges, in_floating_point, quantizable_outputs, quantize_outputs
from sparse_exp.export.pairs import tidy
from sparse_exp.export.verification import check_graph
from sparse_exp.runs.deployment import ONNXRUNTIME, QDQ
from sparse_exp.sparsity.onnx_graph import constants, producers


def optimized(path, folder) -> Counter:
    """The operators that ONNX Runtime runs, without its layout of the CPU at hand."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = LEVELS.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


def test_onnx_runtime_computes_all_but_the_head_on_integers(deployment, tmp_path):
    found = optimized(deployment / ONNXRUNTIME, tmp_path)
    wanted = {"QLinearConv": 57, "QLinearSigmoid": 57, "QLinearMul": 57, "QLinearAdd": 7, "QLinearConcat": 13}
    assert {kind: found[kind] for kind in wanted} == wanted
    assert found["Conv"] + found["FusedConv"] == 3  # the head's
    assert found["QuantizeLinear"] == 0
    assert optimized(deployment / QDQ, tmp_path)["QLinearConv"] == 0  # which is why there is another file


def small() -> onnx.ModelProto:
    """Images -> convolution, SiLU, pooling, concatenation -> the last convolution, to (N, 16, 6)."""
    nodes = [
        node("DequantizeLinear", "images s0 z0", "x"),
        node("DequantizeLinear", "w1 sw zw", "w1d"),
        node("Conv", "x w1d", "c", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Sigmoid", "c", "g"),
        node("Mul", "c g", "m"),
        node("MaxPool", "m", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Concat", "m p", "t", axis=1),
        node("QuantizeLinear", "t st zt", "tq"),
        node("DequantizeLinear", "tq st zt", "td"),
        node("DequantizeLinear", "w2 sw zw", "w2d"),
        node("Conv", "td w2d", "h"),
        node("Reshape", "h shape", "r"),
        node("Transpose", "r", "e", perm=[0, 2, 1]),
        node("Sigmoid", "e", "y"),
    ]
    rng = np.random.default_rng(0)
    values = {
        "s0": np.float32(1 / 255),
        "z0": np.uint8(0),
        "sw": np.float32(0.01),
        "zw": np.int8(0),
        "w1": rng.integers(-64, 64, (4, 3, 3, 3), dtype=np.int8),
        "w2": rng.integers(-64, 64, (6, 8, 1, 1), dtype=np.int8),
        "st": np.float32(0.02),
        "zt": np.uint8(20),
        "shape": np.array([0, 6, 16]),
    }
    return model_of(nodes, values, [("images", TensorProto.UINT8, ["n", 3, 8, 8])], [("y", ["n", 16, 6])])


IMAGES = np.random.default_rng(1).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)


def tensor(model: onnx.ModelProto, name: str) -> np.ndarray:
    """What the model computes of the images for one tensor."""
    other = copied(model)
    other.graph.output.insert(0, onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(other.SerializeToString(), options).run(None, {"images": IMAGES})[0]


def test_what_follows_the_last_convolution_is_left_in_floating_point():
    assert quantizable_outputs(small().graph) == {
        "c": "Conv", "g": "Sigmoid", "m": "Mul", "p": "MaxPool", "t": "Concat",
    }  # fmt: skip


def test_ranges_are_means_over_the_images_and_hold_0():
    model = small()
    found = find_ranges(model, ["c", "g"], [IMAGES[:2], IMAGES[2:]])
    for name in found:
        each = tensor(model, name).reshape(5, -1)
        assert found[name][0] == pytest.approx(min(0, each.min(1).mean()), abs=1e-6)
        assert found[name][1] == pytest.approx(max(0, each.max(1).mean()), abs=1e-6)
    assert found["c"][0] < -0.5
    assert found["g"][0] == 0
    assert find_ranges(model, [], []) == {}


def test_each_scale_is_where_it_comes_from():
    model = small()
    low, high = find_ranges(model, ["m"], [IMAGES])["m"]
    quantize_outputs(model, [IMAGES])
    arrays, quantizers = constants(model.graph), {}
    for one in model.graph.node:
        if one.op_type == "QuantizeLinear":
            quantizers[one.input[0]] = tuple(float(arrays[name]) for name in one.input[1:])
    assert quantizers.keys() == {"c", "g", "m", "p", "t"}
    assert quantizers["g"] == (1 / 256, 0)
    assert quantizers["t"] == (pytest.approx(0.02), 20)  # as the convolution behind it reads it
    assert quantizers["m"] == (pytest.approx((high - low) / 255), round(-low / (high - low) * 255))
    assert quantizers["p"] == quantizers["m"]  # of what is pooled no value is new


def test_what_silu_makes_0_of_takes_no_steps_from_the_rest():
    model = small()
    weights = next(item for item in model.graph.initializer if item.name == "w1")
    values = np.full_like(onnx.numpy_helper.to_array(weights), -127)
    values[:2] = 127
    weights.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    low, high = find_ranges(model, ["c"], [IMAGES])["c"]
    assert low < -8
    quantize_outputs(model, [IMAGES])
    arrays = constants(model.graph)
    scale, zero = float(arrays["c.scale"]), int(arrays["c.zero"])
    assert (-zero * scale, (255 - zero) * scale) == (
        pytest.approx(-8, abs=scale),
        pytest.approx(high, abs=scale),
    )


def test_it_is_the_same_network():
    model = small()
    wanted = run(model, IMAGES)
    quantize_outputs(model, [IMAGES])
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
        assert np.abs(run(model, IMAGES, level) - wanted).mean() < 0.01
    assert wanted.std() > 0.1


def test_each_tensor_is_read_through_its_pair_alone():
    model = small()
    quantize_outputs(model, [IMAGES])
    makers = producers(model.graph)
    for name in ("c", "g", "m", "p", "t"):
        readers = [one.op_type for one in model.graph.node if name in one.input]
        assert readers == ["QuantizeLinear"], name
    (concat,) = [one for one in model.graph.node if one.op_type == "Concat"]
    assert {makers[name].op_type for name in concat.input} == {"DequantizeLinear"}


def test_a_tensor_that_layers_read_with_several_scales_keeps_them():
    model = small()
    again = [
        node("QuantizeLinear", "m st zt", "mq"),
        node("DequantizeLinear", "mq st zt", "md"),
        node("QuantizeLinear", "m s2 zt", "mq2"),
        node("DequantizeLinear", "mq2 s2 zt", "md2"),
        node("Add", "md md2", "a"),
    ]
    nodes = list(model.graph.node)
    nodes[5:5] = again
    nodes[10].input[0] = "a"  # of the pooling
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.04), "s2"))
    wanted = run(model, IMAGES)
    quantize_outputs(model, [IMAGES])
    assert np.abs(run(model, IMAGES) - wanted).mean() < 0.01
    first = [one.input[1] for one in model.graph.node if one.op_type == "QuantizeLinear" and "m" in one.input]
    assert first == ["st"]
    (second,) = [one for one in model.graph.node if one.output[0] == "mq2"]
    assert second.input[0] == "md"


def test_a_bias_in_floating_point_leaves_its_layer_there():
    model = small()
    for one in model.graph.node:
        if "c" in one.input:
            for index, name in enumerate(one.input):
                one.input[index] = "cb" if name == "c" else name
    model.graph.node.insert(3, node("Add", "c huge", "cb"))
    huge = np.full((1, 4, 1, 1), 0.5, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(huge, "huge"))
    assert quantizable_outputs(model.graph) == {}
    before = kinds(model.graph)
    quantize_outputs(model, [IMAGES])
    assert kinds(model.graph) == before
    assert in_floating_point(model.graph) == []


def test_a_graph_that_would_run_in_floating_point_is_refused(deployment, lively_model, tmp_path):
    check_graph(deployment / ONNXRUNTIME, lively_model)
    (tmp_path / ONNXRUNTIME).write_bytes((deployment / QDQ).read_bytes())
    with pytest.raises(
        ExportError, match=r"convolutions of model\.onnxruntime\.onnx to be integer, but got "
    ):
        check_graph(tmp_path / ONNXRUNTIME, lively_model)


def test_trained_ranges_are_used_where_there_are_some():
    """A pair behind a convolution is that of its output, whether trained or found before."""
    model = small()
    nodes = list(model.graph.node)
    nodes[3:3] = [
        node("QuantizeLinear", "c s2 zt", "cq"),
        node("DequantizeLinear", "cq s2 zt", "cd"),
    ]
    for one in nodes[5:7]:
        for index, name in enumerate(one.input):
            one.input[index] = "cd" if name == "c" else name
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.03), "s2"))
    tidy(model.graph)
    quantize_outputs(model, [IMAGES])
    arrays = constants(model.graph)
    (pair,) = [one for one in model.graph.node if one.op_type == "QuantizeLinear" and one.input[0] == "c"]
    assert float(arrays[pair.input[1]]) == pytest.approx(0.03)
