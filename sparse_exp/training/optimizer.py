"""The optimizer of a training, its parameters in the groups that recipes expect."""

from __future__ import annotations

import torch
from torch import nn

from sparse_exp.config.schema import TrainerConfig

NORMS, WEIGHTS, BIASES = range(3)
_NOMINAL_BATCH = 64  # images


def make_optimizer(model: nn.Module, trainer: TrainerConfig, kind: str) -> torch.optim.Optimizer:
    """Build the optimizer of a training.

    It has the three groups to which ``param_groups`` of SparseML's YOLOv5 recipes refers: 0 weights of batch
    norms, 1 weights of convolutions, 2 all biases. Only group 1 has weight decay. That of SGD is scaled to
    the batch: as published, it acts once for 64 images, however many steps they are.

    Args:
        model: its parameters are optimized.
        trainer: its learning rate, weight decay, momentum and size of a batch.
        kind: ``adamw``, or ``sgd``, which has Nesterov momentum.
    """
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        groups[BIASES if name.endswith(".bias") else WEIGHTS if parameter.ndim > 1 else NORMS].append(
            parameter
        )
    share = 1.0 if kind == "adamw" else trainer.batch_size / _NOMINAL_BATCH
    decays = (0.0, trainer.weight_decay * share, 0.0)
    options = [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)]
    if kind == "adamw":
        return torch.optim.AdamW(options, lr=trainer.lr, fused=True)
    momentum = trainer.momentum
    return torch.optim.SGD(options, lr=trainer.lr, momentum=momentum, nesterov=momentum > 0)
