"""COCO's average precision, and what it is made of by class, in NumPy.

Detections are matched image by image; of each only a few bytes are kept, from which everything else is
computed at the end. Matching and interpolation are those of COCO's own evaluation, for boxes of any size
(https://cocodataset.org/#detection-eval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
_CONFS = np.linspace(0.0, 1.0, 1001)  # tried for the best
_ALL = (1 << len(IOUS)) - 1
# Of each detection: at which IoUs it is right (a bit each), its confidence and class, and the object of any
# class that it overlaps most, as an index, and by how much; -1 where that is below 0.5.
_KEPT = np.dtype([("right", "u2"), ("conf", "f4"), ("label", "u2"), ("object", "i4"), ("overlap", "f4")])


@dataclass(frozen=True)
class ClassAccuracies:
    """How well each of K classes was found; NaN for classes without an object.

    Attributes:
        objects: number of labelled objects, ``(K,)``.
        ap50: average precision at IoU 0.5, ``(K,)``, 0..1.
        ap50_95: the mean over IoU 0.5, 0.55, ... 0.95.
        conf: the confidence at which the mean of the classes' F1 scores is best, 0..1; the rest is measured
            there.
        precision: share of the detections of a class that are right at IoU 0.5, ``(K,)``; 0 without any.
        recall: share of the objects of a class that were found.
        f1: harmonic mean of both.
        confusion: counts ``(K + 1, K + 1)``: row: class of the object, column: class of the detection that
            overlaps it most, by 0.5 or more. The last row counts detections of what is no object or was found
            already, the last column objects that nothing overlaps.
    """

    objects: NDArray[np.int64]
    ap50: NDArray[np.float64]
    ap50_95: NDArray[np.float64]
    conf: float
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    confusion: NDArray[np.int64]


@dataclass(frozen=True)
class Accuracies:
    """How well the objects of all images were found.

    Attributes:
        map50: mean over the classes with objects of the average precision at IoU 0.5, 0..1; 0 without any.
        map50_95: the mean over IoU 0.5, 0.55, ... 0.95, too.
        precision: interpolated precision at `RECALLS` at IoU 0.5, the mean over these classes, ``(101,)``.
        by_class: the same by class, and more.
    """

    map50: float
    map50_95: float
    precision: NDArray[np.float64]
    by_class: ClassAccuracies


class Matcher:
    """Collects the detections of images, matched with their objects.

    Args:
        num_classes: class ids are below it.
        max_det: detections of each class that count per image, the most confident ones.
    """

    def __init__(self, num_classes: int, max_det: int = 300) -> None:
        self._num_classes, self._max_det = num_classes, max_det
        self._found: list[NDArray[np.void]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._objects = 0

    def add(
        self, detections: NDArray[np.float32], boxes: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> None:
        """Take the detections of an image.

        Args:
            detections: ``(D, 6)``: x1, y1, x2, y2, confidence, class id.
            boxes: of the objects, ``(M, 4)``: x1, y1, x2, y2 in the same unit.
            labels: class ids of the objects, ``(M,)``.
        """
        detections = detections[np.argsort(-detections[:, 4], kind="stable")]
        detections = detections[_rank_in_class(detections[:, 5]) < self._max_det]
        kept = np.zeros(len(detections), _KEPT)
        kept["conf"], kept["label"], kept["object"] = detections[:, 4], detections[:, 5], -1
        if len(detections) and len(boxes):
            overlaps = _overlaps(detections[:, :4].astype(np.float64), boxes.astype(np.float64))
            most = len(boxes) - 1 - overlaps[:, ::-1].argmax(1)
            kept["overlap"] = overlaps[np.arange(len(detections)), most]
            kept["object"] = np.where(kept["overlap"] >= IOUS[0], most + self._objects, -1)
            kept["right"] = _matched(overlaps, kept["label"][:, None] == labels)
        self._found.append(kept)
        self._labels.append(np.asarray(labels, np.int64))
        self._objects += len(labels)

    def accuracies(self) -> Accuracies:
        """How well the objects of all images so far were found."""
        found = np.concatenate([np.zeros(0, _KEPT), *self._found])
        labels = np.concatenate([np.zeros(0, np.int64), *self._labels])
        found = found[np.argsort(-found["conf"], kind="stable")]
        objects = np.bincount(labels, minlength=self._num_classes)
        tables = np.full((self._num_classes, len(IOUS), len(RECALLS)), np.nan)
        for number in np.flatnonzero(objects):
            tables[number] = _interpolated(found["right"][found["label"] == number], int(objects[number]))
        some = objects > 0
        precision = tables[some, 0].mean(0) if some.any() else np.zeros(len(RECALLS))
        ap = tables.mean(2)
        return Accuracies(
            float(ap[some, 0].mean()) if some.any() else 0.0,
            float(ap[some].mean()) if some.any() else 0.0,
            precision,
            _by_class(found, labels, objects, ap),
        )


def ratio_interval(
    one: Matcher, other: Matcher, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Between what the ratio of two mAP50 lies, as far as other images of the kind would tell.

    Images are drawn anew, with replacement, and both are measured on the same ones (paired bootstrap, Efron
    and Tibshirani 1993). Of very many detections fewer draws are taken, 100 at least.

    Args:
        one: that was given all images.
        other: that was given the same, in the same order.
        confidence: share of the draws that lie inside.
        draws: how often images are drawn.
        seed: of the draws.

    Returns:
        The lower and the upper bound; None of fewer than two images, or where nothing was found.
    """
    images, draw = len(one._labels), np.random.default_rng(seed)
    if images < 2 or images != len(other._labels):
        return None
    tables = [_Ranked(matcher) for matcher in (one, other)]
    work = max(1, sum(len(table.right) for table in tables))
    ratios = []
    for _ in range(int(np.clip(2e8 / work, 100, draws))):
        weights = np.bincount(draw.integers(images, size=images), minlength=images)
        above, below = (table.map50(weights) for table in tables)
        ratios += [above / below] if below > 0 else []
    if not ratios:
        return None
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


class _Ranked:
    """All detections of a matcher by class and confidence, to be counted with weights of their images."""

    def __init__(self, matcher: Matcher) -> None:
        found, classes = np.concatenate(matcher._found), matcher._num_classes
        image = np.repeat(np.arange(len(matcher._found)), [len(one) for one in matcher._found])
        order = np.lexsort((-found["conf"], found["label"]))
        self.right, self._image = (found["right"][order] & 1).astype(float), image[order]
        self._ends = np.searchsorted(found["label"][order], np.arange(classes + 1))
        self._objects = np.stack([np.bincount(labels, minlength=classes) for labels in matcher._labels])

    def map50(self, weights: NDArray[np.int64]) -> float:
        """mAP50 where each image counts as often as its weight says."""
        objects = weights @ self._objects
        weight, precisions = weights[self._image], []
        for number in np.flatnonzero(objects):
            own = slice(self._ends[number], self._ends[number + 1])
            made = weight[own].cumsum()
            hits = (weight[own] * self.right[own]).cumsum()
            precision = np.maximum.accumulate((hits / np.maximum(made, 1))[::-1])[::-1]
            places = np.searchsorted(hits / objects[number], RECALLS)
            precisions.append(np.append(precision, 0.0)[places].mean())
        return float(np.mean(precisions)) if precisions else 0.0


def _rank_in_class(labels: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many of the same class stand before each."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), np.int64)
    starts = np.searchsorted(labels[order], labels[order], side="left")
    ranks[order] = np.arange(len(labels)) - starts
    return ranks


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each pair, ``(D, M)``, of boxes ``(D, 4)`` and ``(M, 4)``."""
    both = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    common = both.clip(min=0).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1) - common
    overlaps: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlaps


def _matched(overlaps: NDArray[np.float64], same: NDArray[np.bool_]) -> list[int]:
    """Bits of each detection, best first: at which IoUs it gets an object of its class.

    At each IoU it gets the object that it overlaps most of those that no better detection has; of equal ones
    the last, as COCO's evaluation does.
    """
    right, free = [0] * len(overlaps), [_ALL] * overlaps.shape[1]
    pairs = np.argwhere(same & (overlaps >= IOUS[0]))
    reached = (1 << np.searchsorted(IOUS, overlaps[tuple(pairs.T)], side="right")) - 1
    order = np.lexsort((-pairs[:, 1], -overlaps[tuple(pairs.T)], pairs[:, 0]))
    for (detection, target), bits in zip(pairs[order].tolist(), reached[order].tolist(), strict=True):
        taken = bits & free[target] & ~right[detection]
        right[detection] |= taken
        free[target] &= ~taken
    return right


def _bits(right: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """At which of the `IOUS` each detection is right, ``(D, 10)``."""
    return (right[:, None] >> np.arange(len(IOUS))) & 1 > 0


def _interpolated(right: NDArray[np.uint16], objects: int) -> NDArray[np.float64]:
    """Precision at each of `IOUS` and `RECALLS` of the detections of a class, best first."""
    table = np.zeros((len(IOUS), len(RECALLS)))
    hits = _bits(right).cumsum(0)
    precision = hits / np.arange(1, len(hits) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # never rises with the recall
    for row, column, of_column in zip(table, hits.T / objects, precision.T, strict=True):
        places = np.searchsorted(column, RECALLS, side="left")
        reached = places < len(column)
        row[reached] = of_column[places[reached]]
    return table


def _by_class(
    found: NDArray[np.void], labels: NDArray[np.int64], objects: NDArray[np.int64], ap: NDArray[np.float64]
) -> ClassAccuracies:
    """Arguments: all detections, best first; class ids of all objects; their number by class; AP by class."""
    made, hits = np.zeros((2, len(objects), len(_CONFS)))
    for number in range(len(objects)):
        own = found[found["label"] == number]
        made[number] = np.searchsorted(-own["conf"], -_CONFS, side="right")
        hits[number] = np.append(0, (own["right"] & 1).cumsum())[made[number].astype(int)]
    f1 = 2 * hits / np.maximum(made + objects[:, None], 1)
    some = objects > 0
    best = len(_CONFS) - 1  # of equal ones the highest
    best -= int(f1[some].mean(0)[::-1].argmax()) if some.any() else 0
    nothing = np.where(some, 0.0, np.nan)
    return ClassAccuracies(
        objects,
        ap[:, 0],
        ap.mean(1),
        float(_CONFS[best]),
        nothing + hits[:, best] / np.maximum(made[:, best], 1),
        nothing + hits[:, best] / np.maximum(objects, 1),
        nothing + f1[:, best],
        _confusion(found[found["conf"] >= _CONFS[best]], labels, len(objects)),
    )


def _confusion(found: NDArray[np.void], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """See `ClassAccuracies`; of detections that overlap one object most, the one that does so most has it."""
    order = np.argsort(-found["overlap"], kind="stable")  # of equal ones the more confident first
    owners, first = np.unique(found["object"][order], return_index=True)
    first = order[first[owners >= 0]]
    detected = np.full(len(labels), num_classes)
    detected[found["object"][first]] = found["label"][first]
    spare = np.delete(found["label"], first)
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(counts, (labels, detected), 1)
    np.add.at(counts[num_classes], spare, 1)
    return counts
