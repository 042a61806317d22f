"""Tree crowns in aerial photos of the National Ecological Observatory Network (NEON).

The photos and their boxes are inside the ``deepforest`` wheel. The two Yellowstone photos differ so
much in colour that a detector trained on one fails on the other, so each is split inside: training
tiles come from its left part, validation tiles from its right part, with a strip between that
belongs to neither. The photos of two other sites, in Florida and California, are the
out-of-domain ``test`` split.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.data.voc import read_annotation
from sparse_exp.data.writing import write_once, write_sample, write_yaml
from sparse_exp.errors import DataError
from sparse_exp.progress import progress

VERSION = "1"
TILE = 320  # px
TRAIN_STRIDE = 200  # px at most; overlapping tiles show a tree at several places
GAP = 40  # px between training and validation, about one crown
_MIN_VISIBLE = 0.4  # share of a box's area that a tile must show
_MIN_SIDE = 4  # px
_FOLDER = "deepforest/data/"
_ATTRIBUTION = """\
Tree crowns in aerial photos, cut into tiles by sparse_exp.

Photos: National Ecological Observatory Network (NEON), high-resolution orthorectified camera
imagery (DP3.30010.001), sites YELL, OSBS and SOAP. NEON is operated by Battelle under a cooperative
agreement with the U.S. National Science Foundation. https://data.neonscience.org/data-policy

Boxes: from the DeepForest package by Ben Weinstein and others, MIT licence, see LICENSE-deepforest.
https://github.com/weecology/DeepForest

Changes: tiles of 320 px; boxes clipped to their tile; every kind of tree has become class "tree".
"""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photo:
    """A photo of the package that is split inside.

    Attributes:
        stem: file name of the PNG and its XML.
        train_share: share of the width, from the left, that training tiles are cut from.
    """

    stem: str
    train_share: float


PHOTOS = (
    Photo("2019_YELL_2_528000_4978000_image_crop2", 0.72),
    Photo("2019_YELL_2_541000_4977000_image_crop", 0.70),
)
TEST_PHOTOS = ("OSBS_029", "SOAP_061")


def materialize(archive: Path, destination: Path) -> Path:
    """Cut the photos into tiles in Ultralytics' format; the same bytes every time.

    Training tiles lie at most 200 px apart, so they overlap; those without a tree are left out.
    Validation tiles cover the right part with as little overlap as its size allows. The test photos
    stay whole. It is done only if it has not been done before.

    Args:
        archive: the deepforest wheel.
        destination: directory of the data set.

    Returns:
        Path of its ``data.yaml``.

    Raises:
        DataError: the archive is no such wheel.
    """
    return write_once(destination, VERSION, lambda folder: _build(archive, folder))


def _build(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as wheel, progress("Cutting tiles", unit="photos") as bar:
            for photo in PHOTOS:
                _write_tiles(wheel, photo, folder)
                bar.advance()
            for stem in TEST_PHOTOS:
                boxes = [(0.0, *box) for box in _read_boxes(wheel, stem)]
                write_sample(folder, "test", stem, _read_png(wheel, stem), boxes)
                bar.advance()
            licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
            (folder / "LICENSE-deepforest").write_bytes(wheel.read(licence))
    except (zipfile.BadZipFile, KeyError, StopIteration, ValueError) as error:
        do = "Give the deepforest wheel that conf/dataset/trees.yaml names."
        raise DataError(f"Cannot read photos and boxes from {archive}: {error}. {do}") from error
    (folder / "ATTRIBUTION.txt").write_text(_ATTRIBUTION, encoding="utf-8")
    write_yaml(folder, ["tree"], ["train", "val", "test"])


def _read_boxes(wheel: zipfile.ZipFile, stem: str) -> list[Box]:
    """Boxes of all trees, of whatever kind: x1, y1, x2, y2 in pixels, which count from 0 here."""
    return [item.box for item in read_annotation(wheel.read(f"{_FOLDER}{stem}.xml")).objects]


def _read_png(wheel: zipfile.ZipFile, stem: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(wheel.read(f"{_FOLDER}{stem}.png"))).convert("RGB"))


def _write_tiles(wheel: zipfile.ZipFile, photo: Photo, folder: Path) -> None:
    image = _read_png(wheel, photo.stem)
    boxes = _read_boxes(wheel, photo.stem)
    for split, x, y in tile_corners(image.shape[1], image.shape[0], photo.train_share):
        visible = clip_boxes(boxes, x, y)
        if visible or split != "train":
            tile = image[y : y + TILE, x : x + TILE]
            write_sample(folder, split, f"{photo.stem}_{x:04}_{y:04}", tile, [(0.0, *box) for box in visible])


def tile_corners(width: int, height: int, train_share: float) -> Iterator[tuple[str, int, int]]:
    """Where a photo is cut.

    Args:
        width: of the photo, px.
        height: of the photo, px.
        train_share: see `Photo`.

    Yields:
        The split and the left and top edge of a tile, px. Between the rightmost column of a
        training tile and the leftmost of a validation tile lie at least `GAP` px.
    """
    border = int(width * train_share)
    for split, low, high, stride in (
        ("train", 0, border, TRAIN_STRIDE),
        ("val", border + GAP, width, TILE),
    ):
        for x in _starts(low, high, stride):
            for y in _starts(0, height, stride):
                yield split, x, y


def _starts(low: int, high: int, stride: int) -> Sequence[int]:
    """Evenly spaced starts of tiles that cover ``low`` to ``high``, at most ``stride`` px apart."""
    room = high - TILE - low
    steps = max(1, -(-room // stride))
    return sorted({low + round(step * room / steps) for step in range(steps + 1)}) if room >= 0 else []


def clip_boxes(boxes: Sequence[Box], x: int, y: int) -> list[Box]:
    """Boxes inside the tile at ``x, y``, relative to it, without those that show too little."""
    inside = []
    for x1, y1, x2, y2 in boxes:
        left, top = max(x1 - x, 0.0), max(y1 - y, 0.0)
        right, bottom = min(x2 - x, float(TILE)), min(y2 - y, float(TILE))
        w, h = right - left, bottom - top
        big_enough = min(w, h) >= _MIN_SIDE
        if big_enough and w * h >= _MIN_VISIBLE * (x2 - x1) * (y2 - y1):
            inside.append((left, top, right, bottom))
    return inside
