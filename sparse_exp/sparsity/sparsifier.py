"""A recipe at work on a model that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_exp.sparsity.distillation import Distiller
from sparse_exp.sparsity.remembered import remember, remembered


class Sparsifier(Protocol):
    """A recipe applied to a model while it trains."""

    def before_step(self, epoch: float) -> None:
        """Bring model and optimizer to where the recipe wants them before the forward pass."""

    def loss(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """Add what is learned from a teacher to the task's loss; the same loss where there is none.

        Args:
            loss: of the task: the mean over the batch times N.
            images: float (N, 3, H, W) in 0..1.
            raw: the three raw maps (N, 3, ny, nx, 5 + nc) that the model made of them.
            epoch: now.
        """

    def step(self, epoch: float) -> None:
        """Take one optimizer step, restore what the recipe keeps, such as masks, and prune if it is time."""

    def state(self) -> dict[str, Any]:
        """What was done so far, as builtin types and tensors."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was, of the same recipe and a model of the same structure.

        Before it, `before_step` was called with every epoch at which a phase has begun since the start, and
        with that of the last step. The optimizer gets the parameters that the other one's had.

        Args:
            state: of the other one.
        """

    def finish(self) -> None:
        """Detach from the model, which keeps its structure."""


class ManagedSparsifier:
    """The `Sparsifier` that SparseML's manager is.

    Args:
        manager: initialized for the model.
        model: in training.
        optimizer: of its parameters.
        steps_per_epoch: optimizer steps.
        gradual: those of the manager's modifiers that raise the sparsity step by step.
        quantization_start: epoch at which QAT begins; None: never.
        distiller: what is learned from a teacher, if anything is.
    """

    def __init__(
        self,
        manager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        *,
        gradual: Sequence[Any] = (),
        quantization_start: float | None = None,
        distiller: Distiller | None = None,
    ) -> None:
        self._manager, self._model = manager, model
        self._optimizer, self._steps_per_epoch = optimizer, steps_per_epoch
        self._gradual, self._distiller = gradual, distiller
        self._quantization_start = quantization_start

    def before_step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        begins = self._quantization_start is not None and epoch >= self._quantization_start
        if begins and self._distiller:
            self._distiller.unwatch()
        self._manager.update(self._model, self._optimizer, epoch, self._steps_per_epoch, log_updates=False)
        if begins:
            self._quantization_start = None
            _accelerate(self._model)
            if self._distiller:
                self._distiller.watch()

    def loss(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """See `Sparsifier`."""
        return self._distiller.add_to(loss, images, raw, epoch) if self._distiller else loss

    def step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        self._manager.optimizer_pre_step(self._model, self._optimizer, epoch, self._steps_per_epoch)
        self._optimizer.step()
        self._manager.optimizer_post_step(self._model, self._optimizer, epoch, self._steps_per_epoch)
        self._prune(epoch + 1.0 / self._steps_per_epoch)

    def _prune(self, epoch: float) -> None:
        # SparseML prunes before the next step. Already now, the weights that are evaluated and saved
        # after this one have the sparsity that is due, also after the last step of all.
        for modifier in self._gradual:
            begun = modifier.start_epoch < epoch
            if begun and modifier.update_ready(epoch, self._steps_per_epoch):
                modifier.scheduled_update(self._model, self._optimizer, epoch, self._steps_per_epoch)

    def state(self) -> dict[str, Any]:
        """See `Sparsifier`."""
        learned = self._distiller.projections() if self._distiller else {}
        return {"modifiers": remembered(list(self._manager.iter_modifiers())), "projections": learned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sparsifier`."""
        remember(list(self._manager.iter_modifiers()), state["modifiers"])
        if self._distiller:
            self._distiller.project_with(state["projections"])

    def finish(self) -> None:
        """See `Sparsifier`."""
        self._manager.finalize(self._model)
        if self._distiller:
            self._distiller.unwatch()


def _accelerate(model: nn.Module) -> None:
    from sparse_exp.sparsity.fast_qat import accelerate

    accelerate(model)
