from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparse_exp.engines import create_engine
from sparse_exp.export import onnx as exporting
from sparse_exp.export import quantized
from sparse_exp.export.exporter import DENSE, MODEL, QDQ
from sparse_exp.export.onnx import export_float, export_quantized
from sparse_exp.export.quantized import keep_large_biases, store_integers, unsign_activations
from sparse_exp.sparsity.measure import layer_sparsity, onnx_facts, overall
from sparse_exp.sparsity.onnx_graph import layer_name
from sparse_exp.yolov5 import YOLOv5

IMGSZ = 64
FILES = (MODEL, QDQ, DENSE)
# What a graph needs only when it computes shapes from data, which keeps engines from planning memory.
DATA_DEPENDENT = {
    "Shape",
    "Size",
    "NonZero",
    "Range",
    "If",
    "Loop",
    "Scan",
    "Where",
    "ConstantOfShape",
    "Expand",
}


@pytest.fixture(scope="module")
def model(lively_model) -> YOLOv5:
    return lively_model


@pytest.mark.parametrize("name", FILES)
def test_files_are_valid_onnx_with_static_shapes_and_a_free_batch(deployment, name):
    path = deployment / name
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path)).graph
    assert {node.op_type for node in graph.node}.isdisjoint(DATA_DEPENDENT)
    (image,), (predictions,) = graph.input, graph.output
    assert (image.name, predictions.name) == ("images", "predictions")
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    assert predictions.type.tensor_type.elem_type == TensorProto.FLOAT
    batch, *sizes = image.type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [size.dim_value for size in sizes] == [3, IMGSZ, IMGSZ]
    assert predictions.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name", [MODEL, QDQ])
def test_every_convolution_is_quantized(deployment, model, name):
    facts = onnx_facts(deployment / name)
    assert facts.quantized == facts.convolutions == len(model.quantizable_convolutions()) == 60


def test_the_dense_file_is_floating_point_and_not_sparse(deployment):
    facts = onnx_facts(deployment / DENSE)
    assert (facts.quantized, facts.convolutions) == (0, 60)
    assert overall(facts.layers) < 1e-4


@pytest.mark.parametrize("name", [MODEL, QDQ])
def test_each_layer_is_as_sparse_as_its_weights_rounded_to_8_bits(deployment, model, name):
    exported = {layer_name(layer.name): layer for layer in onnx_facts(deployment / name).layers}
    convs = model.quantizable_convolutions()
    assert exported.keys() == convs.keys()
    for conv_name, conv in convs.items():
        weight = conv.weight.detach().numpy()
        # What is rounded is the weight with its batch norm folded in.
        norm = getattr(conv, "bn", None)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt() if norm else torch.ones(len(weight))
        steps = weight * factor.detach().numpy().reshape(-1, 1, 1, 1) / conv.weight_fake_quant.scale.item()
        assert exported[conv_name].weights == weight.size
        ties = abs(np.abs(steps) - 0.5) < 1e-4
        assert abs(exported[conv_name].zeros - (np.rint(steps) == 0).sum()) <= ties.sum()
        assert exported[conv_name].zeros >= (weight == 0).sum()
    prunable = [exported[name] for name in model.prunable_convolutions()]
    assert overall(prunable) >= overall(layer_sparsity(model.prunable_convolutions())) >= 0.75


def test_the_temporary_files_are_gone(deployment):
    assert {path.name for path in deployment.iterdir()} == set(FILES)


def test_exporting_a_training_model_leaves_it_in_training(tmp_path):
    model = YOLOv5("n", 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_float(model, tmp_path / "float.onnx", imgsz=IMGSZ, opset=13)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_float_export_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def write_half(_model, _sample, path, **_options):
        Path(path).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch.onnx, "export", write_half)
    with pytest.raises(RuntimeError, match="disk full"):
        export_float(YOLOv5("n", 1), tmp_path / "out" / "dense.onnx", imgsz=IMGSZ, opset=13)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failing", ["unsign_activations", "store_integers", "to_integer_graph"])
def test_a_quantized_export_that_fails_leaves_no_file(tmp_path, monkeypatch, failing):
    def fail(*_arguments):
        raise RuntimeError("no such graph")

    monkeypatch.setattr(exporting, "_write", lambda _model, _sample, path, _opset: path.write_bytes(b"graph"))
    for name in ("unsign_activations", "store_integers"):
        monkeypatch.setattr(quantized, name, lambda _path: None)
    monkeypatch.setattr(quantized, failing, fail)
    with pytest.raises(RuntimeError, match="no such graph"):
        export_quantized(YOLOv5("n", 1), tmp_path / MODEL, tmp_path / QDQ, imgsz=IMGSZ, opset=13)
    assert list(tmp_path.iterdir()) == []


def node(kind: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"{output}_{kind}", **attributes)


def pair_graph(bias: float, scale: float) -> onnx.ModelProto:
    """A 1x1 convolution of int8 activations and int8 weights, quantized again; shaped as predictions."""
    nodes = [
        node("QuantizeLinear", "x sx zx", "xq"),
        node("DequantizeLinear", "xq sx zx", "xd"),
        node("QuantizeLinear", "w sw zw", "wq"),
        node("DequantizeLinear", "wq sw zw", "wd"),
        node("Conv", "xd wd b", "c"),
        node("QuantizeLinear", "c sc zx", "cq"),
        node("DequantizeLinear", "cq sc zx", "yd"),
        node("Reshape", "yd shape", "y"),
    ]
    values = {
        "sx": np.float32(scale),
        "zx": np.int8(-118),
        "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3, 1, 1),
        "sw": np.float32(1 / 127),
        "zw": np.int8(0),
        "b": np.array([bias, 0.0, -bias, 0.1], np.float32),
        "sc": np.float32(0.05),
        "shape": np.array([0, 4, 64]),
    }
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 64])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As written: optimized, ONNX Runtime itself rounds biases to int32 where it fuses a convolution.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": images})[0]


def test_unsigned_activations_compute_the_same_and_weights_stay_signed(tmp_path):
    model = pair_graph(bias=0.5, scale=0.01)
    onnx.save(model, str(tmp_path / "m.onnx"))
    unsign_activations(tmp_path / "m.onnx")
    changed = onnx.load(str(tmp_path / "m.onnx"))
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(changed, images), run(model, images))
    constants = {item.name: numpy_helper.to_array(item) for item in changed.graph.initializer}
    zeros = {n.name: constants[n.input[2]] for n in changed.graph.node if n.op_type.endswith("Linear")}
    for name, zero in zeros.items():
        signed = name.startswith("w")
        assert (zero.dtype, int(zero)) == ((np.int8, 0) if signed else (np.uint8, 10)), name


def test_unsigned_activations_twice_is_once(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(pair_graph(bias=0.5, scale=0.01), str(path))
    unsign_activations(path)
    once = path.read_bytes()
    unsign_activations(path)
    assert path.read_bytes() == once


@pytest.mark.parametrize("scale", [1 / 127, [1 / 127, 0.004, 0.02, 1.0]], ids=["per tensor", "per channel"])
def test_weights_stored_as_integers_compute_the_same(tmp_path, scale):
    model = pair_graph(bias=0.5, scale=0.01)
    constants = {item.name: item for item in model.graph.initializer}
    constants["sw"].CopyFrom(numpy_helper.from_array(np.array(scale, np.float32), "sw"))
    constants["zw"].CopyFrom(numpy_helper.from_array(np.zeros(np.shape(scale), np.int8), "zw"))
    for linear in [n for n in model.graph.node if n.name.startswith("w")]:
        linear.attribute.append(helper.make_attribute("axis", 0))
    onnx.save(model, str(tmp_path / "m.onnx"))
    store_integers(tmp_path / "m.onnx")
    changed = onnx.load(str(tmp_path / "m.onnx"))
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(changed, images), run(model, images))
    stored = {item.name: numpy_helper.to_array(item) for item in changed.graph.initializer}
    rounded = numpy_helper.to_array(constants["w"]) / np.reshape(scale, (-1, 1, 1, 1)).astype(np.float32)
    np.testing.assert_array_equal(stored["wq"], rounded.round().clip(-128, 127))
    assert (stored["wq"].dtype, "w" in stored) == (np.int8, False)


def test_only_biases_beyond_32_bits_are_split_off():
    small, large = pair_graph(bias=0.5, scale=0.01), pair_graph(bias=5.0, scale=1e-8)
    images = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    wanted = run(large, images)
    assert [n.op_type for n in keep_large_biases(small).graph.node].count("Add") == 0
    changed = keep_large_biases(large)
    conv = next(n for n in changed.graph.node if n.op_type == "Conv")
    assert len(conv.input) == 2
    assert [n.op_type for n in changed.graph.node].count("Add") == 1
    np.testing.assert_array_equal(run(changed, images), wanted)


@pytest.mark.parametrize("engine", ["deepsparse", "onnxruntime"])
def test_the_integer_graph_of_a_hardly_active_layer_keeps_its_bias(tmp_path, engine):
    model = pair_graph(bias=5.0, scale=1e-8)
    images = np.full((1, 3, 8, 8), 0.5e-6, np.float32)
    wanted = run(model, images)
    onnx.save(model, str(tmp_path / "m.onnx"))
    quantized.to_integer_graph(tmp_path / "m.onnx", tmp_path / "m.onnx")
    integer = onnx.load(str(tmp_path / "m.onnx"))
    assert [n.op_type for n in integer.graph.node].count("ConvInteger") == 1
    stored = np.clip(np.rint(images / np.float32(1e-8)) + 10, 0, 255).astype(np.uint8)
    runtime = create_engine(engine)
    runtime.load(tmp_path / "m.onnx", batch_size=1, cores=1)
    # Within one step of the output. In int32 the bias would wrap around and turn its sign.
    np.testing.assert_allclose(runtime.run(stored)[0], wanted, atol=0.051)
    runtime.close()
    assert np.abs(wanted[:, 0]).min() > 1
