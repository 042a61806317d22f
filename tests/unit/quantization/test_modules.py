"""Quantizers and quantized layers against torch's own QAT modules."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvBn2d, freeze_bn_stats
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    disable_observer,
)

from sparse_exp.distributed import collectives
from sparse_exp.quantization.fake_quantize import fake_quantize, fake_quantize_scaled
from sparse_exp.quantization.modules import Quantizer
from sparse_exp.quantization.quantizers import (
    begin,
    calibrate,
    freeze_batch_norms,
    freeze_quantizers,
    is_quantized,
    is_rounding,
    prepare,
    quantized_layers,
    quantizers,
    release,
    schemes_of,
)
from sparse_exp.quantization.scheme import LayerScheme, TensorScheme, layer_schemes
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.model import Conv

IGNORE = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]
WEIGHTS = TensorScheme(symmetric=True)
SCHEMES = [TensorScheme(bits, symmetric, channel) for bits in (8, 7, 2) for symmetric in (True, False)
           for channel in (True, False)]  # fmt: skip


def torchs(scheme: TensorScheme) -> FakeQuantize:
    """Torch's quantizer of the same scheme."""
    scope = "channel" if scheme.per_channel else "tensor"
    qscheme = getattr(torch, f"per_{scope}_{'symmetric' if scheme.symmetric else 'affine'}")
    observer = MovingAveragePerChannelMinMaxObserver if scheme.per_channel else MovingAverageMinMaxObserver
    first, last = scheme.steps
    return FakeQuantize(observer, dtype=torch.qint8, quant_min=first, quant_max=last, qscheme=qscheme)


def ours(scheme: TensorScheme, channels: int = 1) -> Quantizer:
    quantizer = Quantizer(scheme, channels if scheme.per_channel else 1, of_weight=True)
    quantizer.enabled = quantizer.observing = True
    return quantizer


def gradients(module, x, weights=None):
    """Output for ``x``, then the gradients of its weighted sum: that of ``x`` first."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) if weights is None else weights
    (y * weights).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in module.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_gradients_and_ranges_are_those_of_torch_bit_for_bit(scheme, memory_format):
    stock, mine = torchs(scheme), ours(scheme, 3)
    random = torch.Generator().manual_seed(0)
    for step in range(6):  # the range follows slowly: later steps clamp on both sides
        x = (1 + step) * torch.randn(3, 5, 8, 6, generator=random).to(memory_format=memory_format) + step / 2
        for found, expected in zip(gradients(mine, x), gradients(stock, x), strict=True):
            assert torch.equal(found, expected)
            assert found.is_contiguous(memory_format=memory_format)
        observer = stock.activation_post_process
        for found, expected in {
            mine.low: observer.min_val, mine.high: observer.max_val, mine.scale: stock.scale,
            mine.zero_point: stock.zero_point,
        }.items():  # fmt: skip
            assert torch.equal(found, expected.reshape(-1).to(found.dtype))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_last_value_that_is_not_clamped_is_that_of_torch(seed, per_channel):
    random = torch.Generator().manual_seed(seed)
    scale = (torch.rand(2 if per_channel else 1, generator=random) + 0.1) * 10 ** float(seed % 5 - 3)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    x = torch.stack([torch.cat([neighbours(float(edge * s), 12) for edge in (-128.5, 127.5)]) for s in scale])

    def by_torch(x):
        if per_channel:
            return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)

    results = []
    for function in (by_torch, lambda x: fake_quantize(x, scale, zero, -128, 127)):
        inputs = x.clone().requires_grad_()
        outputs = function(inputs)
        outputs.sum().backward()
        results.append((outputs.detach(), inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].reshape(len(scale) * 2, -1).std(1).gt(0).all()  # each edge was crossed


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


def test_values_on_the_grid_of_a_known_scale_stay_and_others_move_to_the_nearest():
    quantizer = ours(TensorScheme())
    quantizer.set_range(0.0, 255.0)  # scale 1
    x = torch.tensor([0.0, 7.0, 7.4, 7.6, 0.5, 1.5, 255.0, 300.0, -3.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0, 7, 7, 8, 0, 2, 255, 255, 0]
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_a_range_follows_only_training_and_calibration():
    quantizer = ours(TensorScheme())
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.eval()(torch.tensor([50.0]))
    assert quantizer.high.item() == 1.0
    quantizer.train()(torch.tensor([50.0]))
    assert quantizer.high.item() == pytest.approx(1 + 0.01 * 49)
    quantizer.observing = False
    quantizer(torch.tensor([500.0]))
    assert quantizer.high.item() == pytest.approx(1 + 0.01 * 49)
    quantizer.eval().calibrate(on=True)
    for value in (2.0, 3.0, 7.0):
        quantizer(torch.tensor([value]))
    assert quantizer.high.item() == pytest.approx(4.0)


def test_the_range_of_several_processes_is_that_of_the_whole_batch(monkeypatch):
    """The greatest of both processes is taken; a share of a batch may have no image."""
    quantizer = Quantizer(TensorScheme())
    monkeypatch.setattr(collectives, "greatest", lambda both: torch.maximum(both, torch.tensor([3.0, 4.0])))
    quantizer.observe(torch.zeros(0, 3, 8, 8))
    assert (quantizer.low.item(), quantizer.high.item()) == (-3.0, 4.0)


def test_an_empty_batch_is_not_seen():
    quantizer = Quantizer(TensorScheme())
    quantizer.observe(torch.zeros(0, 3, 8, 8))
    assert quantizer.low > quantizer.high


def test_other_precisions_are_left_to_torch():
    quantizer, x = ours(TensorScheme()), torch.linspace(-2, 2, 99, dtype=torch.float64)
    quantizer.set_range(-1.0, 1.0)
    expected = torch.fake_quantize_per_tensor_affine(x, quantizer.scale, quantizer.zero_point, -128, 127)
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 6])
def test_scaled_weights_are_those_that_torch_multiplies_rounds_and_divides(channels, memory_format):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=random).to(memory_format=memory_format)
    factor = torch.tensor([0.5, -2.0, 0.0, 1e-3, 7.0, 1.0])
    scale = 0.01 * (
        1 + torch.arange(channels)
    )  # clamps some values in each channel but those of small factors
    zero = torch.zeros(channels, dtype=torch.int32)
    upstream = torch.randn(6, 5, 3, 3, generator=random)

    def by_torch(weight, factor):
        scaled = weight * factor.view(-1, 1, 1, 1)
        if channels == 1:
            rounded = torch.fake_quantize_per_tensor_affine(scaled, scale, zero, -64, 63)
        else:
            rounded = torch.fake_quantize_per_channel_affine(scaled, scale, zero, 0, -64, 63)
        return rounded / torch.where(factor == 0, 1.0, factor).view(-1, 1, 1, 1)

    results = []
    for function in (by_torch, lambda *given: fake_quantize_scaled(*given, scale, zero, -64, 63)):
        inputs = [weight.clone().requires_grad_(), factor.clone().requires_grad_()]
        outputs = function(*inputs)
        (outputs * upstream).sum().backward()
        results.append((outputs.detach(), *(value.grad for value in inputs)))
    (values, of_weight, of_factor), (own, own_of_weight, own_of_factor) = results
    assert torch.equal(own, values)
    torch.testing.assert_close(own_of_weight, of_weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        own_of_factor, of_factor, rtol=1e-4, atol=1e-2
    )  # 1 / 0.001 enlarges what rounding leaves


class Convolution(nn.Module):
    """A convolution with a batch norm behind it, as they stand in the detector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)

    def forward(self, x):
        return self.bn(self.conv(x))


def both(scheme: TensorScheme) -> tuple[ConvBn2d, Convolution]:
    """Torch's fused convolution with everything random in float64, and ours with the same numbers."""
    torch.manual_seed(0)
    config = QConfig(activation=nn.Identity, weight=lambda: torchs(scheme))
    stock = ConvBn2d(6, 8, 3, padding=1, stride=2, eps=1e-3, momentum=0.03, qconfig=config)
    with torch.no_grad():
        stock.bn.weight.uniform_(0.5, 2).mul_(torch.tensor([1.0, -1.0] * 4))
        stock.bn.bias.normal_()
        stock.bn.running_mean.normal_()
        stock.bn.running_var.uniform_(0.3, 3)
    mine = Convolution()
    mine.conv.load_state_dict({"weight": stock.weight})
    mine.bn.load_state_dict(stock.bn.state_dict())
    begin(prepare(mine, {"conv": LayerScheme(weights=scheme)}))
    for module in (stock, mine):
        for part in module.modules():  # quantizers stay float32, as torch wants them
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
                for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                    tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    return stock, mine


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_convolution_computes_what_torch_does(per_channel, frozen):
    stock, mine = both(TensorScheme(symmetric=True, per_channel=per_channel))
    random = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 10, 10, generator=random, dtype=torch.float64)
    stock(x), mine(x)
    if frozen:
        stock.apply(freeze_bn_stats).apply(disable_observer)
        freeze_batch_norms(freeze_quantizers(mine))
    for _ in range(2):
        x = torch.randn(4, 6, 10, 10, generator=random, dtype=torch.float64)
        for found, expected in zip(gradients(mine, x), gradients(stock, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.bn.running_var, stock.bn.running_var, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.conv.weight_quantizer.scale, stock.weight_fake_quant.scale)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_weight_of_0_makes_nothing_nan(frozen):
    layer = Convolution()
    nn.init.zeros_(layer.bn.weight[:3])
    begin(prepare(layer, {"conv": LayerScheme(weights=WEIGHTS)}))
    if frozen:
        freeze_batch_norms(layer)
    outputs = gradients(layer, torch.randn(4, 6, 10, 10))
    assert all(bool(value.isfinite().all()) for value in outputs)
    assert torch.equal(outputs[0][:, :3], layer.bn.bias[:3].view(1, -1, 1, 1).expand_as(outputs[0][:, :3]))


def test_outputs_are_rounded_behind_the_batch_norm():
    layer = Convolution()
    prepare(layer, {"conv": LayerScheme(weights=WEIGHTS, outputs=TensorScheme(3))})
    outputs = begin(layer)(torch.randn(4, 6, 10, 10))
    assert len(outputs.unique()) <= 8
    layer.eval()
    assert len(layer(torch.randn(4, 6, 10, 10)).unique()) <= 8


@pytest.fixture(scope="module")
def schemes():
    return layer_schemes({"scheme": {"weights": {"symmetric": True}}, "ignore": IGNORE}, YOLOv5("n", 3))


def images() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last)


@pytest.fixture
def detector(schemes):
    torch.manual_seed(0)
    return prepare(YOLOv5("n", 3).train().to(memory_format=torch.channels_last), schemes)


def test_a_prepared_model_is_the_same_model(schemes):
    torch.manual_seed(0)
    model = YOLOv5("n", 3)
    plain, x = copy.deepcopy(model).eval(), images()
    before = {name: (id(value), value) for name, value in model.named_parameters()}
    prepare(model, schemes)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: (id(value), value) for name, value in model.named_parameters()} == before
    assert torch.equal(model.eval()(x)[0], plain(x)[0])
    assert not is_rounding(model)
    assert not is_quantized(list(model.state_dict()))
    assert schemes_of(model) == schemes
    assert len(quantized_layers(model)) == 60
    prepare(model, schemes)
    prepare(model, {})
    with pytest.raises(ValueError, match="with others"):
        prepare(model, {"model.0.conv": LayerScheme(weights=TensorScheme(4))})


def test_layers_that_read_one_tensor_share_a_quantizer_and_round_it_once(detector):
    found = quantizers(detector)
    # 60 convolutions and 7 sums of two read 74 tensors. Two branches of 8 C3 read one, the first convolution
    # and the sum of 7 bottlenecks, and twice the head and the way down.
    assert sum(not name.endswith("weight_quantizer") for name in found) == 74 - 8 - 7 - 2
    for one, other in {
        "model.2.cv1.conv": "model.2.cv2.conv",
        "model.18.conv": "model.24.m.0",
        "model.21.conv": "model.24.m.1",
    }.items():
        readers = [detector.get_submodule(name).input_quantizer for name in (one, other)]
        assert readers[0] is readers[1]
    bottleneck = detector.get_submodule("model.4.m.1")
    assert bottleneck.add.input_quantizers[0] is bottleneck.cv1.conv.input_quantizer
    begin(detector)
    calls = []
    shared = detector.get_submodule("model.2.cv1.conv.input_quantizer")
    shared.observe = lambda x: calls.append(x)
    detector(images())
    assert len(calls) == 1
    assert all(quantizer._last is None for quantizer in quantizers(detector).values())


def test_sharing_changes_nothing(schemes):
    torch.manual_seed(0)
    model, x = YOLOv5("n", 3), images()
    apart = copy.deepcopy(model)
    begin(prepare(model, schemes))
    prepare(apart, schemes)
    for name, scheme in schemes.items():  # one for each reader
        layer = apart.get_submodule(name)
        if hasattr(layer, "input_quantizer"):
            layer.input_quantizer = Quantizer(scheme.inputs)
        else:
            layer.input_quantizers = nn.ModuleList(Quantizer(scheme.inputs) for _ in range(2))
    begin(apart)
    for detector in (model, apart):
        sum(raw.square().mean() for raw in detector.train()(x)).backward()
    for (name, own), (_, other) in zip(model.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in model.state_dict().items())


def test_copies_stand_on_their_own_and_survive_pickling_in_the_middle_of_a_step(detector):
    begin(detector)
    x = images()
    detector(x)
    detector.get_submodule("model.2.cv1.conv")(
        torch.rand(1, 32, 8, 8, requires_grad=True)
    )  # one of two readers
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(other.eval()(x)[0], detector.eval()(x)[0])
        assert other.get_submodule("model.2.cv1.conv.input_quantizer").readers == 2
        assert other.get_submodule("model.0.conv").norm[0] is other.get_submodule("model.0.bn")
        before = detector.state_dict()["model.1.conv.input_quantizer.high"].clone()
        other.train()(5 * x)
        assert torch.equal(detector.state_dict()["model.1.conv.input_quantizer.high"], before)
    release(detector)
    assert all(quantizer._last is None for quantizer in quantizers(detector).values())


def test_a_state_dict_holds_quantizers_only_while_they_round(detector, schemes):
    plain = detector.state_dict()
    begin(detector)(images())
    state = detector.state_dict()
    added = set(state) - set(plain)
    assert added
    assert all("quantizer" in name for name in added)
    again = begin(prepare(YOLOv5("n", 3), schemes))
    again.load_state_dict(state)
    x = images()
    assert torch.equal(again.eval()(x)[0], detector.eval()(x)[0])
    with pytest.raises(RuntimeError, match="quantizer"):  # ranges must not be lost without a word
        again.load_state_dict(plain)
    prepare(YOLOv5("n", 3), schemes).load_state_dict(plain)


def test_pixels_become_steps_and_stay_so(detector):
    begin(detector)
    stem = detector.get_submodule("model.0.conv.input_quantizer")
    pixels = torch.arange(256) / 255
    for _ in range(2):
        assert torch.equal((stem(pixels) / stem.scale + stem.zero_point).round(), torch.arange(256.0) - 128)
        calibrate(detector, [0.3 * images()])
        detector.train()(0.1 * images())


def test_calibration_changes_nothing_but_ranges(detector):
    begin(detector)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    calibrate(detector, [images(), images()])
    after = detector.state_dict()
    assert detector.training
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all("quantizer" in name for name in changed)
    assert all(bool((quantizer.low <= quantizer.high).all()) for quantizer in quantizers(detector).values())


def test_freezing_batch_norms_lasts(detector):
    begin(detector)
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)
    freeze_batch_norms(detector)
    for _ in range(2):
        assert not any(norm.training for norm in norms)
        before = norms[3].running_mean.clone()
        detector(images())
        assert torch.equal(norms[3].running_mean, before)
        detector.eval().train()


def test_evaluation_computes_with_the_batch_norm_folded_in(detector, schemes):
    """Frozen, it computes the same in training and in evaluation; without rounding, what it did in float."""
    begin(detector)
    for _ in range(3):
        detector(images())
    x = images()
    freeze_batch_norms(freeze_quantizers(detector))
    with torch.no_grad():
        trained, (_, evaluated) = detector(x), detector.eval()(x)
    assert all(torch.equal(one, other) for one, other in zip(trained, evaluated, strict=True))
    for quantizer in quantizers(detector).values():
        quantizer.enabled = False
    with torch.no_grad():
        folded = detector(x)[1]
    plain = YOLOv5("n", 3).eval()
    plain.load_state_dict(detector.state_dict())
    for found, expected in zip(folded, plain(x)[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", [{"ignore": ["Concat"]}, {"submodules": ["model"], "weight_bits": 4}])
def test_every_scheme_trains(arguments):
    model = YOLOv5("n", 3).train()
    schemes = layer_schemes({**arguments}, model)
    begin(prepare(model, schemes))
    sum(raw.square().mean() for raw in model(images())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all((quantizer.low <= quantizer.high).all() for quantizer in quantizers(model).values())


def test_a_block_alone_can_be_quantized():
    block = Conv(3, 4, 3)
    begin(prepare(block, {"conv": LayerScheme(TensorScheme(), WEIGHTS), "act": LayerScheme(TensorScheme(2))}))
    assert len(block(torch.randn(2, 3, 8, 8)).unique()) <= 4
