"""The optimizer, with its parameters in the groups that recipes address."""

from __future__ import annotations

import torch
from torch import nn

from sparse_exp.config.schema import TrainerConfig

BIASES, WEIGHTS, NORMS = range(3)


def make_optimizer(model: nn.Module, trainer: TrainerConfig, kind: str) -> torch.optim.Optimizer:
    """Build the optimizer of a training.

    Its three groups stand in the order of YOLOv5 from v6.2 on, which recipes with ``param_groups``
    count by: 0 biases (those of batch norms too), 1 convolution weights, 2 batch norm weights. Only
    group 1 decays. (YOLOv5 v5 to v6.1 had norms, weights, biases.)

    Args:
        model: its parameters are optimized.
        trainer: rate, decay and momentum.
        kind: ``adamw``, or ``sgd`` with Nesterov momentum.
    """
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        groups[BIASES if name.endswith(".bias") else WEIGHTS if parameter.ndim > 1 else NORMS].append(
            parameter
        )
    decays = (0.0, trainer.weight_decay, 0.0)
    described = [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)]
    if kind == "adamw":
        return torch.optim.AdamW(described, lr=trainer.lr, fused=True)
    momentum = trainer.momentum
    return torch.optim.SGD(described, lr=trainer.lr, momentum=momentum, nesterov=momentum > 0)
