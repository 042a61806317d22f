"""How far two computations of one network are apart: in raw predictions, and in detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

CONFIDENT = 0.1  # objectness from which a prediction's box means something
DETECTED = 0.25  # confidence from which a detection must be found again
SAME_IOU, SAME_CONFIDENCE = 0.9, 0.1


class Differences:
    """Mean and largest absolute difference of predictions, batch after batch.

    Compared are those predictions to which either side gives an objectness of at least 0.1: thousands of
    others are near 0 in both and would hide a difference. Where there is none, the scores of all are.
    """

    def __init__(self) -> None:
        self._scores, self._boxes, self._others = _Spread(), _Spread(), _Spread()

    def update(self, predictions: Tensor, reference: Tensor) -> None:
        """Take in one batch, float32 (N, A, 5 + nc) each: xywh in pixels, objectness, class scores."""
        confident = ~(torch.maximum(predictions[..., 4], reference[..., 4]) < CONFIDENT)  # NaN is not below
        difference = (predictions - reference).abs()
        self._boxes.update(difference[confident][:, :4])
        self._scores.update(difference[confident][:, 4:])
        self._others.update(difference[~confident][:, 4:])

    def result(self) -> dict[str, float]:
        """``score_mean``, ``score_max`` (0..1), ``box_mean_px`` and ``box_max_px``; boxes 0 if none."""
        scores = self._scores if self._scores.count else self._others
        return {
            "score_mean": scores.mean,
            "score_max": scores.largest,
            "box_mean_px": self._boxes.mean,
            "box_max_px": self._boxes.largest,
        }


class _Spread:
    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        if values.numel():
            self.count += values.numel()
            self.total += float(values.sum(dtype=torch.float64))
            # A NaN stays: it is larger than any tolerance.
            self.largest = float(torch.maximum(values.max().double(), torch.tensor(self.largest)))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def matched_shares(found: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """How many detections of one side are the other's too, in both directions.

    Counted are detections of confidence 0.25 and more. One is found again where the other side has, with
    any confidence, a detection of its class with an IoU of at least 0.9 whose confidence differs by at
    most 0.1. Each of the other side's is given away once, to the most confident first.

    Args:
        found: per image (D, 6): x1, y1, x2, y2 in pixels, confidence, class id; best first.
        reference: the same of torch.

    Returns:
        ``matched_of_torch``: share of torch's detections that were found, 0..1; ``matched_of_engine``: share
        of those found that are torch's. 1 where there is none to look for.
    """
    return {
        "matched_of_torch": _share_found_again(reference, found),
        "matched_of_engine": _share_found_again(found, reference),
    }


def _share_found_again(wanted: Sequence[Tensor], offered: Sequence[Tensor]) -> float:
    pairs = [(w[w[:, 4] >= DETECTED], o) for w, o in zip(wanted, offered, strict=True)]
    total = sum(len(w) for w, _ in pairs)
    return sum(_found_again(w, o) for w, o in pairs) / total if total else 1.0


def _found_again(wanted: Tensor, offered: Tensor) -> int:
    iou = box_iou(wanted[:, :4], offered[:, :4])
    near = (wanted[:, None, 4] - offered[None, :, 4]).abs() <= SAME_CONFIDENCE
    same = wanted[:, None, 5] == offered[None, :, 5]
    iou = torch.where(near & same & (iou >= SAME_IOU), iou, torch.zeros(()))
    found = 0
    for row in range(len(wanted) if len(offered) else 0):
        best = int(iou[row].argmax())
        if iou[row, best] > 0:
            found += 1
            iou[:, best] = 0
    return found
