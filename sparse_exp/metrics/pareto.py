"""The Pareto front: which of two values of a metric is better, and which points no other point beats."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Words of a metric's name (between / and _) that mean that less is better. A name with the word "per" is a
# rate, of which more is better, whatever its other words are.
_LESS = frozenset(
    ("size", "time", "latency", "seconds", "loss", "spread", "error", "mb", "ms", "s", "px", "score", "box")
)


@dataclass(frozen=True)
class Point:
    """A run in a picture of two metrics.

    Args:
        number: its number in the table.
        name: text beside it.
        x, y: its values, finite.
        front: whether it is on the Pareto front.
        best: whether it is the run that was chosen.
        dense: whether it is a dense network that others are compared with.
        hollow: whether it may not be shipped.
    """

    number: int
    name: str
    x: float
    y: float
    front: bool
    best: bool = False
    dense: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis of a picture: its metric, and whether less of it is better."""

    metric: str
    less: bool

    @property
    def label(self) -> str:
        """The text at the axis."""
        return f"{self.metric} ({'less' if self.less else 'more'} is better)"


def less_is_better(metric: str) -> bool:
    """Whether the smaller of two values of a metric is the better one.

    This holds for sizes (``size/...``, ``..._mb``), times (``time/..._s``, ``latency_..._ms``), losses, the
    spread of measurements, and the differences between an engine and torch (``verify/<engine>/score_...``,
    ``box_..._px``, ``..._error``). Of all others - mAP, images per second, sparsity, recovery - more is
    better.

    Args:
        metric: full name, as in ``result.json``.
    """
    words = words_of(metric)
    return "per" not in words and not _LESS.isdisjoint(words)


def words_of(metric: str) -> list[str]:
    """The words of a metric's name, which are separated by slashes and underscores."""
    return re.split(r"[/_]", metric)


def pareto_front(
    x: Sequence[float | None], y: Sequence[float | None], *, x_less: bool, y_less: bool
) -> list[bool]:
    """Tell for each point whether it is on the Pareto front.

    A point is on the front when no other point is as good in both values and better in one. Points that are
    equal in both values are all on it, or none is. A point that lacks a value (None or NaN) is not on it and
    beats no other.

    Args:
        x: a value for each point.
        y: likewise.
        x_less: whether less of x is better; else more is.
        y_less: likewise.
    """

    def larger_is_better(value: float | None, *, less: bool) -> float | None:
        if value is None or math.isnan(value):
            return None
        return -value if less else value

    pairs = [
        (larger_is_better(a, less=x_less), larger_is_better(b, less=y_less))
        for a, b in zip(x, y, strict=True)
    ]
    known = [(a, b, index) for index, (a, b) in enumerate(pairs) if a is not None and b is not None]
    front = [False] * len(pairs)
    best: tuple[float, float] | None = None
    # In this order no point can beat one before it.
    for a, b, index in sorted(known, key=lambda point: (-point[0], -point[1])):
        if best is None or b > best[1] or (a, b) == best:
            front[index], best = True, (a, b)
    return front


def staircase(points: Sequence[tuple[float, float]], *, x_less: bool) -> list[tuple[float, float]]:
    """The corners of a line, from small x to large, around the region that the points of a front beat.

    Args:
        points: the points on the front, in any order.
        x_less: whether less of x is better.
    """
    corners: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if corners:
            corners.append((x, corners[-1][1]) if x_less else (corners[-1][0], y))
        corners.append((x, y))
    return corners
