"""The integer reference against the integer graph, which another library made of the same checkpoint."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sparse_exp.engines import create_engine
from sparse_exp.export.deployment import MODEL
from sparse_exp.export.reference import IntegerConv, as_deployed
from sparse_exp.export.verification import layer_name, predict
from sparse_exp.yolov5 import YOLOv5


@pytest.fixture(scope="module")
def reference(lively_model) -> YOLOv5:
    return as_deployed(lively_model)


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
    ties, biases = 0, 0
    for name, (weight, bias, scale) in theirs.items():
        np.testing.assert_array_equal(ours[name].weight.numpy(), weight, err_msg=name)
        off = np.abs(ours[name].bias.numpy() - bias)
        assert off.max() <= 1, name
        ties, biases = ties + int(off.sum()), biases + bias.size
        assert float(ours[name].step) == float(scale)
    assert ties <= 1e-3 * biases  # a batch norm is folded in float32, in another order


def test_it_does_not_depend_on_the_order_of_sums(reference, digit_images):
    images = torch.from_numpy(digit_images)
    contiguous = predict(reference, images)
    channels_last = predict(copy.deepcopy(reference), images, torch.channels_last)
    for other in (channels_last, torch.cat([predict(reference, images[:1]), predict(reference, images[1:])])):
        np.testing.assert_allclose(other, contiguous, rtol=1e-6, atol=1e-6)  # of the decoding, in float32


def test_it_is_nearer_to_the_integer_graph_than_fake_quantization(
    reference, lively_model, digit_images, deployment
):
    images = torch.from_numpy(digit_images)
    engine = create_engine("onnxruntime")
    engine.load(deployment / MODEL, batch_size=6, cores=1)
    deployed = torch.from_numpy(engine.run(digit_images)[0])
    ours, theirs = ((predict(m, images) - deployed).abs().mean() for m in (reference, lively_model))
    assert ours < 0.7 * theirs


def test_sums_that_float32_cannot_hold_are_float64():
    conv = torch.ao.nn.qat.Conv2d(4096, 1, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.weight[0, 0, 0, 0] = 0.999
    conv(torch.ones(1, 4096, 3, 3))
    quantizer = torch.ao.quantization.FakeQuantize()
    integer = IntegerConv(quantizer, conv.eval())
    assert integer.weight.dtype == torch.float64
    steps = torch.randint(0, 256, (1, 4096, 3, 3), generator=torch.Generator().manual_seed(0))
    exact = (steps.long() * integer.weight.long()).sum() + integer.bias.long()
    assert float(integer(steps.float())) == float((exact.float() * integer.step).item())


def test_the_model_itself_is_left_as_it_is(lively_model, reference):
    assert not any(isinstance(module, IntegerConv) for module in lively_model.modules())
    floating = YOLOv5("n", 1).eval()
    assert as_deployed(floating) is floating
