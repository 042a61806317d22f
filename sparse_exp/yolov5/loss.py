"""The YOLOv5 loss: CIoU of boxes, objectness weighted per level, class scores; as published for v6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import one_hot
from torchvision.ops import box_convert, complete_box_iou_loss

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.config.schema import LossConfig
from sparse_exp.distributed.collectives import batch_mean, total_of

_BALANCE = (4.0, 1.0, 0.4)  # of objectness, at strides 8, 16, 32
_SMALLEST_SIDE = 1e-4  # cells; keeps the CIoU's gradient finite


class Matches(NamedTuple):
    """The K predictions of one level that are trained to find an object.

    Attributes:
        cells: int64 (K, 4): image, anchor, row, column.
        boxes: float (K, 4): xywh in cells; the centre relative to the cell's corner, -0.5 to 1.5.
        classes: int64 (K,).
    """

    cells: Tensor
    boxes: Tensor
    classes: Tensor


def match(targets: Tensor, anchors: Tensor, size: tuple[int, int], anchor_t: float) -> Matches:
    """Match each object with anchors and cells of one level.

    An anchor matches if both its sides differ from the object's by less than a factor of ``anchor_t``.
    The cell that holds the object's centre matches, and so do the two neighbours nearest to the centre (less
    than half a cell away) if they lie inside the map.

    Args:
        targets: float (M, 6): image, class, xywh in 0..1.
        anchors: float (3, 2): width and height in cells.
        size: (ny, nx) of the map, in cells.
        anchor_t: largest ratio of sides, exclusive.
    """
    ny, nx = size
    scale = targets.new_tensor([nx, ny])
    sides = targets[:, 4:] * scale
    ratio = sides[None] / anchors[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t
    anchor, target = fits.nonzero(as_tuple=True)
    centre = targets[target, 2:4] * scale
    row, offset = _matching_cells(centre, scale)
    cell = (centre[row] - offset).long()
    limits = cell.new_tensor([nx - 1, ny - 1])
    cell = torch.minimum(cell.clamp(min=0), limits)
    image, label = targets[target[row], :2].long().unbind(1)
    cells = torch.stack([image, anchor[row], cell[:, 1], cell[:, 0]], 1)
    return Matches(cells, torch.cat([centre[row] - cell, sides[target[row]]], 1), label)


def _matching_cells(centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """For each matching cell, the index of its centre (K,) and the offset that leads to the cell (K, 2)."""
    from_left, from_right = centre, scale - centre
    near_left = (from_left % 1 < 0.5) & (from_left > 1)
    near_right = (from_right % 1 < 0.5) & (from_right > 1)
    here = torch.ones_like(near_left[:, :1])
    which, row = torch.cat([here, near_left, near_right], 1).T.nonzero(as_tuple=True)
    offsets = centre.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    return row, offsets[which]


class DetectionLoss:
    """The loss of raw predictions against targets.

    Args:
        anchors: (3, 3, 2): level, anchor, width and height in units of the level's stride.
        num_classes: number of classes of the head; with one, there is no class loss.
        gains: weights of the three parts for a 640 px image and 80 classes. They are scaled to ``imgsz`` and
            ``num_classes``.
        imgsz: size of the images.
    """

    def __init__(self, anchors: Tensor, num_classes: int, gains: LossConfig, imgsz: Imgsz) -> None:
        self._anchors = anchors.detach().float()
        self._anchor_t = gains.anchor_t
        per_level = 3 / len(anchors)
        self._gains = {
            "box": gains.box * per_level,
            "obj": gains.obj * per_level * math.prod(side / 640 for side in sides(imgsz)),
            "cls": gains.cls * per_level * num_classes / 80,
        }

    def __call__(self, raw: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, in float32 whatever the precision of ``raw``.

        Where several processes train together, each passes its share of the batch; N may be 0 then. The
        results of all processes add up to the loss of the whole batch.

        Args:
            raw: three maps (N, 3, ny, nx, 5 + nc) of `YOLOv5` in training mode.
            targets: float (M, 6): image index in the batch, class id, xywh in 0..1; M may be 0.

        Returns:
            The scalar to run backward from, which is the mean loss times N, as published; and the weighted
            means of its parts "box", "obj" and "cls", detached.
        """
        with torch.autocast(raw[0].device.type, enabled=False):
            targets = targets.to(raw[0].device, torch.float32)
            anchors = self._anchors.to(raw[0].device)
            matches = [
                match(targets, own, (r.shape[2], r.shape[3]), self._anchor_t)
                for own, r in zip(anchors, raw, strict=True)
            ]
            images, *counts = total_of([len(raw[0]), *(len(m.classes) for m in matches)])
            levels = [
                self._level(level, r.float(), matches[level], counts[level], images)
                for level, r in enumerate(raw)
            ]
        sums = torch.stack(levels).sum(0)
        parts = {name: value * gain for value, (name, gain) in zip(sums, self._gains.items(), strict=True)}
        total = torch.stack(list(parts.values())).sum() * images
        return total, {name: value.detach() for name, value in parts.items()}

    def _level(self, level: int, raw: Tensor, matches: Matches, count: float, images: float) -> Tensor:
        """Box, objectness and class loss of one level, (3,).

        Args:
            level: index of the level.
            raw: its map.
            matches: of this process's share of the batch.
            count: number of matches in all processes.
            images: number of images in all processes.
        """
        anchors = self._anchors[level].to(raw.device)
        image, anchor, row, column = matches.cells.unbind(1)
        predicted = raw[image, anchor, row, column]
        wanted = torch.zeros_like(raw[..., 4])
        box = classes = raw.new_zeros(())
        if len(predicted):
            distance = ciou_loss(decode_cells(predicted[:, :4], anchors[anchor]), matches.boxes)
            box = distance.sum() / count
            wanted = _best_iou(wanted, matches.cells, 1 - distance.detach())
            logits = predicted[:, 5:]
            if logits.shape[1] > 1:
                labels = one_hot(matches.classes, logits.shape[1]).to(logits.dtype)
                classes = batch_mean(bce(logits, labels, reduction="none"), count)
        objectness = batch_mean(bce(raw[..., 4], wanted, reduction="none"), images)
        return torch.stack([box, objectness * _BALANCE[level], classes])


def decode_cells(raw: Tensor, anchors: Tensor) -> Tensor:
    """Raw boxes (K, 4) to xywh in cells, the centre relative to the cell's corner.

    Args:
        raw: x, y, w and h as the head gives them.
        anchors: (K, 2) width and height of their anchors, in cells.
    """
    unit = raw.sigmoid() * 2
    return torch.cat([unit[:, :2] - 0.5, unit[:, 2:] ** 2 * anchors], 1)


def ciou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """One minus the complete IoU (https://arxiv.org/abs/1911.08287) of each pair of xywh boxes.

    Args:
        predicted: (K, 4).
        wanted: (K, 4).

    Returns:
        (K,).
    """
    predicted = torch.cat([predicted[:, :2], predicted[:, 2:].clamp(min=_SMALLEST_SIDE)], 1)
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, wanted))
    return cast(Tensor, complete_box_iou_loss(*corners))


def _best_iou(wanted: Tensor, cells: Tensor, iou: Tensor) -> Tensor:
    """Objectness targets: the IoU of each matched prediction, and 0 for all others.

    Where several objects match one cell and anchor, the best IoU counts. The published code keeps any one of
    them, which would make equal runs differ.
    """
    _, anchors, ny, nx = wanted.shape
    image, anchor, row, column = cells.unbind(1)
    index = ((image * anchors + anchor) * ny + row) * nx + column
    return wanted.view(-1).scatter_reduce(0, index, iou.clamp(min=0), "amax").view_as(wanted)
