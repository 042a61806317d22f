import io
import math

import pytest
import torch
from torch import nn

from sparse_exp.errors import ConfigError
from sparse_exp.metrics.anchors import PUBLISHED
from sparse_exp.yolov5.model import STRIDES, Add, Detect, YOLOv5, make_grid

# published in the release notes and model summaries of v6.0, at 80 classes
PARAMETERS = {"n": 1_872_157, "s": 7_235_389, "m": 21_190_557, "l": 46_563_709, "x": 86_749_405}
# bottlenecks of the C3 blocks that have 3, 6 and 9 of them in the full-size description
REPEATS = {"n": (1, 2, 3), "s": (1, 2, 3), "m": (2, 4, 6), "l": (3, 6, 9), "x": (4, 8, 12)}
WIDTHS = {"n": 16, "s": 32, "m": 48, "l": 64, "x": 80}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def on_meta(size: str, num_classes: int) -> YOLOv5:
    with torch.device("meta"):
        return YOLOv5(size, num_classes)


def conv_names(prefix: str) -> set[str]:
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{prefix}.conv.weight", *(f"{prefix}.bn.{s}" for s in statistics)}


def published_names(size: str) -> set[str]:
    few, more, most = REPEATS[size]
    names = {"model.24.anchors", *(f"model.24.m.{i}.{k}" for i in range(3) for k in ("weight", "bias"))}
    for i in (0, 1, 3, 5, 7, 10, 14, 18, 21):
        names |= conv_names(f"model.{i}")
    for i in (1, 2):
        names |= conv_names(f"model.9.cv{i}")
    blocks = {2: few, 4: more, 6: most, 8: few, 13: few, 17: few, 20: few, 23: few}
    for i, repeats in blocks.items():
        for part in ("cv1", "cv2", "cv3", *(f"m.{k}.cv{c}" for k in range(repeats) for c in (1, 2))):
            names |= conv_names(f"model.{i}.{part}")
    return names


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_and_names_are_the_published_ones(size):
    model = on_meta(size, 80)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert set(model.state_dict()) == published_names(size)
    assert model.state_dict()["model.0.conv.weight"].shape == (WIDTHS[size], 3, 6, 6)
    assert model.state_dict()["model.24.m.2.weight"].shape == (255, 16 * WIDTHS[size], 1, 1)


def test_batch_norm_and_activations():
    model = on_meta("n", 1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in norms} == {(1e-3, 0.03)}
    activations = [m for m in model.modules() if isinstance(m, nn.SiLU)]  # modules() drops shared ones
    assert len(activations) == len(norms) == 57


def test_prunable_and_quantizable_convolutions_of_s():
    model = on_meta("s", 80)
    assert len(model.quantizable_convolutions()) == 60
    prunable = model.prunable_convolutions()
    missing = set(model.quantizable_convolutions()) - set(prunable)
    assert missing == {"model.0.conv", "model.24.m.0", "model.24.m.1", "model.24.m.2"}


def test_convolutions_keep_their_names_when_wrapped():
    model = YOLOv5("n", 1)
    names = set(model.prunable_convolutions())
    for layer in model.modules():
        if hasattr(layer, "conv"):
            layer.conv = torch.ao.quantization.QuantWrapper(layer.conv)
    assert set(model.prunable_convolutions()) == names
    assert len(model.quantizable_convolutions()) == len(names) + 4


def test_residual_adds_are_modules_that_sparseml_wraps():
    model = on_meta("s", 80)
    adds = [m for m in model.modules() if isinstance(m, Add)]
    assert len(adds) == 1 + 2 + 3 + 1  # the backbone's bottlenecks; those of the neck are not residual
    assert all(a.wrap_qat and a.qat_wrapper_kwargs == {"num_inputs": 2, "num_outputs": 0} for a in adds)
    assert not any(a.state_dict() for a in adds)
    assert Add()(torch.tensor(2.0), torch.tensor(3.0)) == 5
    backbone_block, neck_block = model.model[4].m[0], model.model[17].m[0]
    assert backbone_block.shortcut
    assert not neck_block.shortcut


def test_outputs_in_training_and_evaluation():
    model = YOLOv5("n", 3)
    x = torch.rand(2, 3, 64, 96)
    raw = model(x)
    assert [tuple(r.shape) for r in raw] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    predictions, raw = model.eval()(x)
    assert predictions.shape == (2, 3 * (96 + 24 + 6), 8)
    objectness = torch.cat([r[..., 4].flatten(1) for r in raw], 1).sigmoid()
    # To a unit in the last place: other instructions compute the sigmoid of a tensor laid out otherwise.
    torch.testing.assert_close(predictions[..., 4], objectness, rtol=2.4e-7, atol=0)


def test_evaluation_has_25200_predictions_at_640_px():
    sizes = [(640 // s, 640 // s) for s in STRIDES]
    assert make_grid(torch.ones(3, 3, 2), sizes).scale.shape == (25200, 2)


def test_raw_maps_are_ordered_by_anchor_row_column_value():
    head = Detect(2, (1, 1, 1))
    with torch.no_grad():
        for conv in head.m:
            conv.weight.fill_(1.0)
            conv.bias.copy_(torch.arange(21) * 1000.0)
    maps = [torch.arange(float(ny * nx)).view(1, 1, ny, nx) for ny, nx in ((2, 3), (1, 2), (1, 1))]
    raw = head.train()(maps)
    # pixel (1, 2) holds 1 * 3 + 2 = 5; channel of anchor 2, value 4 of 7: 2 * 7 + 4 = 18
    assert raw[0][0, 2, 1, 2, 4] == 18005
    assert raw[0].is_contiguous()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_decoding_of_constructed_maps():
    head = Detect(1, (1, 1, 1)).eval()
    values = [logit(0.75), logit(0.5), logit(0.5), logit(0.25), logit(0.9), logit(0.2)]
    with torch.no_grad():
        for conv in head.m:
            conv.weight.zero_()
            conv.bias.copy_(torch.tensor(values * 3))
    predictions, _ = head([torch.zeros(1, 1, s, s) for s in (8, 4, 2)])
    # level 1 (stride 16) starts after 3 * 8 * 8; anchor 2 (59 x 119 px), row 3, column 1
    got = predictions[0, 3 * 64 + 2 * 16 + 3 * 4 + 1]
    # x = (2 * 0.75 - 0.5 + 1) * 16, y = (2 * 0.5 - 0.5 + 3) * 16
    # w = (2 * 0.5)^2 * 59, h = (2 * 0.25)^2 * 119
    torch.testing.assert_close(got, torch.tensor([32, 56, 59, 29.75, 0.9, 0.2]))
    # the last: level 2 (stride 32), anchor 2 (373 x 326 px), row 1, column 1
    torch.testing.assert_close(predictions[0, -1, :4], torch.tensor([64, 48, 373, 81.5]))


def test_anchors_are_in_units_of_the_stride():
    anchors = on_meta("n", 1).anchors
    assert anchors.shape == (3, 3, 2)
    pixels = YOLOv5("n", 1).anchors * torch.tensor(STRIDES).view(3, 1, 1)
    torch.testing.assert_close(pixels, torch.tensor(PUBLISHED, dtype=torch.float32))


def test_initial_biases_expect_few_objects():
    head = Detect(80, (4096, 4096, 4096))  # so many inputs that the random part of the biases is small
    for conv, stride in zip(head.m, STRIDES, strict=True):
        bias = conv.bias.detach().view(3, 85)
        assert bias[:, 4].mean() == pytest.approx(math.log(8 / (640 / stride) ** 2), abs=0.02)
        assert bias[:, 5:].mean() == pytest.approx(math.log(0.6 / (80 - 0.99999)), abs=0.02)
        assert bias[:, :4].mean() == pytest.approx(0, abs=0.02)


def test_bfloat16_and_channels_last_decode_in_float32():
    model = YOLOv5("n", 2).eval().to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        reference, _ = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            predictions, raw = model(x)
    assert raw[0].dtype == torch.bfloat16
    assert predictions.dtype == torch.float32
    torch.testing.assert_close(predictions[..., :2], reference[..., :2], atol=1.0, rtol=0)


def test_export_mode_gives_a_graph_without_shape_arithmetic_and_is_left_behind():
    import onnx
    import onnxruntime

    model = YOLOv5("n", 2)
    x = torch.rand(2, 3, 64, 64)
    file = io.BytesIO()
    with model.export_mode(64):
        axes = {"images": {0: "batch"}, "output": {0: "batch"}}
        names = {"input_names": ["images"], "output_names": ["output"], "dynamic_axes": axes}
        torch.onnx.export(model, (x,), file, opset_version=13, dynamo=False, **names)
    assert model.training
    operators = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert not operators & {"Shape", "Gather", "Range", "NonZero", "ConstantOfShape", "Cast", "If", "Loop"}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    model.eval()
    for batch in (1, 3):
        x = torch.rand(batch, 3, 64, 64)
        exported = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(exported, model(x)[0].detach(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("imgsz", [0, 100, -32])
def test_export_mode_refuses_sizes_that_do_not_fit(imgsz):
    with pytest.raises(ConfigError, match="multiple of 32"), YOLOv5("n", 1).export_mode(imgsz):
        pass


def test_unknown_size_and_no_classes_are_refused():
    with pytest.raises(ConfigError, match="one of n, s, m, l, x, but got 'q'"):
        YOLOv5("q", 1)
    with pytest.raises(ConfigError, match="at least 1, but got 0"):
        YOLOv5("n", 0)
