"""Detections drawn into pictures of any size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

QUALITY = 88  # of JPEG: no visible loss; above it files double
_LARGEST_JPEG = 65_500  # px
_SMALLEST = 320  # px: below it no label can be read, and the picture is enlarged
_GOLDEN = 0.618034  # of the colour circle, to the next class: near ones are far apart
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
Colour = tuple[int, int, int]


def draw(picture: Image.Image, detections: NDArray[np.float32], names: Sequence[str]) -> Image.Image:
    """Draw boxes with class and confidence; of a detector of one class the confidence alone.

    Lines and letters grow with the picture. One whose longer side is below 320 px is enlarged by a whole
    number, since no label could be read in it.

    Args:
        picture: RGB; it may be changed.
        detections: float32 (D, 6): x1, y1, x2, y2 in pixels of the picture, confidence, class id.
        names: of the classes.

    Returns:
        The picture with the boxes, the best on top.
    """
    factor = -(-_SMALLEST // max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor))
    side = sum(picture.size) / 2
    width, size = max(2, round(side / 320)), max(11, round(side / 55))
    canvas = ImageDraw.Draw(picture)
    for *corners, confidence, number in detections[::-1].tolist():
        box = tuple(factor * corner for corner in corners)
        name = names[int(number)] if len(names) > 1 else ""
        _label(canvas, box, f"{name} {confidence:.2f}".strip(), colour_of(int(number)), width, size)
    return picture


def encode(picture: Image.Image) -> bytes:
    """A picture as JPEG; as PNG where it is larger than JPEG can be."""
    stream = BytesIO()
    kind = "JPEG" if max(picture.size) <= _LARGEST_JPEG else "PNG"
    picture.save(stream, kind, quality=QUALITY)
    return stream.getvalue()


@cache
def colour_of(number: int) -> Colour:
    """The colour of a class: RGB, 0..255 each; the first dozens differ clearly."""
    hue = (0.93 + number * _GOLDEN) % 1.0
    lightness = (0.55, 0.38, 0.72)[number // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _label(
    canvas: ImageDraw.ImageDraw, box: tuple[float, ...], text: str, colour: Colour, width: int, size: int
) -> None:
    canvas.rectangle(box, outline=colour, width=width)
    letters = _letters(text, size)
    w, h = letters.width + 2 * width, letters.height + 2 * width
    limit_x, limit_y = canvas.im.size
    # Above the box where there is room, else inside it; never outside the picture.
    x = max(0, min(round(box[0]), limit_x - w))
    y = round(box[1]) - h if box[1] >= h else min(round(box[1]), limit_y - h)
    canvas.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    canvas.bitmap((x + width, y + width), letters, fill=_ink(colour))


@lru_cache(maxsize=4096)
def _letters(text: str, size: int) -> Image.Image:
    """A text as a mask: setting it takes ten times as long as drawing it, and labels come again and again."""
    font = _font(size)
    left, top, right, bottom = map(round, font.getbbox(text))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask


def _ink(colour: Colour) -> Colour:
    """Black on light colours, white on dark ones (luma of Rec. 601)."""
    red, green, blue = colour
    return _BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _WHITE


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib and has letters of many scripts; else Pillow's own."""
    found = find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
