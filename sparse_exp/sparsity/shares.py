"""Shares of zeros by time: one of several for each layer, for the least harm within a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[Sequence[float]]
"""Of each layer a number for each of its choices."""
_ROUNDING = 1e-6  # of a step, by which floating-point numbers may be off


def least_harm(times: Numbers, harms: Numbers, budget: float, *, steps: int = 10_000) -> list[int]:
    """Choose for each layer so that the sum of harms is least and the sum of times fits into a budget.

    Solved by dynamic programming over time in small steps, as SPDY does (Frantar and Alistarh 2022,
    https://arxiv.org/abs/2201.13096). What a choice takes longer than the layer's fastest is rounded up to
    whole steps, so that the sum of times never exceeds the budget; the harm is the least for a budget that is
    smaller by a step for each layer, or less.

    Args:
        times: of each layer's choices, 0 or more, in any unit.
        harms: of the same choices, finite.
        budget: most time of all layers together, in that unit.
        steps: into which the time between that of the fastest choices and the budget is divided.

    Returns:
        The index of each layer's choice; of equally harmful ones the first.

    Raises:
        ValueError: the fastest choices together take longer.
    """
    fastest = sum(min(layer) for layer in times)
    spare = budget - fastest
    if spare < 0:
        raise ValueError(f"the fastest choices take {fastest:g}, more than {budget:g}")
    least = np.zeros(steps + 1)  # harm of the layers so far, by the steps that they may take
    chosen = []
    for own_times, own_harms in zip(times, harms, strict=True):
        each = np.stack(
            [
                _delayed(least, cost, steps) + harm
                for cost, harm in zip(_in_steps(own_times, spare, steps), own_harms, strict=True)
            ]
        )
        chosen.append(each.argmin(0))
        least = each.min(0)
    picked, left = [], steps
    for choices, own_times in zip(reversed(chosen), reversed(times), strict=True):
        picked.append(int(choices[left]))
        left -= int(_in_steps(own_times, spare, steps)[picked[-1]])
    return picked[::-1]


def _in_steps(times: Sequence[float], spare: float, steps: int) -> NDArray[np.int64]:
    """What each choice takes longer than the fastest, in whole steps; more than all where it cannot fit."""
    longer = np.asarray(times, np.float64) - min(times)
    fits = longer <= spare
    counted = np.ceil(np.where(fits, longer, 0.0) / (spare or 1.0) * steps - _ROUNDING)
    return np.where(fits, counted, steps + 1).astype(np.int64)


def _delayed(harm: NDArray[np.float64], cost: int, steps: int) -> NDArray[np.float64]:
    """The harm of the layers before, where this one takes some of the steps."""
    if cost > steps:
        return np.full_like(harm, np.inf)
    return np.concatenate([np.full(cost, np.inf), harm[: steps + 1 - cost]])
