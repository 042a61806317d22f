"""The integer reference against the integer graph, which another library made of the same checkpoint."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sparse_exp.engines import create_engine
from sparse_exp.export.exporter import MODEL, QDQ
from sparse_exp.export.verification import predict
from sparse_exp.quantization.quantizers import begin, freeze_quantizers, prepare
from sparse_exp.quantization.reference import IntegerConv, as_deployed
from sparse_exp.quantization.scheme import LayerScheme, TensorScheme
from sparse_exp.sparsity.onnx_graph import layer_name
from sparse_exp.yolov5 import YOLOv5


@pytest.fixture(scope="module")
def reference(lively_model) -> YOLOv5:
    return as_deployed(lively_model)


def run(engine_name, path, images) -> np.ndarray:
    engine = create_engine(engine_name)
    engine.load(path, batch_size=len(images), cores=1)
    try:
        return engine.run(images)[0]
    finally:
        engine.close()


def integer_convolutions(path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Weight, bias and scale of each ConvInteger -> Add -> Cast -> Mul, by the model's name."""
    graph = onnx.load(str(path)).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    found = {}
    for node in graph.node:
        if node.op_type == "ConvInteger":
            add = readers[node.output[0]]
            scaled = readers[readers[add.output[0]].output[0]]
            assert (add.op_type, scaled.op_type) == ("Add", "Mul")
            bias, scale = (arrays[next(n for n in reader.input if n in arrays)] for reader in (add, scaled))
            weight = arrays[node.input[1]].astype(int) - arrays[node.input[3]].astype(int)
            found[layer_name(node.name)] = weight, bias.ravel(), scale
    return found


def test_weights_biases_and_scales_are_the_files(reference, deployment):
    ours = {name: m for name, m in reference.named_modules() if isinstance(m, IntegerConv)}
    theirs = integer_convolutions(deployment / MODEL)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 60
    for name, (weight, bias, scale) in theirs.items():
        np.testing.assert_array_equal(ours[name].weight.numpy(), weight, err_msg=name)
        np.testing.assert_array_equal(ours[name].bias.numpy(), bias, err_msg=name)
        assert float(ours[name].step) == float(scale)


def test_it_does_not_depend_on_the_order_of_sums(reference, digit_images):
    images = torch.from_numpy(digit_images)
    contiguous = predict(reference, images)
    channels_last = predict(copy.deepcopy(reference), images, torch.channels_last)
    for other in (channels_last, torch.cat([predict(reference, images[:1]), predict(reference, images[1:])])):
        np.testing.assert_allclose(other, contiguous, rtol=1e-6, atol=1e-6)  # of the decoding, in float32


@pytest.mark.parametrize("file", [MODEL, QDQ])
def test_both_files_are_nearer_to_it_than_the_checkpoint_as_trained(
    file, reference, lively_model, digit_images, deployment
):
    """One stores biases as integers and the other in floating point; of the checkpoint they are not whole."""
    images = torch.from_numpy(digit_images)
    expected, as_trained = predict(reference, images), predict(lively_model, images)
    deployed = torch.from_numpy(run("onnxruntime", deployment / file, digit_images))
    assert (deployed - expected).abs().mean() < 0.7 * (as_trained - expected).abs().mean()


def quantized(conv: nn.Conv2d, *, per_channel: bool = False, scale: float = 1.0) -> nn.Conv2d:
    """The convolution, quantized, with input steps of one size and ranges frozen."""
    scheme = LayerScheme(TensorScheme(), TensorScheme(symmetric=True, per_channel=per_channel))
    layer = begin(prepare(nn.Sequential(conv), {"0": scheme}))
    layer(torch.ones(1, conv.in_channels, 4, 4))
    conv.input_quantizer.set_range(0.0, 255.0 * scale)
    freeze_quantizers(layer).eval()
    return conv


def test_sums_that_float32_cannot_hold_are_float64():
    conv = nn.Conv2d(4096, 1, 3)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.weight[0, 0, 0, 0] = 0.999
    integer = IntegerConv(quantized(conv))
    assert integer.weight.dtype == torch.float64
    steps = torch.randint(0, 256, (1, 4096, 3, 3), generator=torch.Generator().manual_seed(0))
    exact = (steps.long() * integer.weight.long()).sum() + integer.bias.long()
    assert float(integer(steps.float())) == float((exact.float() * integer.step).item())


def test_scales_of_each_channel():
    """A weight may have a scale for each output channel; the integers are then those of the channel."""
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, -0.5], [0.1, 0.05], [8.0, 2.0]]).reshape(3, 2, 1, 1))
    quantized(conv, per_channel=True, scale=0.5)
    scale = conv.weight_quantizer.scale
    assert scale.tolist() == pytest.approx([1 / 127.5, 0.1 / 127.5, 8 / 127.5])
    x = torch.randint(0, 100, (1, 2, 4, 4)).float() * 0.5
    difference = (IntegerConv(conv)(x) - conv(x)).abs().amax((0, 2, 3))
    assert (difference <= 0.5 * 0.5 * scale + 1e-4).all()  # of the bias


def test_the_model_itself_is_left_as_it_is(lively_model, reference):
    assert not any(isinstance(module, IntegerConv) for module in lively_model.modules())
    floating = YOLOv5("n", 1).eval()
    assert as_deployed(floating) is floating
