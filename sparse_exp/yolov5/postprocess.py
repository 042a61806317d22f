"""Turn predictions into detections: confidence threshold and non-maximum suppression, in NumPy.

Evaluation, ``predict``, ``serve`` and `sparse_exp.load` call this one function. It needs no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_CANDIDATES = 30_000  # per image, as published: only the most confident ones are compared


def non_max_suppression(
    predictions: NDArray[np.float32], conf: float, iou: float, max_det: int, *, multi_label: bool = True
) -> list[NDArray[np.float32]]:
    """Keep the best of overlapping boxes, for each class separately.

    The boxes and their order are those that torchvision's ``nms`` keeps of each class: of equal scores the
    earlier one counts as better.

    Args:
        predictions: float32 (N, A, 5 + nc): xywh in pixels, objectness, class scores in 0..1.
        conf: least confidence of a detection (objectness times class score), exclusive.
        iou: a box that overlaps a better one of its class by more than this is dropped.
        max_det: most detections per image.
        multi_label: a box gives one detection for each class above ``conf``, as published for evaluation.
            Otherwise, and with one class, it gives one for its best class.

    Returns:
        For each image float32 (D, 6), best first: x1, y1, x2, y2 in pixels, confidence, class id.
    """
    multi_label = multi_label and predictions.shape[2] > 6
    return [_detections(p, np.float32(conf), iou, max_det, multi_label=multi_label) for p in predictions]


def _detections(
    p: NDArray[np.float32], conf: np.float32, iou: float, max_det: int, *, multi_label: bool
) -> NDArray[np.float32]:
    """The detections (D, 6) of one image from its predictions (A, 5 + nc)."""
    p = p[p[:, 4] > conf]
    scores = p[:, 5:] * p[:, 4:5]
    if multi_label:
        box, label = np.nonzero(scores > conf)
    else:
        label = scores.argmax(1)
        box = np.flatnonzero(scores[np.arange(len(p)), label] > conf)
        label = label[box]
    score = scores[box, label]
    best = np.argsort(-score, kind="stable")[:_MAX_CANDIDATES]
    box, label, score = box[best], label[best], score[best]
    half = p[box, 2:4] * np.float32(0.5)
    corners = np.concatenate([p[box, :2] - half, p[box, :2] + half], 1)
    kept = _kept(corners, label, iou, max_det)
    detections: NDArray[np.float32] = np.column_stack([corners, score, label.astype(np.float32)])[kept]
    return detections


def _kept(corners: NDArray[np.float32], label: NDArray[np.intp], iou: float, max_det: int) -> list[int]:
    """Positions of the boxes that no better box of their class suppresses, at most ``max_det``.

    Args:
        corners: (M, 4): x1, y1, x2, y2, best box first.
        label: (M,): class ids.
        iou: see `non_max_suppression`.
        max_det: likewise.
    """
    by_class = np.argsort(label, kind="stable")  # a class's boxes side by side, its best one first
    place = np.argsort(by_class)
    end = np.searchsorted(label[by_class], label, side="right")  # of the box's class
    low, high = np.split(corners[by_class].T.copy(), 2)
    area = np.multiply(*(high - low))
    most, alive, kept = _largest_not_above(iou), np.ones(len(label), bool), list[int]()
    with np.errstate(invalid="ignore", over="ignore"):  # two boxes without area overlap by 0/0
        for number, (i, stop) in enumerate(zip(place.tolist(), end.tolist(), strict=True)):
            if not alive[i]:
                continue
            kept.append(number)
            if len(kept) == max_det:
                break
            rest = slice(i + 1, stop)
            both = np.minimum(high[:, rest], high[:, i : i + 1]) - np.maximum(low[:, rest], low[:, i : i + 1])
            common = np.multiply(*np.maximum(both, 0, out=both))
            alive[rest] &= ~(common / (area[rest] + area[i] - common) > most)
    return kept


def _largest_not_above(threshold: float) -> np.float32:
    """The largest float32 that is not above a float64: no float32 lies between the two.

    Comparing with it decides as comparing with the float64 does, in half the time. Rounding would not: 0.6
    is less than the float32 next to it, which is the overlap of many pairs of boxes.
    """
    nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.float32(np.nextafter(nearest, np.float32(-np.inf)))
