"""A recipe applied to a model step by step while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_exp.recipes.distillation import Distiller
from sparse_exp.recipes.effects import Effect, GradualMasks, Quantization
from sparse_exp.yolov5.channels import Cut


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

    def cut(self, cuts: Mapping[str, Cut]) -> None:
        """Follow a model that lost channels; see `sparse_exp.yolov5.channels.keep_channels`.

        Args:
            cuts: what stayed of its parameters and buffers, by name.
        """

    def finish(self) -> None:
        """Detach from the model, which keeps its structure."""


class NativeSparsifier:
    """A `Sparsifier` that does what its modifiers say.

    Args:
        effects: of the modifiers, in the order in which they act.
        optimizer: of the model's parameters.
        steps_per_epoch: optimizer steps in an epoch.
        distiller: adds the distillation loss; None: no distillation.
    """

    def __init__(
        self,
        effects: Sequence[Effect[Any]],
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        distiller: Distiller | None = None,
    ) -> None:
        self._effects, self._distiller = effects, distiller
        self._optimizer, self._steps_per_epoch = optimizer, steps_per_epoch

    def before_step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        quantized = self._quantized()
        for effect in self._effects:
            effect.update(epoch)
        self._mask()
        if self._distiller and self._quantized() != quantized:
            self._distiller.unwatch()
            self._distiller.watch()

    def loss(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """See `Sparsifier`."""
        return self._distiller.add_to(loss, images, raw, epoch) if self._distiller else loss

    def step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        self._optimizer.step()
        self._mask()
        # SparseML would prune before the next step. By pruning now, the weights that are evaluated and saved
        # after this step have the sparsity that is due; so have those after the very last step.
        after = epoch + 1.0 / self._steps_per_epoch
        for effect in self._effects:
            if isinstance(effect, GradualMasks) and effect.modifier.start_epoch < after:
                effect.update(after)

    def state(self) -> dict[str, Any]:
        """See `Sparsifier`."""
        projections = self._distiller.projections() if self._distiller else {}
        return {"modifiers": [effect.state() for effect in self._effects], "projections": projections}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sparsifier`."""
        for effect, kept in zip(self._effects, state["modifiers"], strict=True):
            effect.restore(kept)
        if self._distiller:
            self._distiller.restore_projections(state["projections"])

    def cut(self, cuts: Mapping[str, Cut]) -> None:
        """See `Sparsifier`."""
        for effect in self._effects:
            effect.cut(cuts)

    def finish(self) -> None:
        """See `Sparsifier`."""
        for effect in self._effects:
            effect.finish()
        if self._distiller:
            self._distiller.unwatch()

    def _mask(self) -> None:
        for effect in self._effects:
            effect.mask()

    def _quantized(self) -> bool:
        return any(isinstance(effect, Quantization) and effect.begun for effect in self._effects)
