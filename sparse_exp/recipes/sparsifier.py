"""A recipe applied to a model step by step while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_exp.quantization.fast_qat import accelerate
from sparse_exp.recipes.distillation import Distiller
from sparse_exp.recipes.modifier_state import modifier_states, restore_modifiers


class Sparsifier(Protocol):
    """A recipe applied to a model while it trains."""

    def before_step(self, epoch: float) -> None:
        """Change model and optimizer as the recipe asks at an epoch, before the forward pass."""

    def loss(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """Add the distillation loss to the task's loss; without a teacher the loss stays as it is.

        Args:
            loss: of the task: the mean over the batch times N.
            images: float (N, 3, H, W) in 0..1.
            raw: the three raw maps (N, 3, ny, nx, 5 + nc) that the model computed from them.
            epoch: of this step.
        """

    def step(self, epoch: float) -> None:
        """Take one optimizer step, apply masks again, and prune if an update is due."""

    def state(self) -> dict[str, Any]:
        """The recipe's progress as builtin types and tensors."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where another sparsifier, of the same recipe and the same structure of the model, was.

        Before this, call `before_step` with every epoch at which a phase has begun so far, and with the epoch
        of the last step. Parameters of projections to a teacher's channels are added to the optimizer.

        Args:
            state: the other one's.
        """

    def finish(self) -> None:
        """Detach from the model, which keeps its structure."""


class ManagedSparsifier:
    """A `Sparsifier` that uses SparseML's manager.

    Args:
        manager: initialized for the model.
        model: in training.
        optimizer: of its parameters.
        steps_per_epoch: optimizer steps in an epoch.
        gradual: those of the manager's modifiers that raise the sparsity step by step.
        quantization_start: epoch at which QAT begins; None: never.
        distiller: adds the distillation loss; None: no distillation.
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
            accelerate(self._model)
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
        # SparseML would prune before the next step. By pruning now, the weights that are evaluated and saved
        # after this step have the sparsity that is due; so have those after the very last step.
        after = epoch + 1.0 / self._steps_per_epoch
        for modifier in self._gradual:
            begun = modifier.start_epoch < after
            if begun and modifier.update_ready(after, self._steps_per_epoch):
                modifier.scheduled_update(self._model, self._optimizer, after, self._steps_per_epoch)

    def state(self) -> dict[str, Any]:
        """See `Sparsifier`."""
        projections = self._distiller.projections() if self._distiller else {}
        modifiers = modifier_states(list(self._manager.iter_modifiers()))
        return {"modifiers": modifiers, "projections": projections}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sparsifier`."""
        restore_modifiers(list(self._manager.iter_modifiers()), state["modifiers"])
        if self._distiller:
            self._distiller.restore_projections(state["projections"])

    def finish(self) -> None:
        """See `Sparsifier`."""
        self._manager.finalize(self._model)
        if self._distiller:
            self._distiller.unwatch()
