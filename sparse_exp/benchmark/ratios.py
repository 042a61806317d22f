"""How many times faster one cell is than another, and how sure that is.

Cells are measured in turns, so that what slows the machine slows both. The ratio of two cells is therefore
taken within each turn that both were measured in. Its value is the geometric mean over the turns, and its
interval comes from how far the turns are apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

CONFIDENCE = 0.999  # of an interval: of 1000 pairs of equal cells one is told apart
LEAST_TURNS = 3
"""From which an interval says anything."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two speeds.

    Attributes:
        value: how many times faster the one is than the other.
        low: where the interval begins; 0 where there are too few turns.
        high: where it ends; infinite likewise.
    """

    value: float
    low: float = 0.0
    high: float = math.inf

    @property
    def is_noise(self) -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= 1.0 <= self.high

    @property
    def error(self) -> float:
        """Half the width of the interval, as a share of the value."""
        return (self.high - self.low) / 2 / self.value

    def as_dict(self) -> dict[str, float | None]:
        """As plain data, with None for a bound that is not known."""
        low, high = self.low or None, None if math.isinf(self.high) else self.high
        return {"value": self.value, "low": low, "high": high}

    def __str__(self) -> str:
        """Two decimals; after a tilde where the two cannot be told apart."""
        return f"{'~' if self.is_noise else ''}{self.value:.2f}"


SAME = Ratio(1.0, 1.0, 1.0)
"""Of a cell to itself."""

Row = Mapping[str, Any]
Speeds = Mapping[int, float]
"""Images per second in each turn, by its number."""


def ratio_of(speeds: Speeds, others: Speeds) -> Ratio:
    """The ratio of two cells.

    Args:
        speeds: of the one.
        others: of the other; some turns are those of the first.
    """
    return mean_ratio([(speeds, others)])


def ratio_of_rows(row: Row, other: Row) -> Ratio:
    """The ratio of two rows of ``benchmark.json``."""
    return ratio_of(speeds_of(row), speeds_of(other))


def mean_ratio(links: Sequence[tuple[Speeds, Speeds]]) -> Ratio:
    """The geometric mean of several ratios, each taken in the turns that all have.

    Args:
        links: of each ratio the speeds of the two cells; see `ratio_of`. At least one.
    """
    turns = sorted(set.intersection(*({*speeds} & {*others} for speeds, others in links)))
    if not turns:  # measured at different times
        logs = [math.log(np.median([*one.values()]) / np.median([*other.values()])) for one, other in links]
        return Ratio(math.exp(float(np.mean(logs))))
    means = np.mean([[math.log(one[t] / other[t]) for t in turns] for one, other in links], axis=0)
    return Ratio(math.exp(float(means.mean())), *_interval(means))


def speeds_of(row: Row) -> Speeds:
    """The speeds of a row of ``benchmark.json``; rows of old versions do not number their turns."""
    each = row.get("each") or [row["items_per_s"]]
    return dict(zip(row.get("turns") or range(len(each)), each, strict=True))


def _interval(logs: NDArray[np.float64]) -> tuple[float, float]:
    """The interval of exp(mean) by Student's t distribution.

    Resampling (bootstrap) has too short tails for so few turns: of equal cells it told apart 1.8 % instead of
    0.2 % (run: eight turns, normal noise), as no mean of drawn values lies beyond the values.
    """
    count = len(logs)
    if count < LEAST_TURNS:
        return 0.0, math.inf
    error = float(logs.std(ddof=1)) / math.sqrt(count) * float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return math.exp(logs.mean() - error), math.exp(logs.mean() + error)
