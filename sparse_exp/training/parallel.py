"""The forward pass of a training in several processes: torch's DistributedDataParallel, set up by Fabric."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from sparse_exp.distributed import collectives


class ParallelForward:
    """Computes a model so that the backward pass adds up the gradients of all processes.

    Where this process is alone, the model computes and nothing is exchanged.

    Args:
        fabric: of this process.
        model: in training; it stays the module that optimizer, averages and checkpoints know.
    """

    def __init__(self, fabric: Fabric, model: nn.Module) -> None:
        self._fabric, self._model = fabric, model
        self._wrapped: Any = None
        self._trained: list[bool] = []

    def __call__(self, images: Tensor, *, exchange: bool) -> Any:
        """What the model computes from images.

        Args:
            images: float (N, 3, H, W) of this process; N may be 0.
            exchange: whether the backward pass of this part of a batch adds up what all parts gave.
        """
        if collectives.size() == 1:
            return self._model(images)
        self._wrap()
        with self._fabric.no_backward_sync(self._wrapped, enabled=not exchange):
            return self._wrapped(images)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients. Where processes share a batch, the sum of their losses counts."""
        # DistributedDataParallel divides by their number, as if each loss were a mean
        self._fabric.backward(loss * collectives.size())

    def sum_others(self, optimizer: torch.optim.Optimizer) -> None:
        """Add up the gradients of an optimizer's parameters that are not the model's: projections."""
        if collectives.size() > 1:
            own = {id(parameter) for parameter in self._model.parameters()}
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            for parameter in parameters:
                if id(parameter) not in own and parameter.grad is not None:
                    parameter.grad = collectives.total(parameter.grad) / collectives.size()

    def _wrap(self) -> None:
        """Set the model up, again where other parameters are trained than before: their set is fixed."""
        trained = [parameter.requires_grad for parameter in self._model.parameters()]
        if self._wrapped is None or trained != self._trained:
            self._wrapped, self._trained = (
                self._fabric.setup_module(self._model, move_to_device=False),
                trained,
            )
