"""Which of two values is better, and which points no other beats: plain functions of plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Words of a metric's name (between / and _) of which less is better. Rates are looked at first: a name that
# says "per" counts what is done in a time, and of that more is better.
_LESS = frozenset(
    ("size", "time", "latency", "seconds", "loss", "spread", "error", "mb", "ms", "s", "px", "score", "box")
)


@dataclass(frozen=True)
class Point:
    """A run in a picture of two metrics.

    Args:
        number: that the table has it under.
        name: shown with it.
        x, y: its values, finite.
        front: it is on the Pareto front.
        best: it is the one that was chosen.
    """

    number: int
    name: str
    x: float
    y: float
    front: bool
    best: bool = False


@dataclass(frozen=True)
class Axis:
    """What a picture shows along one side: a metric, and whether less of it is better."""

    metric: str
    less: bool

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.metric} ({'less' if self.less else 'more'} is better)"


def less_is_better(metric: str) -> bool:
    """Whether the smaller of two values of a metric is the better one.

    So are sizes (``size/...``, ``..._mb``), times (``time/..._s``, ``latency_..._ms``), losses, the spread of
    measurements, and how far an engine is from torch (``verify/<engine>/score_...``, ``box_..._px``,
    ``..._error``). Of everything else - mAP, images per second, sparsity, recovery - more is better.

    Args:
        metric: full name, as in ``result.json``.
    """
    words = words_of(metric)
    return "per" not in words and not _LESS.isdisjoint(words)


def words_of(metric: str) -> list[str]:
    """The words of a metric's name: what stands between its slashes and underscores."""
    return re.split(r"[/_]", metric)


def pareto_front(
    x: Sequence[float | None], y: Sequence[float | None], *, x_less: bool, y_less: bool
) -> list[bool]:
    """For each point whether it is on the Pareto front: no other is as good in both and better in one.

    Points that are equal in both are all on it, or none is. A point that lacks a value (None or NaN) is not
    on it and beats nothing.

    Args:
        x: one value a point.
        y: as many.
        x_less: less of x is better, else more.
        y_less: likewise.
    """
    # The better is now the larger; sorted so that nothing behind a point can beat it.
    better = [
        (_upwards(a, x_less), _upwards(b, y_less), i) for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    known = [(a, b, i) for a, b, i in better if a is not None and b is not None]
    front = [False] * len(better)
    best: tuple[float, float] | None = None
    for a, b, index in sorted(known, key=lambda point: (-point[0], -point[1])):
        if best is None or b > best[1] or (a, b) == best:
            front[index], best = True, (a, b)
    return front


def _upwards(value: float | None, less: bool) -> float | None:  # noqa: FBT001
    if value is None or math.isnan(value):
        return None
    return -value if less else value


def staircase(points: Sequence[tuple[float, float]], *, x_less: bool) -> list[tuple[float, float]]:
    """The edge of what the points of a front beat, as corners of a line from small x to large.

    Args:
        points: those on the front, in any order.
        x_less: less of x is better.
    """
    corners: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if corners:
            corners.append((x, corners[-1][1]) if x_less else (corners[-1][0], y))
        corners.append((x, y))
    return corners
