"""The accelerated QAT modules against torch's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.ao.nn.intrinsic.qat import ConvBn2d, freeze_bn_stats, update_bn_stats
from torch.ao.quantization import (
    FakeQuantize,
    FakeQuantizeBase,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    disable_fake_quant,
    disable_observer,
    enable_observer,
)

from sparse_exp.export.onnx import _write
from sparse_exp.quantization.fast_qat import accelerate
from sparse_exp.recipes.recipe import Recipe, freeze_quantizers
from sparse_exp.yolov5 import YOLOv5

QUANTIZE = """modifiers:
  - !QuantizationModifier
    start_epoch: 0.0
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""
SYMMETRIC, AFFINE = torch.per_tensor_symmetric, torch.per_tensor_affine


def quantizer(qscheme=AFFINE, observer=MovingAverageMinMaxObserver) -> FakeQuantize:
    return FakeQuantize(observer, dtype=torch.qint8, quant_min=-128, quant_max=127, qscheme=qscheme)


def pair(module):
    """The module as torch computes it, and an accelerated copy."""
    fast = copy.deepcopy(module)
    accelerate(fast)
    return module, fast


def gradients(module, x, weights=None):
    """Output for ``x``, then the gradients of its weighted sum: that of ``x`` first."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) if weights is None else weights
    (y * weights).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in module.parameters())


def assert_same_state(ours, reference, rtol=0.0, atol=0.0):
    state, expected = ours.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        torch.testing.assert_close(
            value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("qscheme", [AFFINE, SYMMETRIC])
def test_values_gradients_and_ranges_are_those_of_torch_bit_for_bit(qscheme, memory_format):
    stock, fast = pair(quantizer(qscheme))
    random = torch.Generator().manual_seed(0)
    for step in range(6):  # the range follows slowly: later steps clamp on both sides
        x = (1 + step) * torch.randn(3, 5, 8, 6, generator=random).to(memory_format=memory_format) + step / 2
        expected, ours = gradients(stock, x), gradients(fast, x)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
        assert ours[0].is_contiguous(memory_format=memory_format)
        assert_same_state(fast, stock)
        if step:
            assert 0 < (expected[1] == 0).float().mean() < 0.9
    assert (fast.zero_point == 0) == (qscheme == SYMMETRIC)


def with_range(minimum: float, maximum: float) -> FakeQuantize:
    module = quantizer()
    module(torch.tensor([minimum, maximum]))
    module.disable_observer()
    return module


@pytest.mark.parametrize("seed", range(40))
def test_the_last_value_that_is_not_clamped_is_that_of_torch(seed):
    random = torch.Generator().manual_seed(seed)
    low, high = torch.randn(2, generator=random) * 10 ** torch.randint(-3, 3, (2,), generator=random)
    stock, fast = pair(with_range(-abs(float(low)), abs(float(high))))
    scale, zero = float(stock.scale), int(stock.zero_point)
    edges = [(-128 - zero - 0.5) * scale, (127 - zero + 0.5) * scale]
    x = torch.cat([neighbours(edge, 12) for edge in edges])
    ones = torch.ones_like(x)
    expected, ours = gradients(stock, x, ones), gradients(fast, x, ones)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert expected[1].reshape(2, -1).float().std(1).gt(0).all()  # each edge was crossed


def neighbours(value: float, count: int) -> torch.Tensor:
    """The float32 numbers around ``value``, ``count`` to each side."""
    values = [torch.tensor(value)]
    for _ in range(count):
        values = [
            torch.nextafter(values[0], torch.tensor(-math.inf)),
            *values,
            torch.nextafter(values[-1], torch.tensor(math.inf)),
        ]
    return torch.stack(values)


@pytest.mark.parametrize("scale", [0.25, 0.1, 3e-3])
def test_halfway_values_round_as_torch_rounds_them(scale):
    stock, fast = pair(with_range(-127.5 * scale, 127.5 * scale))
    x = (torch.arange(-150, 150) + 0.5) * stock.scale
    assert torch.equal(fast(x), stock(x))


def test_values_on_the_grid_of_a_known_scale_stay_and_others_move_to_the_nearest():
    _, fast = pair(with_range(0.0, 255.0))  # scale 1
    x = torch.tensor([0.0, 7.0, 7.4, 7.6, 0.5, 1.5, 255.0, 300.0, -3.0], requires_grad=True)
    y = fast(x)
    y.sum().backward()
    assert y.tolist() == [0, 7, 7, 8, 0, 2, 255, 255, 0]
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_flags_are_read_at_every_forward():
    _, fast = pair(quantizer())
    fast(torch.tensor([-1.0, 1.0]))
    fast.disable_observer()
    before = copy.deepcopy(fast.state_dict())
    assert float(fast(torch.tensor([50.0]))) == pytest.approx(1.0, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())
    fast.disable_fake_quant()
    assert float(fast(torch.tensor([50.123]))) == pytest.approx(50.123)
    fast.enable_observer()
    fast(torch.tensor([50.0]))
    assert float(fast.activation_post_process.max_val) == pytest.approx(1 + 0.01 * 49)
    fast.enable_fake_quant()
    assert float(fast(torch.tensor([0.003]))) != pytest.approx(0.003)


def test_other_precisions_are_left_to_torch():
    stock, fast = pair(with_range(-1.0, 1.0))
    x = torch.linspace(-2, 2, 99, dtype=torch.float64)
    for ours, expected in zip(gradients(fast, x), gradients(stock, x), strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "module",
    [
        quantizer(observer=MinMaxObserver),
        FakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            dtype=torch.qint8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
    ],
    ids=["other observer", "per channel"],
)
def test_quantizers_that_are_not_known_are_left_alone(module):
    accelerate(module)
    assert "forward" not in vars(module)


def conv_bn(dtype=torch.float64, *, bias=False) -> ConvBn2d:
    """A fused convolution with everything random; its quantizer stays float32 as torch wants it."""
    torch.manual_seed(0)
    config = QConfig(activation=torch.nn.Identity, weight=lambda: quantizer(SYMMETRIC))
    module = ConvBn2d(6, 8, 3, padding=1, stride=2, bias=bias, eps=1e-3, momentum=0.03, qconfig=config)
    with torch.no_grad():
        module.bn.weight.uniform_(0.5, 2).mul_(torch.tensor([1.0, -1.0] * 4))
        module.bn.bias.normal_()
        module.bn.running_mean.normal_()
        module.bn.running_var.uniform_(0.3, 3)
        for part in (module.weight, *([module.bias] if bias else []), *module.bn.parameters()):
            part.data = part.data.to(dtype)
        for name in ("running_mean", "running_var"):
            setattr(module.bn, name, getattr(module.bn, name).to(dtype))
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fused_convolution_computes_what_torch_does(frozen, bias):
    stock, fast = pair(conv_bn(bias=bias))
    random = torch.Generator().manual_seed(1)
    for module in (stock, fast):
        module(torch.randn(4, 6, 10, 10, generator=random, dtype=torch.float64))
        random.manual_seed(1)
        if frozen:
            module.apply(freeze_bn_stats).apply(disable_observer)
    for _ in range(2):
        x = torch.randn(4, 6, 10, 10, generator=random, dtype=torch.float64)
        for ours, expected in zip(gradients(fast, x), gradients(stock, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        assert_same_state(fast, stock, rtol=1e-9, atol=1e-9)


def test_a_fused_convolution_in_single_precision_agrees_within_rounding():
    stock, fast = pair(conv_bn(torch.float32).to(memory_format=torch.channels_last))
    x = torch.randn(4, 6, 10, 10).to(memory_format=torch.channels_last)
    for ours, expected in zip(gradients(fast, x), gradients(stock, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_freezing_and_releasing_batch_norm_as_sparseml_does_it():
    _, fast = pair(conv_bn(torch.float32))
    x = 3 + torch.randn(4, 6, 10, 10)

    def moves() -> bool:
        before = fast.bn.running_mean.clone()
        fast(x)
        return not torch.equal(before, fast.bn.running_mean)

    fast.train()
    assert moves()
    fast.apply(freeze_bn_stats)
    assert not moves()
    fast.train()  # must not unfreeze
    assert not moves()
    fast.apply(update_bn_stats)
    assert moves()


@pytest.fixture(scope="module")
def detector(recipe_text):
    """A yolov5n in QAT whose ranges have seen some images, in the layout it is trained in."""
    torch.manual_seed(0)
    model = YOLOv5("n", 3).train().to(memory_format=torch.channels_last)
    Recipe(recipe_text).apply_structure(model)
    model.train().apply(enable_observer).apply(update_bn_stats)
    for _ in range(3):
        model(images())
    return model


def quantizers(model) -> list[FakeQuantizeBase]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]


def images() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last)


def test_every_quantizer_and_fused_convolution_of_the_detector_is_replaced_and_keeps_its_class(detector):
    stock, fast = pair(detector)
    types = [type(module) for module in stock.modules()]
    assert [type(module) for module in fast.modules()] == types
    convolutions = [module for module in fast.modules() if type(module) is ConvBn2d]
    assert len(quantizers(fast)) == 2 * 60 + 2 * 7  # 60 convolutions, 7 residual sums
    assert len(convolutions) == 57
    assert all("forward" in vars(module) for module in quantizers(fast))
    assert all("_forward" in vars(module) for module in convolutions)
    assert_same_state(fast, stock)


def test_the_detector_computes_what_torch_does(detector):
    # Quantizers off: rounding would turn a last bit of difference into a whole step.
    stock, fast = pair(copy.deepcopy(detector).apply(disable_fake_quant))
    x = images()
    for mode in (True, False):
        stock.train(mode), fast.train(mode)
        with torch.no_grad():
            expected, ours = (model(x) if mode else model(x)[1] for model in (stock, fast))
        for raw, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(raw, reference, rtol=1e-3, atol=1e-3)
    assert_same_state(fast, stock, rtol=1e-3, atol=1e-4)


def test_a_copy_of_an_accelerated_detector_stands_on_its_own(detector):
    _, fast = pair(detector)
    other = copy.deepcopy(fast)
    before = copy.deepcopy(fast.state_dict())
    with torch.no_grad():
        other(5 * images())
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())
    stem = "model.0.conv.quant.activation_post_process.activation_post_process.max_val"
    assert other.state_dict()[stem] > before[stem]


def test_an_accelerated_model_and_what_is_restored_from_it_are_exported_to_the_same_bytes(
    lively_model, tmp_path
):
    accelerated, restored = copy.deepcopy(lively_model), YOLOv5("n", lively_model.num_classes)
    accelerate(accelerated)
    Recipe(QUANTIZE).apply_structure(restored)
    restored.load_state_dict(accelerated.state_dict())
    assert "forward" in vars(quantizers(accelerated)[0])
    assert not any({"forward", "_forward"} & set(vars(module)) for module in restored.modules())
    freeze_quantizers(restored)
    for name, model in (("accelerated", accelerated), ("restored", restored)):
        with model.eval().export_mode(64):
            _write(model, torch.zeros(1, 3, 64, 64), tmp_path / name, 13)
    exported = (tmp_path / "restored").read_bytes()
    assert (tmp_path / "accelerated").read_bytes() == exported
    assert exported.count(b"QuantizeLinear") >= 60
