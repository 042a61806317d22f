"""Anchors: which boxes they can answer for, and anchors that are fitted to the boxes of a data set.

A box is learned by an anchor only where neither side differs by a factor of ``anchor_t`` or more. A box that
no anchor answers for is never learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PUBLISHED = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""Width and height in px of the anchors that YOLOv5 was published with, three for each level."""
LEAST_RECALL = 0.98
"""The share of boxes with an anchor below which upstream fits anchors anew."""
_GENERATIONS, _MOST_BOXES, _ROUNDS = 1000, 10_000, 50


def best_possible_recall(
    sides: NDArray[np.floating], anchors: NDArray[np.floating], anchor_t: float
) -> float:
    """The share of boxes that some anchor answers for, 0..1; 1 without boxes.

    Args:
        sides: width and height of the boxes, ``(M, 2)``, px of the letterboxed image.
        anchors: width and height, ``(..., 2)``, px.
        anchor_t: largest ratio of sides, exclusive; ``trainer.loss.anchor_t``.
    """
    return float((_agreement(sides, anchors) > 1 / anchor_t).mean()) if len(sides) else 1.0


def fit_anchors(sides: NDArray[np.floating], anchor_t: float, seed: int) -> NDArray[np.float64]:
    """Anchors for the boxes of a data set: k-means of their logarithms, and then evolution.

    Evolution changes anchors at random and keeps what agrees better with the boxes, a thousand times.

    Args:
        sides: see `best_possible_recall`; at least one box. Of more than 10 000 as many are drawn.
        anchor_t: likewise.
        seed: of all randomness.

    Returns:
        Width and height in px, ``(3, 3, 2)``: level, anchor; from the smallest area to the largest.
    """
    draw = np.random.default_rng(seed)
    sides = np.maximum(sides.astype(np.float64), 1e-3)
    if len(sides) > _MOST_BOXES:
        sides = sides[np.sort(draw.choice(len(sides), _MOST_BOXES, replace=False))]
    best = np.exp(_means(np.log(sides), 9, draw))
    score = _fitness(sides, best, anchor_t)
    for _ in range(_GENERATIONS):
        factors = np.where(draw.random(best.shape) < 0.5, draw.lognormal(0.0, 0.1, best.shape), 1.0)
        tried = best * factors
        found = _fitness(sides, tried, anchor_t)
        if found > score:
            best, score = tried, found
    return best[np.argsort(best.prod(1), kind="stable")].reshape(3, 3, 2)


def _agreement(sides: NDArray[np.floating], anchors: NDArray[np.floating]) -> NDArray[np.float64]:
    """How well the best anchor agrees with each box (M,): the smaller ratio of their sides, 0..1."""
    ratio = np.asarray(sides, np.float64)[:, None] / np.asarray(anchors, np.float64).reshape(-1, 2)
    agreement: NDArray[np.float64] = np.minimum(ratio, 1 / np.maximum(ratio, 1e-12)).min(2).max(1)
    return agreement


def _fitness(sides: NDArray[np.float64], anchors: NDArray[np.float64], anchor_t: float) -> float:
    agreement = _agreement(sides, anchors)
    return float((agreement * (agreement > 1 / anchor_t)).mean())


def _means(points: NDArray[np.float64], count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """The means of ``count`` groups of points (M, 2) by Lloyd's algorithm, from a start as of k-means++."""
    means = points[[draw.integers(len(points))]]
    while len(means) < count:
        distance = ((points[:, None] - means) ** 2).sum(2).min(1)
        total = distance.sum()
        shares = distance / total if total > 0 else None
        means = np.append(means, points[[draw.choice(len(points), p=shares)]], 0)
    for _ in range(_ROUNDS):
        group = ((points[:, None] - means) ** 2).sum(2).argmin(1)
        moved = np.array(
            [points[group == k].mean(0) if (group == k).any() else means[k] for k in range(count)]
        )
        if np.allclose(moved, means):
            break
        means = moved
    return means
