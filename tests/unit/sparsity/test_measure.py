from __future__ import annotations

import gzip
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sparse_exp.errors import SparsityError
from sparse_exp.sparsity.measure import (
    LayerSparsity,
    SparsityContract,
    gzip_bytes,
    layer_sparsity,
    listed,
    onnx_facts,
    overall,
    require_layer_sparsity,
    require_sparsity,
    sparsity_table,
    state_sparsity,
    stock_macs,
    total_macs,
    work_sparsity,
)


def conv_with(weight: np.ndarray, **options) -> nn.Conv2d:
    out, into, height, width = weight.shape
    conv = nn.Conv2d(into, out, (height, width), **options)
    conv.weight.data = torch.from_numpy(weight.astype(np.float32))
    return conv


def some_convs(*names: str, zeros: int = 4) -> dict[str, nn.Conv2d]:
    weight = np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1, 1)
    weight.reshape(-1)[:zeros] = 0
    return {name: conv_with(weight) for name in names}


def test_counts_exact_zeros_only_and_minus_zero_too():
    weight = np.array([0.0, -0.0, 1e-30, 2.0, -3.0, 0.0]).reshape(3, 2, 1, 1)
    assert layer_sparsity({"a": conv_with(weight)}) == [LayerSparsity("a", zeros=3, weights=6)]


def test_overall_weighs_layers_by_their_size():
    layers = [LayerSparsity("small", 10, 10), LayerSparsity("large", 0, 90)]
    assert overall(layers) == pytest.approx(0.1)
    assert layers[0].sparsity == 1.0
    assert overall([]) == 0.0


# GFLOPs of an image of 640 px at 80 classes in the release notes of v6.0; two for each multiplication.
PUBLISHED_GFLOPS = {"n": 4.5, "s": 16.5, "m": 49.0, "l": 109.1, "x": 205.7}


@pytest.mark.parametrize("size", PUBLISHED_GFLOPS)
def test_the_work_of_each_size_is_the_published_one(size):
    assert 2e-9 * stock_macs(size, 80, 640) == pytest.approx(PUBLISHED_GFLOPS[size], rel=0.025)


def test_multiplications_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from sparse_exp.yolov5 import YOLOv5

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = YOLOv5("n", 3).eval()
        with model.export_mode(96):
            model(torch.zeros(1, 3, 96, 96))
    by_module = counter.get_flop_counts()
    convolutions = model.quantizable_convolutions()
    for name, conv in convolutions.items():
        assert 2 * total_macs({name: conv}, 96) == sum(by_module[f"YOLOv5.{name}"].values()), name
    assert 2 * total_macs(convolutions, 96) == counter.get_total_flops() == 2 * stock_macs("n", 3, 96)


def test_the_work_of_zeros_is_weighed_by_the_size_of_the_layers_maps():
    early, late = LayerSparsity("model.1.conv", 50, 100), LayerSparsity("model.7.conv", 900, 1000)
    # of 32 px: maps of 8 x 8 and of 1 x 1
    assert (early.macs(32), late.macs(32), early.macs(64)) == (6400, 1000, 25600)
    assert work_sparsity([early, late]) == pytest.approx((3200 + 900) / 7400)
    assert overall([early, late]) == pytest.approx(950 / 1100)
    assert work_sparsity([]) == 0.0


@pytest.mark.parametrize("name", ["a", "model.25.conv", "model.24.m.3", "model.24.anchors", "model.x.conv"])
def test_only_layers_of_a_detector_have_work(name):
    with pytest.raises(ValueError, match="no convolution"):
        LayerSparsity(name, 0, 1).macs(64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_contract_holds_while_only_other_weights_move(memory_format):
    convs = some_convs("a", "b")
    contract = SparsityContract.of(convs)
    for conv in convs.values():
        conv.to(memory_format=memory_format)
        conv.weight.data[conv.weight.data != 0] += 5
    contract.check(convs, "after epoch 1")


def test_contract_ignores_new_zeros_and_later_changes_do_not_move_it():
    convs = some_convs("a")
    contract = SparsityContract.of(convs)
    convs["a"].weight.data.zero_()
    contract.check(convs, "after epoch 1")
    convs["a"].weight.data.view(-1)[0] = 1e-38
    with pytest.raises(SparsityError):
        contract.check(convs, "after epoch 2")


def test_broken_contract_names_the_layers_and_the_moment():
    convs = some_convs("intact", "broken.cv1")
    contract = SparsityContract.of(convs)
    convs["broken.cv1"].weight.data.view(-1)[2] = -1e-6
    with pytest.raises(SparsityError, match=r"broken\.cv1") as error:
        contract.check(convs, "after epoch 3")
    assert "after epoch 3" in str(error.value)
    assert "intact" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_layer_that_is_gone_breaks_the_contract():
    convs = some_convs("a", "b")
    contract = SparsityContract.of(convs)
    del convs["b"]
    with pytest.raises(SparsityError, match=" b"):
        contract.check(convs, "in the checkpoint")


def test_many_broken_layers_are_counted_instead_of_listed():
    convs = some_convs(*"abcde")
    contract = SparsityContract.of(convs)
    for conv in convs.values():
        conv.weight.data += 1
    with pytest.raises(SparsityError, match="a, b, c and 2 more"):
        contract.check(convs, "after epoch 1")


def expecting(**shares: float) -> dict[str, float]:
    return shares


def test_new_zeros_are_promised_where_a_recipe_expects_as_many():
    convs = some_convs("expected", "chance", "dense", zeros=4)  # of 16
    contract = SparsityContract()
    contract.extend(convs, expecting(expected=0.25, chance=0.125, dense=0.0))
    for conv in convs.values():
        conv.weight.data[conv.weight.data == 0] = 1.0
    with pytest.raises(SparsityError, match=r"others in expected\. The"):
        contract.check(convs, "after epoch 1")


@pytest.mark.parametrize(("zeros", "promised"), [(3, True), (4, True), (5, True), (2, False), (6, False)])
def test_zeros_are_taken_for_the_recipes_to_one_weight(zeros, promised):
    contract = SparsityContract()
    contract.extend(some_convs("a", zeros=zeros), expecting(a=4 / 16))
    assert ("a" in contract.masks) is promised


def test_growing_zeros_are_promised_as_they_come():
    contract = SparsityContract()
    for zeros in (2, 8):
        contract.extend(some_convs("a", zeros=zeros), expecting(a=zeros / 16))
        assert contract.promised(expecting(a=0.0)) == {"a": zeros / 16}
    contract.extend(some_convs("a", zeros=10), expecting(a=0.25))  # a surplus: who knows which
    assert contract.promised(expecting(a=0.25, b=0.75)) == {"a": 0.5, "b": 0.75}


def test_a_layer_must_have_the_expected_share_to_one_weight():
    contract, convs = SparsityContract(), some_convs("a", "b", zeros=4)
    contract.check(convs, "after epoch 1", expecting(a=5 / 16, b=0.25))
    with pytest.raises(
        SparsityError, match=r"zeros after epoch 1, but got less in b \(25\.00% of 37\.50%\)\. "
    ):
        contract.check(convs, "after epoch 1", expecting(a=5 / 16, b=6 / 16))


def test_layers_that_fall_short_are_named_up_to_three_and_counted():
    layers = [LayerSparsity(name, 10, 100) for name in "abcde"]
    require_layer_sparsity(layers, {"a": 0.1, "b": 0.11}, "in x.pt")
    with pytest.raises(SparsityError, match=r"in x\.pt, .* d \(10\.00% of 90\.00%\) and 2 more\. ") as error:
        require_layer_sparsity(layers, dict.fromkeys(["b", "c", "d", "e", "gone"], 0.9), "in x.pt")
    assert " a (" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SparsityError, match=r"gone \(missing of 50\.00%\)"):
        require_layer_sparsity(layers, {"gone": 0.5}, "in x.pt")
    require_layer_sparsity(layers, {"gone": 0.0}, "in x.pt")  # nothing was promised


def test_a_state_dict_is_counted_by_published_names():
    state = {
        "model.0.conv.weight": torch.tensor([0.0, 1.0, -0.0, 2.0]).view(2, 2, 1, 1),
        "model.1.conv.module.weight": torch.zeros(1, 3, 1, 1),
        "model.1.bn.weight": torch.zeros(4),
        "model.1.conv.module.bias": torch.zeros(4),
        "model.24.anchors": torch.zeros(3, 3, 2),
        "model.24.m.0.weight": torch.ones(1, 2, 1, 1),
    }
    found = [(layer.name, layer.zeros, layer.weights) for layer in state_sparsity(state)]
    assert found == [("model.0.conv", 2, 4), ("model.1.conv", 3, 3), ("model.24.m.0", 0, 2)]


def test_the_table_has_a_row_per_layer():
    layers = [LayerSparsity("model.1.conv", 1, 3), LayerSparsity("model.24.m.2", 0, 4)]
    assert sparsity_table(layers, {"model.1.conv": 0.25}, 64) == (
        "layer,weights,zeros,sparsity,promised,macs\n"
        "model.1.conv,3,1,0.333333,0.250000,768\n"
        "model.24.m.2,4,0,0.000000,0.000000,16\n"
    )


def test_long_lists_are_cut():
    assert [listed(names) for names in (["a"], list("abc"), list("abcde"))] == [
        "a",
        "a, b, c",
        "a, b, c and 2 more",
    ]


INTEGERS = np.array([[0, 3, -5, 0], [0, 0, 0, 127]], np.int8).reshape(2, 4, 1, 1)  # 5 of 8 are 0


def save_graph(path, nodes, constants) -> None:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 2, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def node(kind: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"{output}_{kind}", **attributes)


INPUT = [node("QuantizeLinear", "x sx zx", "xq"), node("DequantizeLinear", "xq sx zx", "xd")]
INPUT_VALUES = {"sx": np.float32(0.1), "zx": np.uint8(7)}


def facts_of(tmp_path, nodes, constants):
    save_graph(tmp_path / "m.onnx", nodes, constants)
    return onnx_facts(tmp_path / "m.onnx")


def test_onnx_float_convolution(tmp_path):
    facts = facts_of(tmp_path, [node("Conv", "x w", "y")], {"w": INTEGERS.astype(np.float32)})
    assert facts.layers == [LayerSparsity("y_Conv", 5, 8)]
    assert (facts.quantized, facts.convolutions) == (0, 1)


def test_onnx_weight_in_a_constant_node_behind_an_identity(tmp_path):
    weight = numpy_helper.from_array(INTEGERS.astype(np.float32))
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    facts = facts_of(tmp_path, [constant, node("Identity", "c", "w"), node("Conv", "x w", "y")], {})
    assert facts.layers == [LayerSparsity("y_Conv", 5, 8)]


def test_onnx_pair_with_a_stored_integer_weight(tmp_path):
    nodes = [*INPUT, node("DequantizeLinear", "w sw zw", "wd"), node("Conv", "xd wd", "y")]
    constants = {**INPUT_VALUES, "w": INTEGERS, "sw": np.float32(0.5), "zw": np.int8(3)}
    facts = facts_of(tmp_path, nodes, constants)
    assert facts.layers == [LayerSparsity("y_Conv", zeros=1, weights=8)]  # 3 stands for zero
    assert facts.quantized == 1


def test_onnx_pair_with_a_float_weight_counts_what_rounds_to_zero(tmp_path):
    weight = np.array([0.0, 0.2, 0.3, -0.2, -0.3, 70.0, -70.0, 0.24], np.float32).reshape(2, 4, 1, 1)
    pair = [node("QuantizeLinear", "w sw zw", "wq"), node("DequantizeLinear", "wq sw zw", "wd")]
    constants = {**INPUT_VALUES, "w": weight, "sw": np.float32(0.5), "zw": np.int8(0)}
    facts = facts_of(tmp_path, [*INPUT, *pair, node("Conv", "xd wd", "y")], constants)
    assert facts.layers[0].zeros == 4  # |w| / 0.5 below one half: 0, 0.2, -0.2, 0.24
    assert facts.quantized == 1


def test_onnx_pair_per_channel(tmp_path):
    weight = np.array([[0.0, 0.3, 0.6, 2.0], [0.0, 0.3, 0.6, 2.0]], np.float32).reshape(2, 4, 1, 1)
    pair = [
        node("QuantizeLinear", "w sw zw", "wq", axis=0),
        node("DequantizeLinear", "wq sw zw", "wd", axis=0),
    ]
    scales = {"sw": np.array([1.0, 2.0], np.float32), "zw": np.array([0, 0], np.int8)}
    facts = facts_of(
        tmp_path, [*INPUT, *pair, node("Conv", "xd wd", "y")], {**INPUT_VALUES, **scales, "w": weight}
    )
    assert facts.layers[0].zeros == 2 + 3  # in steps: 0 .3 .6 2 and 0 .15 .3 1


def test_onnx_quantized_weight_alone_does_not_make_an_integer_convolution(tmp_path):
    nodes = [node("DequantizeLinear", "w sw zw", "wd"), node("Conv", "x wd", "y")]
    facts = facts_of(tmp_path, nodes, {"w": INTEGERS, "sw": np.float32(0.5), "zw": np.int8(0)})
    assert facts.layers[0].zeros == 5
    assert (facts.quantized, facts.convolutions) == (0, 1)


@pytest.mark.parametrize(
    ("weight", "zero", "zeros"),
    [
        ((INTEGERS.astype(np.int16) + 128).astype(np.uint8), np.uint8(128), 5),
        (INTEGERS, np.array([0, 127], np.int8), 2 + 1),
    ],
    ids=["uint8 around 128", "zero point per channel"],
)
def test_onnx_integer_convolution(tmp_path, weight, zero, zeros):
    nodes = [
        node("QuantizeLinear", "x sx zx", "xq"),
        node("ConvInteger", "xq w zx zw", "i"),
        node("Cast", "i", "y", to=TensorProto.FLOAT),
    ]
    facts = facts_of(tmp_path, nodes, {**INPUT_VALUES, "w": weight, "zw": zero})
    assert facts.layers == [LayerSparsity("i_ConvInteger", zeros, 8)]
    assert facts.quantized == 1


def test_onnx_integer_convolution_without_zero_points(tmp_path):
    nodes = [
        node("QuantizeLinear", "x sx zx", "xq"),
        node("ConvInteger", "xq w", "i"),
        node("Cast", "i", "y", to=TensorProto.FLOAT),
    ]
    assert facts_of(tmp_path, nodes, {**INPUT_VALUES, "w": INTEGERS}).layers[0].zeros == 5


def test_gzip_size_is_that_of_the_file_gzip_writes_and_repeatable(tmp_path):
    data = np.random.default_rng(0).integers(0, 4, 20_000, dtype=np.uint8).tobytes()
    path = tmp_path / "data"
    path.write_bytes(data)
    size = gzip_bytes(path)
    assert size == gzip_bytes(path)
    assert math.isclose(size, len(gzip.compress(data)), rel_tol=0.02)
    assert size < len(data) / 3  # two bits of eight carry information
    assert list(tmp_path.iterdir()) == [path]


def test_less_sparse_than_planned_is_refused_with_both_numbers():
    layers = [LayerSparsity("a", 60, 100), LayerSparsity("b", 80, 100)]
    require_sparsity(layers, 0.70, "in x.pt")
    require_sparsity(layers, 0.7005, "in x.pt")  # a tenth of a percent is let pass
    with pytest.raises(SparsityError, match=r"sparsity in x\.pt to be at least 75\.00%, but got '70\.00%'"):
        require_sparsity(layers, 0.75, "in x.pt")


def test_work_of_a_rectangle_is_that_of_its_pixels():
    assert stock_macs("n", 3, (64, 96)) == 6 * stock_macs("n", 3, 32)
    assert LayerSparsity("model.0.conv", 0, 10).macs((64, 96)) == 10 * 32 * 48
