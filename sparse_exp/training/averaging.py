"""The average of the weights over the steps, which is evaluated and saved in floating-point phases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_exp.yolov5 import YOLOv5


def exponential(decay: float, tau: float | None = None) -> Callable[[Any, Any, Any], None]:
    """An exponential average that at first spans only a few steps, for data sets with few steps.

    Args:
        decay: of the average, 0..1. After ``n`` updates ``(1 + n) / (10 + n)`` is used if that is less.
        tau: if given, ``decay * (1 - exp(-(n + 1) / tau))`` is used instead, as YOLOv5 does with 2000.

    Returns:
        ``multi_avg_fn`` for `torch.optim.swa_utils.AveragedModel`; it copies counters.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        updates = float(count) + 1.0
        now = min(decay, updates / (9.0 + updates)) if tau is None else decay * -math.expm1(-updates / tau)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - now)
        else:
            torch._foreach_copy_(averaged, current)

    return average


@torch.no_grad()
def zero_where_zero(averaged: YOLOv5, model: YOLOv5) -> None:
    """Set the average of each weight that is 0 in the model to 0.

    The average of a weight that was pruned lately is not 0 yet.

    Args:
        averaged: changed in place.
        model: with the same layers.
    """
    current = model.quantizable_convolutions()
    for name, conv in averaged.quantizable_convolutions().items():
        conv.weight.masked_fill_(current[name].weight == 0, 0.0)
