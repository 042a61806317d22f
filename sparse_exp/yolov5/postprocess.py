"""Turn predictions into detections: confidence threshold and non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

_MAX_CANDIDATES = 30_000  # per image, as published: only the most confident ones are compared


@torch.no_grad()
def non_max_suppression(
    predictions: Tensor, conf: float, iou: float, max_det: int, *, multi_label: bool = True
) -> list[Tensor]:
    """Keep the best of overlapping boxes, for each class separately.

    Args:
        predictions: (N, A, 5 + nc): xywh in pixels, objectness, class scores in 0..1.
        conf: least confidence of a detection (objectness times class score), exclusive.
        iou: a box that overlaps a better one of its class by more than this is dropped.
        max_det: most detections per image.
        multi_label: a box gives one detection for each class above ``conf``, as published for evaluation.
            Otherwise, and with one class, it gives one for its best class.

    Returns:
        For each image float32 (D, 6), best first: x1, y1, x2, y2 in pixels, confidence, class id.
    """
    multi_label = multi_label and predictions.shape[2] > 6
    return [_detections(p.float(), conf, iou, max_det, multi_label=multi_label) for p in predictions]


def _detections(p: Tensor, conf: float, iou: float, max_det: int, *, multi_label: bool) -> Tensor:
    """The detections (D, 6) of one image from its predictions (A, 5 + nc)."""
    p = p[p[:, 4] > conf]
    scores = p[:, 5:] * p[:, 4:5]
    if multi_label:
        box, label = (scores > conf).nonzero(as_tuple=True)
    else:
        label = scores.argmax(1)
        box = torch.arange(len(p), device=p.device)[scores.amax(1) > conf]
        label = label[box]
    score = scores[box, label]
    best = score.argsort(descending=True, stable=True)[:_MAX_CANDIDATES]
    box, label, score = box[best], label[best], score[best]
    corners = box_convert(p[box, :4], "cxcywh", "xyxy")
    kept = batched_nms(corners, score, label, iou)[:max_det]
    return torch.cat([corners, score[:, None], label[:, None].float()], 1)[kept]
