from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sparse_exp.data.images import read_image, read_square
from sparse_exp.data.letterbox import PADDING, letterbox


def upstream(width: int, height: int, side: int) -> tuple[int, int, int, int, int, int]:
    """Size and margins (left, top, right, bottom) after the published rule of YOLOv5 v7.

    The ratio is that of the tighter side, the new size is rounded, and half a pixel of padding goes
    to the right and to the bottom.
    """
    ratio = min(side / height, side / width)
    w, h = max(1, int(round(width * ratio))), max(1, int(round(height * ratio)))  # noqa: RUF046
    dw, dh = (side - w) / 2, (side - h) / 2
    return w, h, round(dw - 0.1), round(dh - 0.1), round(dw + 0.1), round(dh + 0.1)


SIZES = st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 3, 4999, 5000]))


@settings(deadline=None, max_examples=60)
@given(
    width=SIZES, height=SIZES, side=st.sampled_from([64, 96, 320]), shares=st.tuples(*[st.floats(0, 1)] * 4)
)
@example(width=1, height=1, side=640, shares=(0, 1, 0, 1))
@example(width=5000, height=3, side=640, shares=(0.1, 0.2, 0.3, 0.9))
@example(width=3, height=5000, side=640, shares=(0.1, 0.2, 0.3, 0.9))
@example(width=1600, height=1203, side=640, shares=(0.1, 0.2, 0.3, 0.9))
@example(width=641, height=427, side=640, shares=(0.1, 0.2, 0.3, 0.9))
def test_as_upstream_and_there_and_back(
    width: int, height: int, side: int, shares: tuple[float, float, float, float]
) -> None:
    square, mapping = letterbox(np.full((height, width, 3), 200, np.uint8), side)
    w, h, left, top, right, bottom = upstream(width, height, side)
    rows, columns = np.nonzero(square[..., 0] == 200)
    pixels = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert pixels == [left, top, side - right, side - bottom]
    assert len(rows) == w * h
    assert (square[..., 0] == PADDING).sum() == side**2 - w * h
    # The whole image is exactly where its pixels are, and any box comes back to where it was.
    whole = np.array([[0, 0, width, height]], np.float32)
    np.testing.assert_allclose(mapping.boxes(whole)[0], pixels, rtol=1e-6, atol=1e-4)
    x1, x2, y1, y2 = *sorted(shares[:2]), *sorted(shares[2:])
    boxes = np.array([[x1, y1, x2, y2]], np.float32) * whole[:, [2, 3, 2, 3]]
    # float32 has 24 bits; a pixel of the square may be many of the image
    blown_up = max(width, height) / side
    np.testing.assert_allclose(mapping.boxes_back(mapping.boxes(boxes)), boxes, atol=1e-4 * max(1, blown_up))
    inside = mapping.boxes(boxes)
    assert (inside >= np.array(pixels[:2] * 2) - 1e-3).all()
    assert (inside <= np.array(pixels[2:] * 2) + 1e-3).all()


def test_boxes_outside_come_back_clipped() -> None:
    _, mapping = letterbox(np.zeros((720, 1280, 3), np.uint8), 640)
    assert (mapping.scale_x, mapping.scale_y, mapping.left, mapping.top) == (0.5, 0.5, 0, 140)
    outside = np.array([[-10, 0, 700, 640]], np.float32)
    assert mapping.boxes_back(outside).tolist() == [[0, 0, 1280, 720]]


def photo(width: int, height: int) -> Image.Image:
    """Waves of every length in each colour, as a JPEG can hold them."""
    y, x = np.mgrid[:height, :width] / 40.0
    planes = [np.sin(x * y / 9), np.cos(x + y), np.sin(x / 3) * np.cos(y / 2)]
    return Image.fromarray((127 + 100 * np.stack(planes, -1)).astype(np.uint8))


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize(("width", "height"), [(1280, 960), (1279, 957), (640, 480), (700, 90)])
def test_jpegs_scaled_while_decoded_show_the_same(tmp_path: Path, width: int, height: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    photo(width, height).save(tmp_path / "a.jpg", quality=95, exif=exif)
    square, mapping = read_square(tmp_path / "a.jpg", 320)
    whole, wanted = letterbox(read_image(tmp_path / "a.jpg"), 320)
    assert mapping == wanted
    assert mapping.size == ((width, height) if turn == 1 else (height, width))
    grey = (whole == PADDING).all(-1)
    assert (square[grey] == PADDING).mean() > 0.99
    assert np.abs(square.astype(int) - whole).mean() < 2  # grey levels


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    photo(1280, 960).save(tmp_path / "a.png")
    square, _ = read_square(tmp_path / "a.png", 320)
    assert np.array_equal(square, letterbox(read_image(tmp_path / "a.png"), 320)[0])


@pytest.mark.parametrize(
    ("size", "imgsz", "picture", "box"),
    [
        # 1920 x 1080 by a third: 640 x 360, 12 rows of grey above and below; the box 300..600, 150..450
        ((1920, 1080), (384, 640), (0, 12, 640, 372), [100, 62, 200, 162]),
        ((1920, 1080), 640, (0, 140, 640, 500), [100, 190, 200, 290]),
        # 1000 x 500 by 0.384 would be wider than 320: by 0.32, 320 x 160, of 224 more rows the half above
        ((1000, 500), (384, 320), (0, 112, 320, 272), [96, 160, 192, 256]),
        # 600 x 1200 by 0.32: 192 x 384, of 448 more columns the half on the left
        ((600, 1200), (384, 640), (224, 0, 416, 384), [320, 48, 416, 144]),
    ],
)
def test_a_rectangle_by_hand(
    size: tuple[int, int], imgsz: int | tuple[int, int], picture: tuple[int, ...], box: list[float]
) -> None:
    result, mapping = letterbox(np.full((*size[::-1], 3), 200, np.uint8), imgsz)
    assert result.shape == (*((imgsz, imgsz) if isinstance(imgsz, int) else imgsz), 3)
    rows, columns = np.nonzero(result[..., 0] == 200)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == picture
    assert (result[..., 0] == PADDING).sum() == result[..., 0].size - len(rows)
    given = np.array([[300, 150, 600, 450]], np.float32)
    np.testing.assert_allclose(mapping.boxes(given), [box], atol=1e-4)
    np.testing.assert_allclose(mapping.boxes_back(mapping.boxes(given)), given, atol=1e-3)


def test_a_turned_photo_is_decoded_as_large_as_a_rectangle_shows_it(tmp_path: Path) -> None:
    """Of 800 x 600 px as stored, upright 384 x 512 px are shown: half of what is stored would be too few."""
    grain = np.random.default_rng(0).integers(0, 256, (150, 200), np.uint8).repeat(4, 0).repeat(4, 1)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(grain).convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=turned)
    shown, mapping = read_square(tmp_path / "a.jpg", (640, 384))
    wanted, _ = letterbox(read_image(tmp_path / "a.jpg"), (640, 384))
    assert mapping.size == (600, 800)
    assert np.abs(shown.astype(int) - wanted).mean() < 0.5
