from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_exp.config.schema import LossConfig
from sparse_exp.errors import ConfigError
from sparse_exp.sparsity.slimming import choose_channels, fit_norms, gradient_scores, weight_scores
from sparse_exp.yolov5 import DetectionLoss, YOLOv5
from sparse_exp.yolov5.channels import channels_of, keep_channels, layers_of

CLASSES, IMGSZ = 3, 64


@pytest.fixture(scope="module")
def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(2)
    boxes = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 0, 0.3, 0.6, 0.2, 0.2], [1, 2, 0.7, 0.2, 0.3, 0.1]])
    return [(torch.rand(2, 3, IMGSZ, IMGSZ), boxes)]


@pytest.fixture
def model() -> YOLOv5:
    torch.manual_seed(1)
    made = YOLOv5("n", CLASSES)
    with torch.no_grad():
        for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.3, 0.3)
    return made


def loss_of(model: YOLOv5) -> DetectionLoss:
    return DetectionLoss(model.anchors, CLASSES, LossConfig(), IMGSZ)


def macs(model: YOLOv5) -> int:
    """Counted by torch."""
    with FlopCounterMode(display=False) as counter, model.export_mode(IMGSZ), torch.no_grad():
        model(torch.zeros(1, 3, IMGSZ, IMGSZ))
    return counter.get_total_flops() // 2


@torch.no_grad()
def gates(model: YOLOv5, group: str, channel: int, factor: float) -> None:
    for layer in layers_of(model):
        if layer.gives == group:
            norm = model.get_submodule(f"{layer.name}.bn")
            norm.weight[channel] *= factor
            norm.bias[channel] *= factor


def test_gradient_scores_are_those_of_finite_differences(model, samples):
    """Of single convolutions; where several are added up each counts for itself."""

    def loss(raw, targets):  # the detector's own has targets that follow the predictions without a gradient
        return sum((level**2).mean() for level in raw) * targets[:, 2:].sum(), None

    model = model.double().eval()
    images, targets = (tensor.double() for tensor in samples[0])
    scores = gradient_scores(model, [(images, targets)], loss)
    for group in ("model.1", "model.9.cv1", "model.13.cv1", "model.17.cv3"):
        channel, squares = int(scores[group].argmax()), []
        for index in range(2):
            losses = []
            for step in (1e-5, -1e-5):
                gates(model, group, channel, 1 + step)
                with torch.no_grad():
                    raw = model(images[index : index + 1])[1]
                losses.append(float(loss(raw, targets[targets[:, 0] == index])[0]))
                gates(model, group, channel, 1 / (1 + step))
            squares.append(((losses[0] - losses[1]) / 2e-5) ** 2)
        assert float(scores[group][channel]) == pytest.approx(sum(squares) / 2, rel=1e-3), group


def test_scores_leave_the_model_as_it_is(model, samples):
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    model.model[3].bn.weight.requires_grad_(False)
    gradient_scores(model, samples, loss_of(model))
    weight_scores(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.model[3].bn.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("score", ["gradients", "weights"])
def test_channels_that_do_nothing_go_first(model, samples, score):
    dead = {"model.1": [0, 5, 6, 7, 8, 9, 20, 31], "model.4.cv1": [1, 2, 3, 4, 5, 6, 7, 8]}
    with torch.no_grad():
        for group, channel in ((g, c) for g, channels in dead.items() for c in channels):
            gates(model, group, channel, 0.0)
    found = weight_scores(model) if score == "weights" else gradient_scores(model, samples, loss_of(model))
    assert all(bool((found[group][channels] == 0).all()) for group, channels in dead.items())
    without = copy.deepcopy(model)
    alive = {g: [c for c in range(channels_of(model)[g]) if c not in own] for g, own in dead.items()}
    keep_channels(without, {group: torch.tensor(own) for group, own in alive.items()})
    kept = choose_channels(model, found, macs(without) / macs(model))
    assert set(kept) == set(dead)
    assert {
        g: sorted(set(range(channels_of(model)[g])) - set(own.tolist())) for g, own in kept.items()
    } == dead
    image = samples[0][0]
    with torch.no_grad():
        before = model.eval()(image)[0]
        keep_channels(model, kept)
        assert torch.allclose(model(image)[0], before, atol=1e-4)


@pytest.mark.parametrize(("size", "share", "multiple"), [*itertools.product("ns", (0.7, 0.4), (8, 16))])
def test_as_much_work_stays_as_was_asked_for(size, share, multiple):
    torch.manual_seed(0)
    model = YOLOv5(size, CLASSES)
    whole = macs(model)
    kept = choose_channels(model, weight_scores(model), share, multiple=multiple)
    keep_channels(model, kept)
    assert share - 0.05 < macs(model) / whole <= share
    widths = channels_of(model)
    assert all(widths[name] % multiple == 0 for name in kept)
    # whole: for 32 px, a fourth of that for 64 px
    again = choose_channels(model, weight_scores(model), share - 0.1, whole=whole // 4, multiple=multiple)
    keep_channels(model, again)
    assert macs(model) / whole <= share - 0.1


@pytest.mark.slow
def test_what_costs_more_for_the_same_harm_goes_first(model):
    """All channels are worth the same, so only what they save counts."""
    scores = {name: torch.ones(count, dtype=torch.float64) for name, count in channels_of(model).items()}
    saved = {}
    for name, count in channels_of(model).items():
        if count > 8:
            torch.manual_seed(0)
            other = YOLOv5("n", CLASSES)
            keep_channels(other, {name: torch.arange(count - 8)})
            saved[name] = macs(model) - macs(other)
    (first,) = choose_channels(model, scores, 0.999)
    assert saved[first] == max(saved.values())


def test_the_least_that_can_stay_is_named(model):
    with pytest.raises(
        ConfigError, match=r"of yolov5n that stays to be at least 0\.\d\d, but got 0\.01"
    ) as error:
        choose_channels(model, weight_scores(model), 0.01)
    assert "\n" not in str(error.value)
    least = float(str(error.value).split("at least ")[1][:4])
    choose_channels(model, weight_scores(model), least)


def test_norms_are_fitted_to_what_they_see(model, samples):
    images = torch.rand(6, 3, IMGSZ, IMGSZ)
    seen: list[torch.Tensor] = []
    model.model[0].conv.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    fit_norms(model.eval(), images.split(2))
    norm, outputs = model.model[0].bn, torch.cat(seen)
    assert torch.allclose(norm.running_mean, outputs.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.03
    assert not model.training


def test_frozen_norms_are_not_fitted(model, samples):
    model.train()
    frozen, other = model.model[0].bn.eval(), model.model[1].bn
    before, moved = frozen.running_mean.clone(), other.running_mean.clone()
    fit_norms(model, torch.rand(6, 3, IMGSZ, IMGSZ).split(2))
    assert torch.equal(frozen.running_mean, before)
    assert not torch.equal(other.running_mean, moved)
    assert (model.training, frozen.training, other.training) == (True, False, True)
