"""Every exported file computes in every engine what the checkpoint computes in torch.

Tolerances. In floating point only the order of sums differs: 1e-3 px and 1e-5 in scores. A quantized
network rounds every activation to 8 bits: where a sum lands near a tie, the least difference decides
to which side, and the steps add up over 60 layers. The integer graph also rounds biases to int32.
So single predictions may differ by a lot, in torch against itself too when the memory layout changes,
and means are compared: measured here at most 0.40 px and 0.005 in scores, which spread by 0.023 from image to
image, while a lost scale gives many times that. With biases in floating point it was 0.06 px and 0.0008.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from graphs import model_of, node
from onnx import TensorProto

from sparse_exp.config.schema import ENGINES
from sparse_exp.engines import create_engine
from sparse_exp.export import pairs
from sparse_exp.export.onnx import FileForm, export_integer, trace_quantized
from sparse_exp.runs.deployment import DENSE, MODEL, ONNXRUNTIME, QDQ
from sparse_exp.yolov5 import YOLOv5

IMGSZ, CLASSES, BATCH = 64, 10, 4
RUNTIMES = [name for name in ENGINES if name != "torch"]  # of exported files
# The first three are what is deployed; the others are right too, if slow.
QUANTIZED = [
    ("deepsparse", MODEL),
    ("onnxruntime", ONNXRUNTIME),
    ("openvino", QDQ),
    ("onnxruntime", QDQ),
    ("onnxruntime", MODEL),
    ("openvino", ONNXRUNTIME),
]


def run(engine_name: str, path, images: np.ndarray) -> np.ndarray:
    engine = create_engine(engine_name)
    engine.load(path, batch_size=BATCH, cores=1)
    try:
        return engine.run(images)[0]
    finally:
        engine.close()


@torch.no_grad()
def torch_predictions(model: YOLOv5, images: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(images).float() / 255)[0].numpy()


def mean_differences(predictions: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Of boxes, in pixels, and of scores."""
    difference = np.abs(predictions - reference)
    return float(difference[..., :4].mean()), float(difference[..., 4:].mean())


@pytest.fixture(scope="module")
def images(digit_images) -> np.ndarray:
    """Dark, grey and noisy ones, so that predictions differ from image to image."""
    noise = np.random.default_rng(0).integers(0, 256, digit_images[:1].shape, dtype=np.uint8)
    return np.concatenate([digit_images[:3], 200 - digit_images[3:5] // 2, noise // 2])


@pytest.fixture(scope="module")
def reference(lively_model, images) -> np.ndarray:
    return torch_predictions(lively_model, images)


def test_the_reference_depends_on_the_image_and_tells_anchors_apart(reference):
    """Else agreement with it would mean nothing."""
    assert reference[..., 4:].std(axis=0).mean() > 0.02
    assert reference[..., 4].std(axis=1).min() > 0.05


@pytest.mark.parametrize(("engine", "name"), QUANTIZED)
def test_quantized_files_agree_with_the_checkpoint(engine, name, deployment, reference, images):
    boxes, scores = mean_differences(run(engine, deployment / name, images), reference)
    assert boxes < 1.0
    assert scores < 0.012


@pytest.mark.slow
def test_but_for_the_rounding_of_biases_the_integer_graph_is_the_network(
    lively_model, reference, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(pairs, "_BIAS_LIMIT", 0.0)  # all biases stay in floating point
    integer = tmp_path / MODEL
    before = {name: value.clone() for name, value in lively_model.state_dict().items()}
    export_integer(trace_quantized(lively_model, FileForm(IMGSZ, opset=13)), integer)
    assert all(torch.equal(value, before[name]) for name, value in lively_model.state_dict().items())
    np.testing.assert_array_equal(torch_predictions(lively_model, images), reference)
    for engine in ("deepsparse", "onnxruntime"):
        boxes, scores = mean_differences(run(engine, integer, images), reference)
        assert boxes < 0.15
        assert scores < 0.002


@pytest.mark.parametrize("engine", RUNTIMES)
def test_the_dense_file_agrees_with_its_initial_weights(engine, deployment, images):
    torch.manual_seed(0)
    reference = torch_predictions(YOLOv5("n", CLASSES), images)
    predictions = run(engine, deployment / DENSE, images)
    np.testing.assert_allclose(predictions[..., :4], reference[..., :4], atol=1e-3)
    np.testing.assert_allclose(predictions[..., 4:], reference[..., 4:], atol=1e-5)


SIDE = 16


def quantized_concatenation(path) -> None:
    """Images -> two maps -> concatenation, quantized in int8 -> 1x1 convolution that changes nothing.

    Tidied, as all graphs are, which makes activations uint8.
    """

    nodes = [
        node("Cast", "images", "x", to=TensorProto.FLOAT),
        node("Mul", "x step", "a"),
        node("Sub", "a half", "b"),
        node("Concat", "a b", "c", axis=1),
        node("QuantizeLinear", "c step zero", "cq"),
        node("DequantizeLinear", "cq step zero", "cd"),
        node("QuantizeLinear", "w ws wz", "wq"),
        node("DequantizeLinear", "wq ws wz", "wd"),
        node("Conv", "cd wd", "maps"),
        node("Reshape", "maps shape", "y"),
    ]
    values = {
        "step": np.float32(0.05),
        "half": np.float32(0.5),
        "zero": np.int8(-118),
        "w": np.eye(6, dtype=np.float32).reshape(6, 6, 1, 1),
        "ws": np.float32(1 / 127),
        "shape": np.array([0, 6, SIDE * SIDE]),
        "wz": np.int8(0),
    }
    sizes = ["n", 3, SIDE, SIDE]
    model = model_of(nodes, values, [("images", TensorProto.UINT8, sizes)], [("y", ["n", 6, SIDE * SIDE])])
    pairs.tidy(model.graph)
    onnx.save(model, str(path))


@pytest.mark.parametrize("engine", [name for name in RUNTIMES if name != "mnn"])  # which runs none
def test_a_quantized_concatenation_keeps_its_scale_once_it_is_unsigned(engine, tmp_path):
    """What OpenVINO 2026.4 gets wrong with int8 activations, in the smallest graph that shows it."""
    quantized_concatenation(tmp_path / "m.onnx")
    images = (np.arange(BATCH * 3 * SIDE * SIDE) % 230).astype(np.uint8).reshape(BATCH, 3, SIDE, SIDE)
    maps = images * 0.05
    wanted = np.concatenate([maps, maps - 0.5], axis=1).reshape(BATCH, 6, -1)
    np.testing.assert_allclose(run(engine, tmp_path / "m.onnx", images), wanted, atol=1e-4)
