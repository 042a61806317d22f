"""Image files as people have them, decoded to RGB as they are meant to be seen."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparse_exp.data.letterbox import Letterbox, fitted_size, letterbox
from sparse_exp.errors import DataError, first_line

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Of what Pillow reads, what people photograph and draw with: some of its other formats start programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# What Pillow's decoders raise on damaged or hostile files.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image as it is meant to be seen (the EXIF orientation is applied).

    Returns:
        RGB, uint8 ``(H, W, 3)``. Grey, palette and CMYK images are converted, of 16 bits the upper
        eight are kept, transparency is dropped; of several frames the first counts.

    Raises:
        DataError: the file is missing, no image, or damaged.
    """
    with _opened(path, path) as image:
        return np.asarray(_upright(image))


def read_square(path: Path, imgsz: int, content: bytes | None = None) -> tuple[NDArray[np.uint8], Letterbox]:
    """Decode an image and letterbox it.

    A JPEG that is to shrink by two or more is scaled by 1/2, 1/4 or 1/8 while it is decoded, never
    below the size that it is to get: a quarter of the time, and within about one grey level of
    averaging the pixels of the whole image (measured on photos of 1280 x 960 at 640 px).

    Args:
        path: the image.
        imgsz: side of the square, px.
        content: of the file, where it is in memory; ``path`` is then for the message.

    Returns:
        RGB, uint8 ``(imgsz, imgsz, 3)``, and how boxes of the whole image map into it.

    Raises:
        DataError: as `read_image`.
    """
    square, mapping, _ = read_picture(path, imgsz, content)
    return square, mapping


def read_picture(
    path: Path, imgsz: int, content: bytes | None = None
) -> tuple[NDArray[np.uint8], Letterbox, Image.Image | None]:
    """What `read_square` returns, and the whole image in RGB; None where it was scaled while decoded.

    Args:
        path: as of `read_square`, and so are ``imgsz`` and ``content``.
        imgsz: side of the square, px.
        content: of the file.

    Raises:
        DataError: as `read_image`.
    """
    with _opened(path if content is None else BytesIO(content), path) as image:
        size, stored = _upright_size(image), image.size
        image.draft("RGB", fitted_size(*image.size, imgsz))
        picture = _upright(image)
        square, mapping = letterbox(picture, imgsz, size)
        return square, mapping, picture if image.size == stored else None


def measure_image(content: bytes, path: Path) -> tuple[int, int]:
    """Width and height, px, of an image as it is meant to be seen, after decoding all of it.

    Args:
        content: of the file.
        path: for the message.

    Raises:
        DataError: it is no image, or damaged.
    """
    with _opened(BytesIO(content), path) as image:
        size = _upright_size(image)
        image.draft("RGB", (1, 1))  # reads the whole JPEG, but computes 1/64 of its pixels
        image.load()
        _check_mode(image)
        return size


@contextmanager
def _opened(file: Path | BytesIO, path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and images of 90 and more megapixels
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                yield image
    except _UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text is about Python objects
        reason = "its content is no image" if unknown else first_line(error)
        raise DataError(f"Cannot read the image {path}: {reason}. Replace or remove it.") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _UNREADABLE:  # broken metadata of a whole image
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) not in (0, 1):
        image = ImageOps.exif_transpose(image)
    return _as_rgb(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    _check_mode(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
