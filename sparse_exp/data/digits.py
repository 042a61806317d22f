"""Handwritten digits on noise: a detection data set for tests, made in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.data.writing import write_once, write_sample, write_yaml

VERSION = "1"
_TRIES = 50  # to find a free place for a digit


def materialize(
    destination: Path, *, imgsz: Imgsz = 96, train: int = 24, val: int = 8, test: int = 8, seed: int = 0
) -> Path:
    """Write the data set in Ultralytics' format; the same bytes every time.

    Each image shows up to five of scikit-learn's 8x8 digits, enlarged two to four times, in random
    light colours on dark noise. Digits do not overlap, and no digit is in two splits.

    Args:
        destination: directory of the data set.
        imgsz: size of the images, at least 64 px each way.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        seed: of all randomness.

    Returns:
        Path of its ``data.yaml``.
    """
    counts = {"train": train, "val": val, "test": test}
    version = f"{VERSION} {imgsz} {counts} {seed}"
    return write_once(destination, version, lambda folder: _build(folder, imgsz, counts, seed))


def _build(folder: Path, imgsz: Imgsz, counts: dict[str, int], seed: int) -> None:
    from sklearn.datasets import load_digits  # slow to import, and no other data set needs it

    bunch = load_digits()
    glyphs, classes = bunch.images / 16.0, bunch.target
    for number, (split, count) in enumerate(counts.items()):
        draw = np.random.default_rng((seed, number))
        choice = np.arange(len(glyphs))[number :: len(counts)]
        for index in range(count):
            image, boxes = _paint(imgsz, glyphs, classes, choice, draw)
            write_sample(folder, split, f"{index:03}", image, boxes)
    write_yaml(folder, [str(digit) for digit in range(10)], [name for name, count in counts.items() if count])


def _paint(
    imgsz: Imgsz,
    glyphs: NDArray[np.float64],
    classes: NDArray[np.int64],
    choice: NDArray[np.int64],
    draw: np.random.Generator,
) -> tuple[NDArray[np.uint8], list[tuple[float, ...]]]:
    """An image of two to five of the glyphs (fewer where there is no room), and its boxes.

    Args:
        imgsz: size of the image.
        glyphs: ``(G, 8, 8)`` in 0..1.
        classes: ``(G,)``: the digit of each.
        choice: indices of the glyphs that may be taken.
        draw: source of all randomness.

    Returns:
        uint8 RGB ``(H, W, 3)``, and rows of class id, x1, y1, x2, y2 in pixels.
    """
    canvas = draw.uniform(0, 70, (*sides(imgsz), 3))
    boxes: list[tuple[float, ...]] = []
    taken = np.zeros(sides(imgsz), bool)
    for pick in draw.choice(choice, draw.integers(2, 6), replace=False):
        ink = _enlarge(glyphs[pick], int(draw.integers(2, 5)))
        place = _free_place(taken, ink.shape, draw)
        if place is None:
            continue
        x, y = place
        h, w = ink.shape
        spot = canvas[y : y + h, x : x + w]
        spot += ink[..., None] * (draw.uniform(150, 255, 3) - spot)
        taken[y : y + h, x : x + w] = True
        boxes.append((float(classes[pick]), x, y, x + w, y + h))
    return canvas.astype(np.uint8), boxes


def _enlarge(glyph: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """The digit without its empty margin, each pixel ``times`` as wide and as high."""
    rows, columns = np.nonzero(glyph > 0.1)
    tight = glyph[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return tight.repeat(times, 0).repeat(times, 1)


def _free_place(
    taken: NDArray[np.bool_], shape: tuple[int, ...], draw: np.random.Generator
) -> tuple[int, int] | None:
    """A random x, y where a shape covers nothing that is taken; None if several tries find none."""
    for _ in range(_TRIES):
        y, x = (int(draw.integers(0, side - size)) for side, size in zip(taken.shape, shape, strict=True))
        if not taken[y : y + shape[0], x : x + shape[1]].any():
            return x, y
    return None
