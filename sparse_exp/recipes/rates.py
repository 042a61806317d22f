"""Learning rates over time: the curves of SparseML 1.8, and torch's stepwise schedules in epochs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any


def at_epoch(
    curve: str,
    epoch: float,
    span: tuple[float, float],
    rates: tuple[float, float],
    cycle_epochs: float = 1.0,
    steps_per_epoch: int = 1,
) -> float:
    """The learning rate on a curve. A step behind the end is on the curve's continuation, but not below 0.

    Args:
        curve: ``linear``, ``cosine``, or ``cyclic_linear``, which is linear within each cycle.
        epoch: of the step, not before the start.
        span: first and last epoch of the curve.
        rates: first and last learning rate.
        cycle_epochs: length of a cycle.
        steps_per_epoch: steps in an epoch, of which a cycle has at least two.
    """
    (start, end), (first, last) = span, rates
    if curve == "cyclic_linear":
        return max(0.0, _cyclic(epoch - start, end - start, rates, cycle_epochs, steps_per_epoch))
    x = (epoch - start) / (end - start)
    if curve == "linear":
        return max(0.0, first + x * (last - first))
    low, half = min(first, last), abs(first - last) / 2
    return math.cos(x * math.pi + (math.pi if last >= first else 0.0)) * half + half + low


def _cyclic(
    elapsed: float, length: float, rates: tuple[float, float], cycle_epochs: float, steps_per_epoch: int
) -> float:
    """The rate within a cycle, counted in steps; the last cycle is as long as there is room for it."""
    now, whole, cycle = (epochs * steps_per_epoch for epochs in (elapsed, length, cycle_epochs))
    if now > int(whole / cycle) * cycle:
        cycle = whole % cycle
    first, last = rates
    return first if cycle <= 1.0 else first - (now % cycle) / (cycle - 1) * (first - last)


def decays(
    schedule: str, options: Mapping[str, Any], start: float, steps_per_epoch: int
) -> Callable[[int], float]:
    """A schedule that multiplies the learning rate now and then.

    Args:
        schedule: ``StepLR``, ``ExponentialLR`` or ``MultiStepLR``.
        options: ``gamma``, and ``step_size`` or ``milestones`` in epochs.
        start: first epoch of the schedule.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        A function from the number of steps since the start to the factor that is due with this step. A
        ``step_size`` of less than half a step gives each step its share of the decay.
    """
    gamma = float(options["gamma"])
    if schedule == "MultiStepLR":
        falls = Counter(round((epoch - start) * steps_per_epoch) for epoch in options["milestones"])
        return lambda step: gamma ** falls[step]
    length = float(options.get("step_size", 1.0)) * steps_per_epoch
    size, factor = (round(length), gamma) if round(length) else (1, gamma ** (1.0 / length))
    return lambda step: factor if step > 0 and step % size == 0 else 1.0


def warm_restarts(epoch: float, initial: float, options: Mapping[str, Any]) -> float:
    """The rate of ``CosineAnnealingWarmRestarts`` (Loshchilov and Hutter 2017).

    Args:
        epoch: since the start.
        initial: rate at the beginning of each cycle.
        options: ``cycle_epochs``, the length of the first cycle; ``T_mult``, by which each is longer than
            the one before; ``lr_min``, the rate at the end of each.
    """
    length, factor = float(options["cycle_epochs"]), float(options.get("T_mult", 1.0))
    if epoch >= length and factor == 1.0:
        epoch %= length
    elif epoch >= length:
        cycle = int(math.log(epoch / length * (factor - 1) + 1, factor))
        epoch -= length * (factor**cycle - 1) / (factor - 1)
        length *= factor**cycle
    low = float(options["lr_min"])
    return low + (initial - low) * (1 + math.cos(math.pi * epoch / length)) / 2
