"""The phases of a training: their steps, when they are evaluated, and their best checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.errors import RecipeError, expected
from sparse_exp.recipes.recipe import Phase

_MOSAIC_SHARE, _LEAST, _MOST = 0.1, 1.0, 10.0  # without mosaic: of the epochs, and bounds in epochs


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a phase.

    Attributes:
        path: the file.
        epoch: after which it was written.
        map50: mAP50 on the validation split, 0..1.
        score: what ``trainer.monitor`` names, there, 0..1.
        promised: least share of zeros of each layer in it, 0..1.
    """

    path: Path
    epoch: float
    map50: float
    score: float
    promised: dict[str, float]


def score_of(record: Mapping[str, Any], monitor: str) -> float:
    """The accuracy that ``trainer.monitor`` names, of a record of the history, 0..1."""
    if monitor == "fitness":
        return float(0.1 * record["val/map50"] + 0.9 * record["val/map50_95"])
    return float(record[f"val/{monitor}"])


def is_pruning(phase: Phase) -> bool:
    """Whether zeros are still being made in a phase, or channels taken out.

    Then only the weights at its end may be its best.
    """
    return not {"pruning", "slimming"}.isdisjoint(phase.name.split("_"))


def first_step(epoch: float, steps_per_epoch: int) -> int:
    """The first step at or after an epoch: the first at which a modifier that starts there acts.

    Args:
        epoch: may be fractional.
        steps_per_epoch: steps in an epoch.
    """
    return math.ceil(epoch * steps_per_epoch - 1e-6)  # rounding may lift a whole number slightly


def last_mosaic(config: TrainerConfig, epochs: float, quantization_start: float | None) -> float:
    """The epoch up to which whole passes over the images have mosaics; infinite where they never end.

    Args:
        config: of the training; without ``close_mosaic`` the last tenth before quantization begins, or the
            training ends, has none, from one epoch to ten.
        epochs: of the training.
        quantization_start: epoch at which quantization begins; None: it does not.
    """
    ends = epochs if quantization_start is None else quantization_start
    if config.close_mosaic is None:
        return ends - min(max(_LEAST, _MOSAIC_SHARE * ends), _MOST)
    return ends - config.close_mosaic if config.close_mosaic else math.inf


def check_phases(phases: Sequence[Phase], steps_per_epoch: int) -> None:
    """Refuse phases in which nothing would be trained.

    Args:
        phases: of a training.
        steps_per_epoch: steps in an epoch.

    Raises:
        RecipeError: a phase is shorter than one step.
    """
    for phase in phases:
        if first_step(phase.end, steps_per_epoch) <= first_step(phase.start, steps_per_epoch):
            length = f"{phase.end - phase.start:g} epochs of {steps_per_epoch} steps"
            do = "Give it more of num_epochs, or more images."
            raise RecipeError(expected(f"the phase {phase.name}", "at least one step", length, do))


def evaluated_epochs(phase: Phase, every: int = 1) -> list[float]:
    """The epochs after which a phase is evaluated: each ``every``-th of the training, and its end."""
    whole = range(math.floor(phase.start) + 1, math.ceil(phase.end))
    return [*(float(epoch) for epoch in whole if epoch % every == 0), phase.end]


def evaluated_spans(phase: Phase, steps_per_epoch: int, every: int = 1) -> list[range]:
    """Cut the steps of a phase where the model is evaluated; see `evaluated_epochs`.

    Args:
        phase: at least one step long; see `check_phases`.
        steps_per_epoch: steps in an epoch.
        every: epochs between two evaluations.

    Returns:
        Consecutive ranges of steps, counted from the start of the training.
    """
    first, last = (first_step(epoch, steps_per_epoch) for epoch in (phase.start, phase.end))
    ends = (first_step(epoch, steps_per_epoch) for epoch in evaluated_epochs(phase, every))
    inside = [step for step in ends if first < step < last]
    return [range(start, stop) for start, stop in pairwise([first, *inside, last])]
