"""Where the evaluations of a training fall, and what is remembered of a phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sparse_exp.errors import RecipeError, expected
from sparse_exp.sparsity.recipe import Phase


@dataclass(frozen=True)
class Best:
    """The checkpoint of a phase that goes on.

    Attributes:
        path: where it lies.
        epoch: after which it was taken.
        map50: on the validation split, 0..1.
        promised: least share of zeros of each layer in it, 0..1.
    """

    path: Path
    epoch: float
    map50: float
    promised: dict[str, float]


def is_pruning(phase: Phase) -> bool:
    """Whether zeros are still being made: what such a phase has on the way is no candidate for export."""
    return phase.name.startswith("pruning")


def first_step(epoch: float, steps_per_epoch: int) -> int:
    """The first step at or after an epoch: a modifier that starts there has begun when it is taken."""
    return math.ceil(epoch * steps_per_epoch - 1e-6)  # less what rounding adds to a whole number


def check_phases(phases: Sequence[Phase], steps_per_epoch: int) -> None:
    """Refuse a phase in which nothing would be trained.

    Raises:
        RecipeError: a phase is shorter than one step.
    """
    for phase in phases:
        if first_step(phase.end, steps_per_epoch) <= first_step(phase.start, steps_per_epoch):
            length = f"{phase.end - phase.start:g} epochs of {steps_per_epoch} steps"
            do = "Give it more of num_epochs, or more images."
            raise RecipeError(expected(f"the phase {phase.name}", "at least one step", length, do))


def stretches(phase: Phase, steps_per_epoch: int) -> list[range]:
    """The steps of a phase in stretches that end with an evaluation: at each epoch, and at its end.

    Args:
        phase: at least one step long; see `check_phases`.
        steps_per_epoch: steps of an epoch.

    Returns:
        Ranges of steps, counted from the start of the training, one after the other.
    """
    first, last = (first_step(epoch, steps_per_epoch) for epoch in (phase.start, phase.end))
    epochs = range(math.floor(phase.start), math.ceil(phase.end) + 1)
    inside = sorted(e * steps_per_epoch for e in epochs if first < e * steps_per_epoch < last)
    marks = [first, *inside, last]
    return [range(start, stop) for start, stop in pairwise(marks)]
