from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from sparse_exp.engines import create_engine
from sparse_exp.engines.signature import read_signature
from sparse_exp.errors import EngineError
from sparse_exp.export import onnx as exporting
from sparse_exp.export.onnx import (
    FileForm,
    export_float,
    export_integer,
    export_onnxruntime,
    export_qdq,
    trace_quantized,
)
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.deployment import DENSE, MODEL, ONNXRUNTIME, QDQ
from sparse_exp.sparsity.measure import layer_sparsity, onnx_facts, overall
from sparse_exp.sparsity.onnx_graph import constants, layer_name
from sparse_exp.yolov5 import YOLOv5

IMGSZ = 64
FORM = FileForm(IMGSZ, opset=13)
QUANTIZED = (MODEL, QDQ, ONNXRUNTIME)
FILES = (*QUANTIZED, DENSE)
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
    batch, *sizes = predictions.type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [size.dim_value for size in sizes] == [3 * (8 * 8 + 4 * 4 + 2 * 2), 15]


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_convolution_is_quantized(deployment, model, name):
    facts = onnx_facts(deployment / name)
    assert facts.quantized == facts.convolutions == len(model.quantizable_convolutions()) == 60


def test_the_dense_file_is_floating_point_and_not_sparse(deployment):
    facts = onnx_facts(deployment / DENSE)
    assert (facts.quantized, facts.convolutions) == (0, 60)
    assert overall(facts.layers) < 1e-4


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_layer_is_as_sparse_as_its_weights_rounded_to_8_bits(deployment, model, name):
    exported = {layer_name(layer.name): layer for layer in onnx_facts(deployment / name).layers}
    convs = model.quantizable_convolutions()
    assert exported.keys() == convs.keys()
    for conv_name, conv in convs.items():
        weight = conv.weight.detach().numpy()
        # What is rounded is the weight with its batch norm folded in.
        norm = conv.norm[0] if conv.norm else None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt() if norm else torch.ones(len(weight))
        steps = weight * factor.detach().numpy().reshape(-1, 1, 1, 1) / conv.weight_quantizer.scale.item()
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
    export_float(model, tmp_path / "float.onnx", FORM)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_float_export_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def write_half(_model, _sample, path, **_options):
        Path(path).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch.onnx, "export", write_half)
    with pytest.raises(RuntimeError, match="disk full"):
        export_float(YOLOv5("n", 1), tmp_path / "out" / "dense.onnx", FORM)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def traced(lively_model) -> onnx.ModelProto:
    return trace_quantized(lively_model, FORM)


@pytest.mark.parametrize("failing", ["keep_inputs", "to_integer_graph", "quantize_outputs"])
def test_a_quantized_export_that_fails_leaves_no_file(tmp_path, traced, digit_images, monkeypatch, failing):
    def fail(*_arguments):
        raise RuntimeError("no such graph")

    monkeypatch.setattr(exporting, failing, fail)
    needs_images = partial(export_onnxruntime, images=[digit_images])
    export = needs_images if failing == "quantize_outputs" else export_integer
    with pytest.raises(RuntimeError, match="no such graph"):
        export(traced, tmp_path / MODEL)
    assert list(tmp_path.iterdir()) == []


def test_no_file_changes_the_graph_that_all_are_made_of(tmp_path, traced, digit_images):
    before = traced.SerializeToString(deterministic=True)
    export_qdq(traced, tmp_path / QDQ)
    export_integer(traced, tmp_path / MODEL)
    export_onnxruntime(traced, tmp_path / ONNXRUNTIME, [digit_images])
    assert traced.SerializeToString(deterministic=True) == before


def test_the_file_format_is_one_that_deepsparses_onnx_reads(deployment):
    models = [onnx.load(str(deployment / name)) for name in FILES]
    assert {(model.ir_version, model.opset_import[0].version) for model in models} == {(8, 13)}


@pytest.mark.parametrize("opset", [13, 15])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_weights_of_seven_bits_are_exported_as_they_are_computed_with(
    tmp_path, strategy, opset, digit_images
):
    """For CPUs without 8-bit dot products, whose kernels overflow where both factors have 8 bits."""
    torch.manual_seed(0)
    model = YOLOv5("n", 2).eval()
    recipe = SEVEN_BITS.format(strategy=strategy)
    Recipe(recipe).apply_at_once(model, [torch.from_numpy(digit_images).float() / 255])
    traced = trace_quantized(model, FileForm(IMGSZ, opset))
    export_qdq(traced, tmp_path / QDQ)
    export_integer(traced, tmp_path / MODEL)
    arrays = constants(onnx.load(str(tmp_path / QDQ)).graph)
    weights = [value for value in arrays.values() if value.dtype == np.int8 and value.ndim == 4]
    assert len(weights) == 60
    assert (min(w.min() for w in weights), max(w.max() for w in weights)) == (-64, 63)
    graph = onnx.load(str(tmp_path / MODEL)).graph
    assert [node.op_type for node in graph.node].count("ConvInteger") == 60


SEVEN_BITS = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
  - !QuantizationModifier
    start_epoch: 0.0
    scheme:
      input_activations: {{num_bits: 8, symmetric: False}}
      weights: {{num_bits: 7, symmetric: True, strategy: {strategy}}}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


RECTANGLE = (64, 96)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_rectangle_in_engines_is_that_in_torch(tmp_path, engine):
    torch.manual_seed(0)
    model, file = YOLOv5("n", 10), tmp_path / "model.onnx"
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    export_float(model, file, FileForm(RECTANGLE, opset=13))
    assert read_signature(file).size == RECTANGLE
    graph = onnx.load(str(file)).graph
    assert {node.op_type for node in graph.node}.isdisjoint(DATA_DEPENDENT)
    predictions = 3 * (8 * 12 + 4 * 6 + 2 * 3)
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim[1:]] == [predictions, 15]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, *RECTANGLE), np.uint8)
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(images).float() / 255)[0].numpy()
    with closing(create_engine(engine)) as running:
        running.load(file, batch_size=2, cores=1)
        np.testing.assert_allclose(running.run(images)[0], wanted, rtol=1e-3, atol=2e-3)
        with pytest.raises(EngineError, match="64 px high and 96 px wide"):
            running.run(images.transpose(0, 1, 3, 2))
