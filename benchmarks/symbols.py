"""Render a data set of ten kinds of symbols on aerial photos: the second data set of docs/results.md.

Symbols are filled shapes of 12 to 72 px, turned, stretched, in any colour and light, some blurred, some half
hidden by another; their kinds are unbalanced, the first ten times as frequent as the last. The photos are
those of ``trees``, training photos under training images, validation photos under validation images; no box
of the photos is used. The same arguments give the same images.

    python benchmarks/symbols.py outputs/symbols                  # writes outputs/symbols/data.yaml
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.imgsz import Imgsz, Sides, parse_imgsz, sides
from sparse_exp.config.plain import CONF_DIRECTORY, from_dict
from sparse_exp.config.schema import DatasetConfig
from sparse_exp.data import prepare
from sparse_exp.data.images import read_image
from sparse_exp.data.writing import write_once, write_sample, write_yaml
from sparse_exp.sources.cache import cache_directory

VERSION = "1"
_FINE = 4  # a symbol is drawn so many times as large, then made smaller, so that its edges are smooth
_TRIES = 30  # to find a place for a symbol
_MOST_HIDDEN = 0.3  # share of a symbol's box that others may cover


def star(points: int, inner: float) -> list[tuple[float, float]]:
    """The corners of a star in the unit circle; ``inner`` is the radius of its inner corners."""
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def polygon(corners: int) -> list[tuple[float, float]]:
    """The corners of a regular polygon in the unit circle, one of them above."""
    return star(corners, 1.0)[::2]


def crescent() -> list[tuple[float, float]]:
    """The corners of a disc out of which another is cut."""
    outer, inner = np.linspace(0.6, 2 * np.pi - 0.6, 40), np.linspace(2 * np.pi - 0.85, 0.85, 40)
    x = np.concatenate([np.cos(outer), 0.35 + 0.75 * np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.75 * np.sin(inner)])
    return [(float(x), float(y)) for x, y in zip(x, y, strict=True)]


# Outline of each kind in the square from -1 to 1.
KINDS: dict[str, Sequence[tuple[float, float]]] = {
    "disc": polygon(48),
    "triangle": polygon(3),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": star(5, 0.42),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "arrow": [(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)],
    "hexagon": polygon(6),
    "bar": [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)],
    "crescent": crescent(),
    "flash": [(0.2, -1), (-0.6, 0.2), (-0.05, 0.2), (-0.25, 1), (0.6, -0.25), (0.05, -0.25)],
}  # fmt: skip


def main() -> int:
    """Render the set, unless it is there."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path, help="folder of the data set")
    parser.add_argument("--train", type=whole, default=800, help="training images")
    parser.add_argument("--val", type=whole, default=200, help="validation images")
    parser.add_argument(
        "--imgsz", type=parse_imgsz, default=192, help="of the images, px: 192, or 360,640 (height, width)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all randomness")
    options = parser.parse_args()
    path = render(
        options.destination, train=options.train, val=options.val, imgsz=options.imgsz, seed=options.seed
    )
    sys.stdout.write(f"{path}\n")
    return 0


def render(destination: Path, *, train: int, val: int, imgsz: Imgsz, seed: int = 0) -> Path:
    """Render a set unless it is there; returns its ``data.yaml``.

    Args:
        destination: folder of the set.
        train: training images.
        val: validation images.
        imgsz: size of the images, px.
        seed: of all randomness.
    """
    photos = {split: photos_of(split) for split in ("train", "val")}
    counts = {"train": train, "val": val}

    def build(folder: Path) -> None:
        for number, split in enumerate(photos):
            draw = np.random.default_rng((seed, number))
            for index in range(counts[split]):
                image, boxes = paint(photos[split], sides(imgsz), draw)
                write_sample(folder, split, f"{index:04}", image, boxes)
        write_yaml(folder, list(KINDS), list(photos))

    return write_once(destination, f"{VERSION} {train} {val} {imgsz} {seed}", build)


def photos_of(split: str) -> list[NDArray[np.uint8]]:
    """The photos of a split of ``trees``, uint8 RGB ``(H, W, 3)``."""
    wheel = yaml.safe_load((CONF_DIRECTORY / "dataset" / "trees.yaml").read_text(encoding="utf-8"))
    dataset = prepare(from_dict(DatasetConfig, wheel), cache_directory())
    return [read_image(sample.image) for sample in dataset.splits[split]]


def paint(
    photos: Sequence[NDArray[np.uint8]], size: Sides, draw: np.random.Generator
) -> tuple[NDArray[np.uint8], list[tuple[float, ...]]]:
    """One to six symbols on a piece of a photo.

    Args:
        photos: uint8 RGB ``(H, W, 3)`` each; a piece is enlarged to a larger image.
        size: of the image, px.
        draw: source of all randomness.

    Returns:
        uint8 RGB ``(height, width, 3)``, and rows of class id, x1, y1, x2, y2 in pixels.
    """
    photo = photos[draw.integers(len(photos))]
    scale = max(1.0, *(side / there for side, there in zip(size, photo.shape[:2], strict=True)))
    rows, columns = (math.floor(side / scale) for side in size)
    y, x = (
        int(draw.integers(there - side + 1))
        for there, side in zip(photo.shape, (rows, columns), strict=False)
    )
    canvas = Image.fromarray(photo[y : y + rows, x : x + columns]).resize((size.width, size.height))
    frequencies = np.geomspace(10, 1, len(KINDS))
    boxes: list[tuple[float, ...]] = []
    for _ in range(draw.integers(1, 7)):
        kind = int(draw.choice(len(KINDS), p=frequencies / frequencies.sum()))
        stamp = draw_symbol(list(KINDS.values())[kind], draw)
        place = find_place(stamp.size, size, boxes, draw)
        if place is None:
            continue
        canvas.paste(stamp, place, stamp)
        x1, y1, x2, y2 = stamp.getchannel("A").point(lambda value: 255 * (value > 64)).getbbox()
        boxes.append((kind, place[0] + x1, place[1] + y1, place[0] + x2, place[1] + y2))
    noise = draw.normal(0, draw.uniform(0, 12), (*size, 3))
    return np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8), boxes


def draw_symbol(outline: Sequence[tuple[float, float]], draw: np.random.Generator) -> Image.Image:
    """A symbol as an RGBA picture that holds little else; its side is between 12 and 72 px, mostly small."""
    side = float(np.exp(draw.uniform(np.log(12), np.log(72))))
    angle, stretch = draw.uniform(-0.6, 0.6), draw.uniform(0.7, 1.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (np.array(outline) * (stretch, 1.0)) @ turn.T * side / 2 * _FINE
    room = round(side * 0.75) * _FINE
    corners += room
    picture = Image.new("RGBA", (2 * room, 2 * room), (0, 0, 0, 0))
    colour = tuple(int(value) for value in draw.integers(30, 256, 3))
    opacity = int(draw.integers(150, 256))
    edge = tuple(int(value * draw.uniform(0.3, 1.0)) for value in colour)
    points = [(float(px), float(py)) for px, py in corners]
    ImageDraw.Draw(picture).polygon(points, (*colour, opacity), (*edge, opacity), int(side * _FINE / 16))
    picture = picture.resize((2 * room // _FINE, 2 * room // _FINE), Image.Resampling.BOX)
    if draw.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(draw.uniform(0.5, 1.5)))
    box = picture.getchannel("A").point(lambda value: 255 * (value > 16)).getbbox()
    return picture.crop(box)


def find_place(
    stamp: tuple[int, int], size: Sides, boxes: Sequence[tuple[float, ...]], draw: np.random.Generator
) -> tuple[int, int] | None:
    """A random x, y at which a stamp (width, height) hides little; None if no try finds one."""
    width, height = stamp
    for _ in range(_TRIES):
        x, y = int(draw.integers(size.width - width + 1)), int(draw.integers(size.height - height + 1))
        if all(hidden(box, x, y, stamp) <= _MOST_HIDDEN for box in boxes):
            return x, y
    return None


def hidden(box: tuple[float, ...], x: int, y: int, size: tuple[int, int]) -> float:
    """The share of a box that a picture at x, y covers, 0..1."""
    _, x1, y1, x2, y2 = box
    width = max(0.0, min(x2, x + size[0]) - max(x1, x))
    height = max(0.0, min(y2, y + size[1]) - max(y1, y))
    return width * height / ((x2 - x1) * (y2 - y1))


if __name__ == "__main__":
    run_command(main)
