"""Where the letterboxed images of a split are kept between epochs: in memory, in a file, or nowhere.

The file lies in the cache directory. It holds the images as they are after decoding, so that epochs,
processes and jobs of a sweep that read the same images share them, in memory through the system's own cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.config.imgsz import Imgsz, sides
from sparse_exp.data.images import read_square
from sparse_exp.data.scan import in_threads, stamp
from sparse_exp.errors import DataError
from sparse_exp.files import landing_directory
from sparse_exp.hardware.cgroups import free_memory
from sparse_exp.locks import exclusive
from sparse_exp.progress import progress

_SHARE = 0.2  # of the free memory, for the images of a split
_VERSION = 1  # of the file; raise it when images are decoded or letterboxed otherwise
_PIXELS, _SIZES = "pixels.npy", "sizes.npy"


def memory_of(images: int, imgsz: Imgsz) -> int:
    """Bytes that the letterboxed images of a split take."""
    return images * 3 * math.prod(sides(imgsz))


def choose_store(configured: str, images: int, imgsz: Imgsz, processes: int = 1) -> str:
    """Where the images of a split are kept.

    Args:
        configured: ``dataset.cache``; ``auto`` keeps them in memory where they take at most a fifth of what
            is free, limits of cgroups included, and else nowhere.
        images: of the split.
        imgsz: size of the images.
        processes: that train together; each keeps images in memory of its own.

    Returns:
        ``ram``, ``disk`` or ``none``.
    """
    if configured != "auto":
        return configured
    return "ram" if processes * memory_of(images, imgsz) <= _SHARE * free_memory() else "none"


class Squares:
    """Letterboxed images of a split in a file.

    Args:
        images: paths of the images.
        imgsz: size that they are scaled to.
        folder: of all such files; this split's is made in it unless it is there.

    Raises:
        DataError: an image is damaged, or there is no room.
    """

    def __init__(self, images: Sequence[Path], imgsz: Imgsz, folder: Path) -> None:
        place = folder / _key(images, imgsz)
        with exclusive(folder / f".{place.name}.lock", f"The images of {place} are being decoded"):
            if not place.is_dir():
                _build(images, imgsz, place)
        self._place = place
        self._open()

    def _open(self) -> None:
        self._pixels: NDArray[np.uint8] = np.load(self._place / _PIXELS, mmap_mode="r")
        self._sizes: NDArray[np.int32] = np.load(self._place / _SIZES)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """An image, uint8 ``(3, H, W)``, as a copy; and width and height of the original, px."""
        width, height = self._sizes[index].tolist()
        return np.array(self._pixels[index]), (width, height)

    def __getstate__(self) -> dict[str, Path]:
        """Another process opens the file itself."""
        return {"_place": self._place}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self._place = state["_place"]
        self._open()


def _key(images: Sequence[Path], imgsz: Imgsz) -> str:
    """A digest of all that the file holds: the images are told by path, size and times."""
    digest = hashlib.sha256(json.dumps([_VERSION, imgsz]).encode())
    for image in images:
        digest.update(os.fsencode(f"\0{image}\0{stamp(image)}"))
    return digest.hexdigest()[:20]


def _build(images: Sequence[Path], imgsz: Imgsz, place: Path) -> None:
    need = memory_of(len(images), imgsz)
    free = shutil.disk_usage(place.parent).free
    if need > free:
        do = "Set dataset.cache=none, or paths.cache to a larger disk."
        raise DataError(
            f"The decoded images need {need / 1e9:.1f} GB, but {place.parent} has {free / 1e9:.1f} GB. {do}"
        )
    with landing_directory(place) as part:
        shape = (len(images), 3, *sides(imgsz))
        pixels = np.lib.format.open_memmap(part / _PIXELS, "w+", np.uint8, shape)
        sizes = np.zeros((len(images), 2), np.int32)
        with progress("Decoding images", total=len(images), unit="images") as bar:
            squares = in_threads(lambda image: read_square(image, imgsz), images)
            for index, (square, mapping) in enumerate(squares):
                pixels[index], sizes[index] = square.transpose(2, 0, 1), mapping.size
                bar.advance()
        pixels.flush()
        np.save(part / _SIZES, sizes)
