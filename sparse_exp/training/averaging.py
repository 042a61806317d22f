"""The average of the weights over the steps, which is what floating-point phases evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_exp.yolov5 import YOLOv5


def exponential(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential averaging that starts short, so that it means something on small data sets too.

    Args:
        decay: of the average, 0..1; after ``n`` updates at most ``(1 + n) / (10 + n)``.

    Returns:
        ``multi_avg_fn`` for `torch.optim.swa_utils.AveragedModel`; counters are copied.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - now)
        else:
            torch._foreach_copy_(averaged, current)

    return average


@torch.no_grad()
def zero_where_zero(averaged: YOLOv5, model: YOLOv5) -> None:
    """Set weights of an average to 0 where the model's are: one pruned lately is still on its way there.

    Args:
        averaged: changed in place.
        model: with the same layers.
    """
    current = model.quantizable_convolutions()
    for name, conv in averaged.quantizable_convolutions().items():
        conv.weight.masked_fill_(current[name].weight == 0, 0.0)
