"""Recall of long thin objects beside squares of the same area, with published anchors and with fitted ones.

Renders two sets of bright bars on noise: bars about twenty times as long as they are wide, upright and lying,
and squares. No published anchor answers for most of the thin ones. Trains each set from the same start with
``model.anchors=auto``, and the thin one with ``model.anchors=start`` too.

    python benchmarks/thin.py                          # 10 epochs of 160 images at 160 px, YOLOv5s
    python benchmarks/thin.py --epochs 20 model=yolov5n model.weights=scratch
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from series import log_of, make_run, parse

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.data import load_dataset
from sparse_exp.data.detection import box_sides
from sparse_exp.data.loader import make_loader
from sparse_exp.data.writing import write_once, write_sample, write_yaml
from sparse_exp.errors import StageFailed
from sparse_exp.metrics.anchors import best_possible_recall
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.training.evaluation import Evaluation, Validation
from sparse_exp.yolov5.model import STRIDES

VERSION = "1"
_LENGTHS, _WIDTHS = (122, 136), (6.0, 7.2)  # px of thin objects, at 160 px
_ANCHOR_T = 4.0  # trainer.loss.anchor_t
_TRIALS = (("square", "auto"), ("thin", "auto"), ("thin", "start"))


def main() -> int:
    """Train, and print a table."""
    options, overrides = _options()
    rows = []
    for kind, anchors in _TRIALS:
        data = render(options.out / f"{kind}-data", kind, options.train, options.val)
        directory = options.out / f"{kind}-{anchors}"
        words = [
            *(f"dataset.path={data}", f"dataset.name={kind}", "dataset=custom", "dataset.imgsz=160"),
            *("model=yolov5s", "recipe=dense", f"recipe.variables.num_epochs={options.epochs}"),
            *("trainer.batch_size=8", f"trainer.val_every={options.epochs}", f"model.anchors={anchors}"),
            *("recovery.baseline=none", "stages=[fetch,plan,train,evaluate]", "tracker=none"),
            *overrides,
        ]
        if make_run(directory, words):
            raise StageFailed(f"A run has failed. Its log: {log_of(directory)}")
        possible, found = measure(directory / "weights" / "last.pt", data)
        numbers = possible, float(found.by_class.recall[0]), float(found.by_class.precision[0]), found.map50
        rows.append(f"| {kind} | {anchors} | {' | '.join(f'{number:.3f}' for number in numbers)} |\n")
    head = "| objects | `model.anchors` | best possible recall | recall | precision | mAP50 |\n"
    sys.stdout.write(f"{head}|---|---|---:|---:|---:|---:|\n{''.join(rows)}")
    return 0


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=whole, default=160, help="training images")
    parser.add_argument("--val", type=whole, default=60, help="validation images")
    parser.add_argument("--epochs", type=whole, default=10)
    parser.add_argument("--out", type=Path, default=Path("outputs/thin"), help="folder of data and runs")
    return parse(parser)


def render(destination: Path, kind: str, train: int, val: int) -> Path:
    """Render a set unless it is there; returns its ``data.yaml``.

    Args:
        destination: folder of the set.
        kind: ``thin`` or ``square``.
        train: training images.
        val: validation images.
    """
    counts = {"train": train, "val": val}

    def build(folder: Path) -> None:
        for number, (split, count) in enumerate(counts.items()):
            draw = np.random.default_rng((0, number))
            for index in range(count):
                write_sample(folder, split, f"{index:04}", *paint(kind, draw))
        write_yaml(folder, [kind], list(counts))

    return write_once(destination.absolute(), f"{VERSION} {kind} {counts}", build)


def paint(kind: str, draw: np.random.Generator) -> tuple[NDArray[np.uint8], list[tuple[float, ...]]]:
    """One to three objects that do not overlap on noise.

    Returns:
        uint8 RGB ``(160, 160, 3)``, and rows of class id, x1, y1, x2, y2 in pixels.
    """
    canvas = draw.uniform(0, 90, (160, 160, 3))
    taken, boxes = np.zeros((160, 160), bool), list[tuple[float, ...]]()
    for _ in range(draw.integers(1, 4)):
        length, width = draw.uniform(*_LENGTHS), draw.uniform(*_WIDTHS)
        if kind == "square":
            length = width = math.sqrt(length * width)
        sides = (round(length), round(width))
        h, w = sides if draw.random() < 0.5 else sides[::-1]
        y, x = draw.integers(0, 160 - h), draw.integers(0, 160 - w)
        around = slice(max(0, y - 3), y + h + 3), slice(max(0, x - 3), x + w + 3)
        if taken[around].any():
            continue
        taken[y : y + h, x : x + w] = True
        canvas[y : y + h, x : x + w] = draw.uniform(130, 255, 3)
        boxes.append((0.0, float(x), float(y), float(x + w), float(y + h)))
    return canvas.astype(np.uint8), boxes


def measure(checkpoint: Path, data: Path) -> tuple[float, Evaluation]:
    """The best possible recall of a checkpoint's anchors on the training boxes, and its accuracies."""
    model, _ = restore(checkpoint)
    splits = load_dataset(data).splits
    anchors = model.anchors.numpy() * np.array(STRIDES).reshape(-1, 1, 1)
    loader = make_loader(splits["val"], 1, imgsz=160, batch_size=8, train=False)
    found = Validation(loader, 1).evaluate_model(model.eval())
    return best_possible_recall(box_sides(splits["train"], 160), anchors, _ANCHOR_T), found


if __name__ == "__main__":
    run_command(main)
