from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sparse_exp.predict.drawing import colour_of, draw, encode

GREY = (128, 128, 128)


def one_box(*row: float) -> np.ndarray:
    return np.array([row], np.float32)


@pytest.mark.parametrize("size", [(640, 480), (3000, 2000)])
def test_the_box_is_where_it_was_found(size):
    x1, y1, x2, y2 = (int(share * side) for share, side in zip((0.2, 0.3, 0.6, 0.8), size * 2, strict=True))
    picture = draw(Image.new("RGB", size, GREY), one_box(x1, y1, x2, y2, 0.5, 1), ("a", "b"))
    assert picture.size == size
    for point in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        assert picture.getpixel(point) == colour_of(1)
    assert picture.getpixel(((x1 + x2) // 2, (y1 + y2) // 2)) == GREY
    assert picture.getpixel((x2 + 20, y2 + 20)) == GREY


def test_small_pictures_are_enlarged():
    picture = draw(Image.new("RGB", (60, 40), GREY), one_box(30, 20, 50, 35, 0.5, 0), ("thing",))
    assert picture.size == (360, 240)
    assert picture.getpixel((180, 160)) == colour_of(0)  # six times (30, ...)
    assert picture.getpixel((240, 160)) == GREY


def test_labels_stay_inside_the_picture():
    """The label of a box in each corner adds pixels of its colour; none of it is lost at the edge."""
    corners = [(0, 0, 30, 30), (370, 0, 399, 30), (0, 370, 30, 399), (370, 370, 399, 399)]
    filled = []
    for corner in [*corners, (150, 150, 180, 180)]:
        picture = draw(Image.new("RGB", (400, 400), GREY), one_box(*corner, 0.5, 0), ("a", "b"))
        filled.append((np.asarray(picture) == colour_of(0)).all(2).sum())
    assert min(filled) > 0.6 * filled[-1]


def test_the_best_is_on_top():
    rows = np.array([[50, 50, 350, 350, 0.9, 0], [50, 50, 350, 350, 0.3, 1]], np.float32)
    picture = draw(Image.new("RGB", (400, 400), GREY), rows, ("a", "b"))
    assert picture.getpixel((50, 200)) == colour_of(0)


def test_colours_differ():
    colours = np.array([colour_of(number) for number in range(16)], float)
    distances = np.abs(colours[:, None] - colours[None]).sum(2) + 1000 * np.eye(16)
    assert distances.min() > 40


def test_a_picture_that_jpeg_cannot_hold():
    assert Image.open(BytesIO(encode(Image.new("RGB", (66_000, 2))))).format == "PNG"
    assert Image.open(BytesIO(encode(Image.new("RGB", (60, 20))))).format == "JPEG"
