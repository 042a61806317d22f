"""COCO mean average precision of anything that predicts boxes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_exp.data.loader import Batch
from sparse_exp.locks import give_way, waited_seconds
from sparse_exp.metrics.detection import RECALLS, ClassAccuracies, Matcher
from sparse_exp.progress import progress
from sparse_exp.training.memory import no_memory_left
from sparse_exp.yolov5 import YOLOv5, non_max_suppression

SMALLER = "Make trainer.val_batch_size or dataset.imgsz smaller"
"""What lets an evaluation need less memory."""
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """How well the boxes of a split were found.

    Attributes:
        map50: COCO mean average precision at IoU 0.5, 0..1.
        map50_95: mean over IoU 0.5, 0.55, ... 0.95, 0..1.
        recall: ``(101,)``: 0, 0.01, ... 1.
        precision: ``(101,)``: interpolated precision at these recalls at IoU 0.5, the mean over the
            classes that occur; its mean is ``map50``.
        images: number of images.
        seconds: wall time, without waiting for benchmarks.
        by_class: the same by class, precision and recall at the best confidence, and the confusion matrix.
        matcher: what all of it was computed from, image by image.
        detections: per image float32 ``(D, 6)``: x1, y1, x2, y2 in pixels, confidence, class id;
            empty unless asked for.
    """

    map50: float
    map50_95: float
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    images: int
    seconds: float
    by_class: ClassAccuracies
    matcher: Matcher
    detections: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Validation:
    """How accuracies on a split are measured: COCO mAP on its letterboxed images.

    Attributes:
        loader: batches in a fixed order; boxes are relative to the side S of the images.
        num_classes: number of classes.
        conf: lowest confidence that counts, 0..1.
        iou: threshold of non-maximum suppression, 0..1.
        max_det: detections that count per image.
    """

    loader: Iterable[Batch]
    num_classes: int
    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300

    def evaluate(
        self, predict: Predict, *, description: str = "Evaluating", keep_detections: bool = False
    ) -> Evaluation:
        """Measure how well the boxes of the split are found.

        Args:
            predict: takes uint8 images ``(N, 3, H, W)``, returns ``(N, A, 5 + num_classes)``: x, y, w, h
                in pixels, objectness, class scores.
            description: of the progress bar.
            keep_detections: return every image's detections.

        Returns:
            The result; mAP is 0 where no image has a box.

        Raises:
            ValueError: predictions are of another shape.
        """
        started = time.monotonic() - waited_seconds()
        matcher, kept, images = Matcher(self.num_classes, self.max_det), list[Tensor](), 0
        total = len(self.loader) if isinstance(self.loader, Sized) else None
        with torch.no_grad(), progress(description, total=total, unit="batches") as bar:
            for batch in self.loader:
                give_way()
                predictions = _checked(predict(batch.images), len(batch.images), self.num_classes)
                found = non_max_suppression(predictions.cpu().numpy(), self.conf, self.iou, self.max_det)
                for detections, (boxes, labels) in zip(found, _objects_of(batch), strict=True):
                    matcher.add(detections, boxes, labels)
                kept += map(torch.from_numpy, found) if keep_detections else []
                images += len(found)
                bar.advance()
        result = matcher.accuracies()
        seconds = time.monotonic() - waited_seconds() - started
        return Evaluation(
            result.map50,
            result.map50_95,
            RECALLS,
            result.precision,
            images,
            seconds,
            result.by_class,
            matcher,
            kept,
        )

    def evaluate_model(
        self,
        model: YOLOv5,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        description: str = "Evaluating",
    ) -> Evaluation:
        """Measure mAP of a torch model, which is in evaluation mode meanwhile and observes no ranges.

        Raises:
            StageFailed: memory ran out.
        """
        was_training, device = model.training, model.anchors.device  # one for deployment has no parameters
        model.eval()

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            output: tuple[Tensor, Any] = model(as_input(images.to(device, non_blocking=True), memory_format))
            return output[0].cpu()

        try:
            with _observing_nothing(model), no_memory_left(description, SMALLER):
                return self.evaluate(predict, description=description)
        finally:
            model.train(was_training)


@contextmanager
def _observing_nothing(model: YOLOv5) -> Iterator[None]:
    """Hold the ranges of torch's quantizers, which SparseML trains with: they observe in evaluation, too."""
    own: list[Any] = [m for m in model.modules() if hasattr(m, "observer_enabled")]
    observing = [quantizer for quantizer in own if quantizer.observer_enabled[0]]
    for quantizer in observing:
        quantizer.disable_observer()
    try:
        yield
    finally:
        for quantizer in observing:
            quantizer.enable_observer()


def as_input(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """uint8 images (N, 3, H, W) as the detector's input: float32 in 0..1."""
    return images.to(memory_format=memory_format).float().div_(255)


def _checked(predictions: Tensor, images: int, num_classes: int) -> Tensor:
    if predictions.ndim != 3 or len(predictions) != images or predictions.shape[-1] != 5 + num_classes:
        wanted, got = (images, "A", 5 + num_classes), tuple(predictions.shape)
        raise ValueError(f"Expected predictions to be of shape {wanted}, but got {got}.")
    return predictions.float()


def _objects_of(batch: Batch) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """For each image its labelled boxes (M, 4), x1, y1, x2, y2 in pixels, and their class ids (M,)."""
    targets, (height, width) = batch.targets.numpy(), batch.images.shape[-2:]
    size = np.array([width, height], np.float32)
    centre, half = targets[:, 2:4] * size, targets[:, 4:6] * (size / 2)
    boxes, labels = np.concatenate([centre - half, centre + half], 1), targets[:, 1].astype(np.int64)
    for position in range(len(batch.images)):
        own = targets[:, 0] == position
        yield boxes[own], labels[own]
