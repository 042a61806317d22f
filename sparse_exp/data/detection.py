"""Detection data in Ultralytics' format, the one format that everything here reads.

A data set is a yaml file with the keys ``path`` (root; the yaml's own folder when left out),
``train``, ``val``, optionally ``test`` (a folder, a text file that lists images, or a list of
those) and ``names`` (a list, or a map from class id to name). The label file of
``.../images/x.jpg`` is ``.../labels/x.txt``: one line ``class x y w h`` per box, centre and size as
shares of the image's width and height. A polygon ``class x1 y1 x2 y2 ...`` becomes the box around
it. An empty or missing label file is an image of background.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sparse_exp.errors import DataError, expected, first_line
from sparse_exp.progress import progress

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
PADDING = 114  # the grey that YOLOv5 checkpoints have learnt to ignore
_TOLERANCE = 1e-3  # rounding in label files


class Sample(NamedTuple):
    """One image and its label file, which need not exist."""

    image: Path
    label: Path


@dataclass(frozen=True)
class DetectionDataset:
    """A detection data set on disk.

    Attributes:
        name: for people.
        root: directory that relative paths of the yaml start from.
        names: class names; the class id is the position.
        splits: samples of ``train``, ``val`` and, where there is one, ``test``, sorted by path.
        digest: SHA-256 over class names, splits, relative paths and file contents, 64 hex digits.
    """

    name: str
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    digest: str


def load_dataset(yaml_path: Path, name: str | None = None) -> DetectionDataset:
    """Read a data yaml and list its samples; images and labels are not checked yet.

    Args:
        yaml_path: the data yaml.
        name: name of the data set; the yaml's stem when None.

    Raises:
        DataError: the yaml is missing or wrong, a split leads nowhere, or ``train`` or ``val``
            holds no image.
    """
    spec = _read_yaml(yaml_path)
    names = _read_names(spec, yaml_path)
    root = (yaml_path.absolute().parent / Path(str(spec.get("path") or ".")).expanduser()).resolve()
    splits = {split: _samples(spec[split], root, split, yaml_path) for split in SPLITS if spec.get(split)}
    for split in ("train", "val"):
        if not splits.get(split):
            do = f"Put images where the key {split!r} points."
            raise DataError(expected(f"the split {split!r} of {yaml_path}", "at least one image", 0, do))
    return DetectionDataset(name or yaml_path.stem, root, names, splits, _digest(root, names, splits))


def check_dataset(dataset: DetectionDataset) -> dict[str, int]:
    """Decode every image and parse every label.

    Returns:
        Number of boxes of each split.

    Raises:
        DataError: names the first file that cannot be used and, in a label file, the line.
    """
    total = sum(len(samples) for samples in dataset.splits.values())
    classes = len(dataset.names)

    def check(sample: Sample) -> int:
        read_image(sample.image)
        return len(read_boxes(sample.label, classes))

    boxes = {}
    with progress("Checking images", total=total, unit="images") as bar, ThreadPoolExecutor() as pool:
        for split, samples in dataset.splits.items():
            boxes[split] = 0
            for count in pool.map(check, samples):
                boxes[split] += count
                bar.advance()
    return boxes


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image as it is meant to be seen (the EXIF orientation is applied).

    Returns:
        RGB, uint8 ``(H, W, 3)``; grey and palette images are expanded, transparency is dropped.

    Raises:
        DataError: the file is missing, no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = first_line(error)
        raise DataError(f"Cannot read the image {path}: {reason}. Replace or remove it.") from error


def read_boxes(path: Path, num_classes: int) -> NDArray[np.float32]:
    """Parse a label file.

    Args:
        path: the label file; missing means background.
        num_classes: class ids must be below it.

    Returns:
        float32 ``(M, 5)``: class id and x, y, w, h (centre and size, 0..1 of the image); boxes are
        clipped to the image.

    Raises:
        DataError: names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return np.zeros((0, 5), np.float32)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the label file {path}: {error}. Replace or remove it.") from error
    rows = [
        _parse_line(line.split(), num_classes, f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    return np.array(rows, np.float32).reshape(-1, 5)


def _parse_line(words: list[str], num_classes: int, where: str) -> tuple[float, ...]:
    try:
        class_id, *values = [float(word) for word in words]
    except ValueError:
        raise _label_error(where, "only numbers", " ".join(words)) from None
    is_box, is_polygon = len(values) == 4, len(values) >= 6 and len(values) % 2 == 0
    if not (is_box or is_polygon):
        raise _label_error(where, "class x y w h, or class and the x y of 3 or more corners", " ".join(words))
    if not (class_id.is_integer() and 0 <= class_id < num_classes):
        raise _label_error(where, f"a class id of 0..{num_classes - 1} (see names)", words[0])
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise _label_error(where, "coordinates in 0..1 of the image", " ".join(words[1:]))
    box = np.array(values, np.float64)
    left, top, right, bottom = _corners(box) if is_box else _around(box)
    w, h = right - left, bottom - top
    if w <= 0 or h <= 0:
        raise _label_error(where, "a box wider and higher than 0", " ".join(words[1:]))
    return class_id, left + w / 2, top + h / 2, w, h


def _corners(xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y, w, h = xywh
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]).clip(0, 1)


def _around(polygon: NDArray[np.float64]) -> NDArray[np.float64]:
    corners = polygon.reshape(-1, 2).clip(0, 1)
    return np.concatenate([corners.min(0), corners.max(0)])


def _label_error(where: str, should_be: str, got: str) -> DataError:
    return DataError(expected(f"the label {where}", should_be, got, "Correct or remove the line."))


@dataclass(frozen=True)
class Letterbox:
    """How an image was scaled and centred in a square.

    Attributes:
        scale_x: width of the scaled image by its own width; `scale_y` likewise. They differ only
            because both are whole pixels.
        left: grey columns left of the image, px; `top` likewise.
        size: width and height of the original image, px.
    """

    scale_x: float
    scale_y: float
    left: int
    top: int
    size: tuple[int, int]

    def boxes(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes of the original image in the square; ``(M, 4)`` x1, y1, x2, y2 in pixels both ways."""
        return boxes * self._scale() + self._shift()

    def boxes_back(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes of the square in the original image, clipped to it; the inverse of `boxes`."""
        back = (boxes - self._shift()) / self._scale()
        limits = np.array([*self.size, *self.size], np.float32)
        return np.clip(back, 0, limits)

    def _scale(self) -> NDArray[np.float32]:
        return np.array([self.scale_x, self.scale_y] * 2, np.float32)

    def _shift(self) -> NDArray[np.float32]:
        return np.array([self.left, self.top] * 2, np.float32)


def letterbox(image: NDArray[np.uint8], imgsz: int) -> tuple[NDArray[np.uint8], Letterbox]:
    """Scale an image to fit a square, centred on grey, as YOLOv5 v6/v7 does.

    Args:
        image: uint8 ``(H, W, 3)``.
        imgsz: side of the square, px.

    Returns:
        uint8 ``(imgsz, imgsz, 3)`` and the mapping of boxes.
    """
    height, width = image.shape[:2]
    scale = min(imgsz / height, imgsz / width)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    if (w, h) != (width, height):
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    left, top = (imgsz - w) // 2, (imgsz - h) // 2
    square = np.full((imgsz, imgsz, 3), PADDING, np.uint8)
    square[top : top + h, left : left + w] = image
    return square, Letterbox(w / width, h / height, left, top, (width, height))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        do = "Correct dataset.path."
        raise DataError(expected("the data yaml", "an existing file", str(path), do)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"Cannot read the data yaml {path}: {reason}. Correct it.") from error
    if not isinstance(spec, dict):
        do = "Write the keys path, train, val and names."
        raise DataError(expected(f"the data yaml {path}", "a map of keys", spec, do))
    return spec


def _read_names(spec: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = spec.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[class_id] for class_id in range(len(names))]
    if not isinstance(names, list) or not names:
        do = "List the class names, or map them from ids 0, 1, 2, ..."
        raise DataError(expected(f"names of {path}", "a list of class names", names, do))
    if spec.get("nc", len(names)) != len(names):
        do = "Leave out nc, or correct names."
        raise DataError(expected(f"nc of {path}", f"the number of names ({len(names)})", spec["nc"], do))
    return tuple(str(name) for name in names)


def _samples(entry: Any, root: Path, split: str, yaml_path: Path) -> tuple[Sample, ...]:
    images: set[Path] = set()
    for item in entry if isinstance(entry, list) else [entry]:
        place = root / Path(str(item)).expanduser()
        if place.is_dir():
            images.update(path for path in place.rglob("*") if _is_image(path))
        elif place.is_file():
            images.update(_listed_images(place, root))
        else:
            should_be = "an existing folder or list of images"
            what = f"the split {split!r} of {yaml_path}"
            raise DataError(expected(what, should_be, str(place), "Correct the path."))
    return tuple(Sample(image, _label_of(image)) for image in sorted(images))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _listed_images(listing: Path, root: Path) -> Iterator[Path]:
    if _is_image(listing):
        yield listing
        return
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        # As upstream: ./x starts at the list's own folder, x at the root of the data set.
        image = (listing.parent if line.startswith("./") else root) / line.strip()
        if not image.is_file():
            where = f"the image of {listing}:{number}"
            raise DataError(expected(where, "an existing file", line.strip(), "Correct or remove the line."))
        yield image


def _label_of(image: Path) -> Path:
    parts = list(image.parts)
    for position in range(len(parts) - 2, 0, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _digest(root: Path, names: tuple[str, ...], splits: dict[str, tuple[Sample, ...]]) -> str:
    digest = hashlib.sha256(repr(names).encode())
    for split, samples in sorted(splits.items()):
        for path in (path for sample in samples for path in sample):
            digest.update(f"\0{split}\0{Path(os.path.relpath(path, root)).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest()
