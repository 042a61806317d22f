"""Decode image files to RGB, upright: whatever their format, colours and EXIF orientation."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.data.letterbox import Letterbox, fitted_size, letterbox
from sparse_exp.errors import DataError, first_line

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Pillow's formats for photos and drawings. Some of its others start programs, so they are not read.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# About odd metadata, and images of 90 megapixels and more. All threads share the filters of warnings, so that
# none can set them for a while.
warnings.filterwarnings("ignore", module=r"PIL\.")
# The exceptions that Pillow's decoders raise on damaged or hostile files.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, ArithmeticError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
# What turns a picture that is stored in an orientation of EXIF. Pillow's own function writes all metadata
# anew, and fails on what a camera wrote amiss, such as a resolution of 1/0.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """How an image lies in its file; the one place that knows orientations.

    Attributes:
        stored: width and height as they are stored, px.
        orientation: 1..8 as in EXIF: 1 is upright, 3 upside down, 6 and 8 are turned by 90 degrees, the
            others mirrored.
    """

    stored: tuple[int, int]
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image, px."""
        width, height = self.stored
        return (height, width) if self.orientation >= 5 else (width, height)

    def turned(self, box: Box) -> Box:
        """A box x1, y1, x2, y2 on the stored image as it lies on the upright one, px."""
        (x1, y1, x2, y2), (width, height) = box, self.stored
        if self.orientation in (2, 3, 7, 8):  # mirrored from left to right
            x1, x2 = width - x2, width - x1
        if self.orientation in (3, 4, 6, 7):
            y1, y2 = height - y2, height - y1
        return (y1, x1, y2, x2) if self.orientation >= 5 else (x1, y1, x2, y2)


def read_frame(path: Path, content: bytes | None = None) -> Frame:
    """The frame of an image; only its header is read.

    Args:
        path: the image.
        content: the file's bytes, if they are in memory; ``path`` then only names it in messages.

    Raises:
        DataError: it is no image, or its header is damaged.
    """
    with _opened(path if content is None else BytesIO(content), path) as image:
        return _frame(image)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image upright: its EXIF orientation is applied.

    Returns:
        RGB, uint8 ``(H, W, 3)``. Grey, palette and CMYK images are converted; 16 bits are cut to the upper
        eight; transparency is dropped; only the first of several frames is decoded.

    Raises:
        DataError: the file is missing, damaged, or no image.
    """
    with _opened(path, path) as image:
        return np.asarray(_upright_rgb(image))


def read_square(
    path: Path, imgsz: Imgsz, content: bytes | None = None
) -> tuple[NDArray[np.uint8], Letterbox]:
    """Decode an image and letterbox it.

    A JPEG more than twice as large as needed is scaled by 1/2, 1/4 or 1/8 while it is decoded, but never
    below the size it will have. That takes a quarter of the time, and differs by about one grey level from
    averaging the pixels of the whole image (measured on photos of 1280 x 960 at 640 px).

    Args:
        path: the image.
        imgsz: size that it is fitted into.
        content: the file's bytes, if they are in memory; ``path`` then only names it in messages.

    Returns:
        RGB, uint8 ``(H, W, 3)`` of that size, and the mapping of boxes from the whole image into it.

    Raises:
        DataError: as `read_image`.
    """
    square, mapping, _ = read_picture(path, imgsz, content)
    return square, mapping


def read_picture(
    path: Path, imgsz: Imgsz, content: bytes | None = None
) -> tuple[NDArray[np.uint8], Letterbox, Image.Image | None]:
    """Decode an image, letterbox it, and keep the whole image too if it was decoded.

    Args:
        path: see `read_square`.
        imgsz: see `read_square`.
        content: see `read_square`.

    Returns:
        The two results of `read_square`, and the whole image in RGB; None instead of it where a JPEG was
        scaled while it was decoded.

    Raises:
        DataError: as `read_image`.
    """
    with _opened(path if content is None else BytesIO(content), path) as image:
        size, stored = _frame(image).upright, image.size
        wanted = fitted_size(*size, imgsz)
        image.draft("RGB", wanted if size == stored else wanted[::-1])
        picture = _upright_rgb(image)
        square, mapping = letterbox(picture, imgsz, size)
        return square, mapping, picture if image.size == stored else None


def measure_image(content: bytes, path: Path) -> tuple[int, int]:
    """Width and height, px, of an upright image; all of it is decoded, to find damage.

    Args:
        content: the file's bytes.
        path: the file, for messages.

    Raises:
        DataError: it is damaged, or no image.
    """
    with _opened(BytesIO(content), path) as image:
        size = _frame(image).upright
        image.draft("RGB", (1, 1))  # a JPEG is read to its end, but only 1/64 of its pixels are computed
        image.load()
        _check_mode(image)
        return size


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture that is open or in memory, as `read_image` would decode it: upright, in RGB.

    Raises:
        DataError: it is damaged, closed, or has pixels of unknown range.
    """
    with _decoding(getattr(picture, "filename", "") or "in memory"):
        picture.load()  # a file is decoded now, and its damage is found
        return _upright_rgb(picture)


@contextmanager
def _opened(file: Path | BytesIO, path: Path) -> Iterator[Image.Image]:
    """Open an image; whatever Pillow raises within the block becomes a DataError that names ``path``."""
    with _decoding(path), Image.open(file, formats=IMAGE_FORMATS) as image:
        yield image


@contextmanager
def _decoding(name: object) -> Iterator[None]:
    """Turn whatever Pillow raises within the block into a DataError that names the image."""
    try:
        yield
    except _UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text is about Python objects
        reason = "its content is no image" if unknown else first_line(error)
        raise DataError(f"Cannot read the image {name}: {reason}. Replace or remove it.") from error


def _frame(image: Image.Image) -> Frame:
    """The frame of an image that is open and not decoded yet."""
    size = image.size
    if isinstance(
        image, TiffImagePlugin.TiffImageFile
    ):  # which Pillow itself turns upright, and its size too
        tags = image.tag_v2
        size = (int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH]))
    return Frame(size, _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _UNREADABLE:  # the metadata is broken, but the image may be whole
        return 1
    return found if 1 <= found <= 8 else 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
    elif (turn := _TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    _check_mode(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
