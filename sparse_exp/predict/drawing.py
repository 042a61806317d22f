"""Draw detections into pictures of any size."""

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

from sparse_exp.text import in_picture

QUALITY = 88  # of JPEG: no loss can be seen, and higher values soon double the files
_LARGEST_JPEG = 65_500  # px
_SMALLEST = 320  # px: in a smaller picture no label could be read
_GOLDEN = 0.618034  # share of the colour circle from one class to the next, so that neighbours differ most
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
Colour = tuple[int, int, int]


def draw(picture: Image.Image, detections: NDArray[np.float32], names: Sequence[str]) -> Image.Image:
    """Draw boxes with class and confidence; with one class only, the confidence alone.

    Lines and letters grow with the picture. A picture whose longer side is below 320 px is enlarged by a
    whole factor, since no label could be read in it.

    Args:
        picture: RGB; it may be changed.
        detections: float32 (D, 6): x1, y1, x2, y2 in pixels of the picture, confidence, class id.
        names: of the classes.

    Returns:
        The picture with the boxes; those of higher confidence cover the others.
    """
    factor = -(-_SMALLEST // max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor))
    side = sum(picture.size) / 2
    width, size = max(2, round(side / 320)), max(11, round(side / 55))
    canvas = ImageDraw.Draw(picture)
    for *corners, confidence, number in detections[::-1].tolist():
        box = tuple(factor * corner for corner in corners)
        name = in_picture(names[int(number)]) if len(names) > 1 else ""
        _label(canvas, box, f"{name} {confidence:.2f}".strip(), colour_of(int(number)), width, size)
    return picture


def encode(picture: Image.Image) -> bytes:
    """Encode a picture as JPEG; as PNG where it is larger than a JPEG can be."""
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
    mask = _text_mask(text, size)
    w, h = mask.width + 2 * width, mask.height + 2 * width
    limit_x, limit_y = canvas.im.size
    # The label stands above the box where there is room, else inside it, and never outside the picture.
    x = max(0, min(round(box[0]), limit_x - w))
    y = round(box[1]) - h if box[1] >= h else min(round(box[1]), limit_y - h)
    canvas.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # of Rec. 601
    canvas.bitmap((x + width, y + width), mask, fill=_BLACK if luma > 140 else _WHITE)


@lru_cache(maxsize=4096)
def _text_mask(text: str, size: int) -> Image.Image:
    """A text as a mask. Making it takes ten times as long as drawing it, and many labels are alike."""
    font = _font(size)
    left, top, right, bottom = map(round, font.getbbox(text))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib and has letters of many scripts; else Pillow's own font."""
    found = find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
