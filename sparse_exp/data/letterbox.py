"""Scale an image of any aspect ratio into a square or another rectangle, and map boxes between the two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.config.imgsz import Imgsz, sides

PADDING = 114  # the grey level that YOLOv5 checkpoints have learned to ignore


@dataclass(frozen=True)
class Letterbox:
    """How an image was scaled and centred in a square or another rectangle.

    Attributes:
        scale_x: width of the scaled image divided by that of the original.
        scale_y: likewise its height. It differs from ``scale_x`` only because sizes are whole pixels.
        left: grey columns left of the image, px.
        top: grey rows above the image, px.
        size: width and height of the original image, px.
    """

    scale_x: float
    scale_y: float
    left: int
    top: int
    size: tuple[int, int]

    def boxes(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map boxes from the original to the letterboxed image; ``(M, 4)`` x1, y1, x2, y2 in pixels."""
        return boxes * self._scale() + self._shift()

    def boxes_back(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map boxes from the letterboxed to the original image, clipped to it; the inverse of `boxes`."""
        back = (boxes - self._shift()) / self._scale()
        limits = np.array([*self.size, *self.size], np.float32)
        clipped: NDArray[np.float32] = np.clip(back, 0, limits)
        return clipped

    def _scale(self) -> NDArray[np.float32]:
        return np.array([self.scale_x, self.scale_y] * 2, np.float32)

    def _shift(self) -> NDArray[np.float32]:
        return np.array([self.left, self.top] * 2, np.float32)


def fitted_size(width: int, height: int, imgsz: Imgsz) -> tuple[int, int]:
    """Width and height, px, of an image scaled to fit images of size ``imgsz``; at least 1 each."""
    own = sides(imgsz)
    scale = min(own.height / height, own.width / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def letterbox(
    image: NDArray[np.uint8] | Image.Image, imgsz: Imgsz, size: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], Letterbox]:
    """Scale an image to fit a square or another rectangle and centre it on grey, as YOLOv5 v6/v7 does.

    Where the number of grey rows or columns is odd, the larger half comes after the image, as upstream.

    Args:
        image: uint8 ``(H, W, 3)``, or an RGB picture.
        imgsz: size of the result.
        size: width and height of the original image, px, which boxes refer to. Needed only where ``image``
            was already scaled down while it was decoded.

    Returns:
        uint8 ``(H, W, 3)`` of that size, and the mapping of boxes.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    mapping = letterbox_of(size or picture.size, imgsz)
    (w, h), (height, width) = fitted_size(*mapping.size, imgsz), sides(imgsz)
    if (w, h) != picture.size:
        picture = picture.resize((w, h), Image.Resampling.BILINEAR)
    if (w, h) == (width, height):
        square = np.array(picture)
    else:
        square = np.full((height, width, 3), PADDING, np.uint8)
        square[mapping.top : mapping.top + h, mapping.left : mapping.left + w] = picture
    return square, mapping


def letterbox_of(size: tuple[int, int], imgsz: Imgsz) -> Letterbox:
    """How an image of a size (width and height, px) lies in one of size ``imgsz``; see `letterbox`."""
    (width, height), own = size, sides(imgsz)
    w, h = fitted_size(width, height, imgsz)
    return Letterbox(w / width, h / height, (own.width - w) // 2, (own.height - h) // 2, size)
