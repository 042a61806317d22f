from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.training.optimizer import BIASES, NORMS, WEIGHTS, make_optimizer
from sparse_exp.yolov5 import YOLOv5

CONFIG = TrainerConfig(batch_size=64, lr=0.01, weight_decay=0.3, momentum=0.8)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def test_groups_are_norms_then_weights_then_biases_and_hold_each_parameter_once():
    model = YOLOv5("n", 3)
    groups = make_optimizer(model, CONFIG, "sgd").param_groups
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    biases = [m.bias for m in [*norms, *convolutions] if m.bias is not None]
    wanted = {BIASES: biases, WEIGHTS: [m.weight for m in convolutions], NORMS: [m.weight for m in norms]}
    assert (NORMS, WEIGHTS, BIASES) == (0, 1, 2)  # what recipes count by
    for index, parameters in wanted.items():
        assert {id(p) for p in groups[index]["params"]} == {id(p) for p in parameters}
        assert len(groups[index]["params"]) == len(parameters)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.3, 0.0]
    assert {group["lr"] for group in groups} == {0.01}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_adamw_computes_what_one_with_two_groups_does():
    model = small()
    other = copy.deepcopy(model)
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, fused=True)
    ours = train(model, make_optimizer(model, CONFIG, "adamw"))
    assert all(map(torch.equal, ours, train(other, reference)))


@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_sgd_has_nesterov_momentum(momentum):
    """By hand: v = m v + g; w = w - lr (g + m v), with g the gradient plus decay times w."""
    weight = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(weight.weight, 2.0)
    config = TrainerConfig(
        batch_size=16, lr=0.1, weight_decay=2.0, momentum=momentum
    )  # 0.5 in a quarter of 64
    optimizer = make_optimizer(weight, config, "sgd")
    w, v = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        weight.weight.grad = torch.full_like(weight.weight, gradient)
        optimizer.step()
        g = gradient + 0.5 * w
        v = momentum * v + g
        w -= 0.1 * (g + momentum * v)
        assert weight.weight.item() == pytest.approx(w, rel=1e-6)
