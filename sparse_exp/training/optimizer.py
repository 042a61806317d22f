"""The optimizer, with its parameters in the groups that recipes address."""

from __future__ import annotations

import torch
from torch import nn

from sparse_exp.config.schema import TrainerConfig

NORMS, WEIGHTS, BIASES = range(3)


def make_optimizer(model: nn.Module, trainer: TrainerConfig, kind: str) -> torch.optim.Optimizer:
    """Build the optimizer of a training.

    Its three groups stand in the order that SparseML's YOLOv5 recipes count by with ``param_groups``: 0
    batch norm weights, 1 convolution weights, 2 biases (those of batch norms too). Only group 1 decays.

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
