"""CPU time and memory of mAP beside the network: `sparse_exp.metrics.detection` against torchmetrics.

Both get the same random detections, 300 an image, as an evaluation at ``conf=0.001`` gives them. torchmetrics
runs with the backend faster-coco-eval. Each is measured in a process of its own.

    python benchmarks/evaluation.py --images 5000
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.metrics.detection import Matcher

_CLASSES, _OBJECTS, _FOUND = 12, 8, 300
Image = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def main() -> int:
    """Measure both, and print a line for each."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=whole, default=5000)
    options: argparse.Namespace = parser.parse_args()
    for work in (_ours, _torchmetrics):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            map50, seconds, megabytes = pool.apply(_measure, (work, options.images))
        print(
            f"{work.__name__[1:]}: mAP50 {map50:.6f}, {seconds:.1f} s of CPU, {megabytes:.0f} MB at its peak"
        )
    return 0


def images_of(count: int) -> Iterator[Image]:
    """Detections, boxes and labels of images: a third of the detections near objects, the rest anywhere."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        corner, size = draw.uniform(0, 500, (_OBJECTS, 2)), draw.uniform(8, 140, (_OBJECTS, 2))
        boxes, labels = np.concatenate([corner, corner + size], 1), draw.integers(0, _CLASSES, _OBJECTS)
        near = boxes[draw.integers(0, _OBJECTS, _FOUND // 3)]
        near = near * draw.normal(1, 0.02, near.shape)
        near = np.sort(near.reshape(-1, 2, 2), 1).reshape(-1, 4)
        corner = draw.uniform(0, 500, (_FOUND - len(near), 2))
        far = np.concatenate([corner, corner + draw.uniform(8, 140, corner.shape)], 1)
        rows = np.column_stack(
            [np.concatenate([near, far]), draw.random(_FOUND) ** 3, draw.integers(0, _CLASSES, _FOUND)]
        )
        yield rows.astype(np.float32), boxes.astype(np.float32), labels


def _measure(work, count: int) -> tuple[float, float, float]:
    """mAP50, seconds of CPU and growth of the highest memory in MB; making the images is not counted."""
    making = time.process_time()
    for _ in images_of(count):
        pass
    making = time.process_time() - making
    work(2)  # what is imported once
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    map50 = work(count)
    seconds = time.process_time() - started - making
    return map50, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _ours(count: int) -> float:
    matcher = Matcher(_CLASSES)
    for image in images_of(count):
        matcher.add(*image)
    return matcher.accuracies().map50


def _torchmetrics(count: int) -> float:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, 300], backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    for found, boxes, labels in images_of(count):
        rows = torch.from_numpy(found)
        predicted = {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}
        metric.update([predicted], [{"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}])
    return float(metric.compute()["map_50"])


if __name__ == "__main__":
    run_command(main)
