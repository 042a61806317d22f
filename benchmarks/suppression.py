"""Compare our non-maximum suppression, in NumPy, with torch and torchvision on the same predictions.

The predictions are those of a detector with 80 classes at 640 px, (25200, 85), made up of objects that many
boxes surround, as those of a trained network are; or with ``--model`` those of an ONNX file for images. Both
sides run one thread in this process, in turns; the least CPU time of each counts. They must keep equal boxes.

    python benchmarks/suppression.py
    python benchmarks/suppression.py --model model.onnx photo.jpg other.jpg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms, box_convert

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.predict.detector import Detector, find_model
from sparse_exp.yolov5 import non_max_suppression

Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

_ANCHORS, _SIDE = 25200, 640
_BOXES = 12  # around each object
_SETTINGS = {
    "predict": {"conf": 0.25, "iou": 0.45, "max_det": 300, "multi_label": False},
    "evaluation": {"conf": 0.001, "iou": 0.6, "max_det": 300, "multi_label": True},
}


def main() -> int:
    """Print a table."""
    options = _options()
    torch.set_num_threads(1)
    print("| predictions | setting | candidates | kept | torchvision, ms | ours, ms |")
    print("|---|---|--:|--:|--:|--:|")
    for name, predictions in _of_model(options) if options.model else _made_up():
        for setting, chosen in _SETTINGS.items():
            print(_row(name, setting, predictions, chosen, options.rounds), flush=True)
    return 0


def _row(
    name: str, setting: str, predictions: NDArray[np.float32], chosen: dict[str, Any], rounds: int
) -> str:
    tensor = torch.from_numpy(predictions)
    sides = {
        "torchvision": lambda: by_torchvision(tensor, **chosen).numpy(),
        "ours": lambda: non_max_suppression(predictions[None], **chosen)[0],
    }
    found = {side: suppress() for side, suppress in sides.items()}
    if not np.array_equal(found["torchvision"], found["ours"]):
        print(f"{name}, {setting}: the boxes differ")
    least = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for side, suppress in sides.items():
            least[side] = min(least[side], _cpu_ms(suppress))
    scores = predictions[:, 4:5] * predictions[:, 5:]
    above = scores > chosen["conf"]
    candidates = above.sum() if chosen["multi_label"] else above.any(1).sum()
    numbers = [candidates, len(found["ours"]), *(f"{milliseconds:.2f}" for milliseconds in least.values())]
    return f"| {' | '.join([name, setting, *map(str, numbers)])} |"


def _cpu_ms(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return 1e3 * (time.process_time() - start)


def by_torchvision(
    p: torch.Tensor,
    conf: float,
    iou: float,
    max_det: int,
    *,
    multi_label: bool,
    suppress: Suppress = batched_nms,
) -> torch.Tensor:
    """One image's detections by torch and torchvision alone, as published for YOLOv5; the tests use it too.

    Args:
        p: predictions (A, 5 + nc).
        conf: as of `sparse_exp.yolov5.non_max_suppression`.
        iou: likewise.
        max_det: likewise.
        multi_label: likewise.
        suppress: given boxes (n, 4), scores (n,), classes (n,) and ``iou``, gives the indices of those kept.

    Returns:
        Float tensor (n, 6): corners in pixels, confidence, class.
    """
    p = p[p[:, 4] > conf]
    scores = p[:, 5:] * p[:, 4:5]
    if multi_label and scores.shape[1] > 1:
        box, label = (scores > conf).nonzero(as_tuple=True)
    else:
        best, label = scores.max(1)
        box = (best > conf).nonzero()[:, 0]
        label = label[box]
    score = scores[box, label]
    order = score.argsort(descending=True, stable=True)[:30_000]
    box, label, score = box[order], label[order], score[order]
    corners = box_convert(p[box, :4], "cxcywh", "xyxy")
    kept = suppress(corners, score, label, iou)[:max_det]
    return torch.cat([corners, score[:, None], label[:, None].float()], 1)[kept]


def _made_up() -> Iterator[tuple[str, NDArray[np.float32]]]:
    for objects, classes in ((5, 80), (20, 80), (100, 80), (60, 1)):
        yield f"{objects} objects, {classes} classes", _scene(objects, classes)


def _scene(objects: int, classes: int) -> NDArray[np.float32]:
    """Predictions (25200, 5 + classes): boxes close around each object, and little confidence elsewhere."""
    random = np.random.default_rng(objects)
    p = random.uniform(0, 1, (_ANCHORS, 5 + classes)).astype(np.float32)
    p[:, :4] *= [_SIDE, _SIDE, 200, 200]
    p[:, 4] **= 40
    p[:, 4] *= 0.2
    p[:, 5:] *= 0.01
    for rows in random.permutation(_ANCHORS)[: objects * _BOXES].reshape(objects, _BOXES):
        centre, size = random.uniform(20, _SIDE - 20, 2), random.uniform(15, 150, 2)
        p[rows, :2] = centre + 0.08 * size * random.normal(0, 1, (_BOXES, 2))
        p[rows, 2:4] = size * np.exp(random.normal(0, 0.1, (_BOXES, 2)))
        p[rows, 4] = random.uniform(0.3, 0.95, _BOXES)
        p[rows, 5 + random.integers(classes)] = random.uniform(0.5, 1, _BOXES)
    return p


def _of_model(options: argparse.Namespace) -> Iterator[tuple[str, NDArray[np.float32]]]:
    with closing(Detector(find_model(options.model, engine="onnxruntime"), cores=1)) as detector:
        for path in options.images:
            square, _ = detector.prepare(path)
            yield path.name, detector.infer([square])[0]


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an ONNX file that this project exported")
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--rounds", type=whole, default=200, help="measurements of each (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
