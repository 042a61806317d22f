"""Write generated data sets in Ultralytics' format: whole or not at all, and only once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STAMP = "stamp.json"


def write_once(destination: Path, version: str, build: Callable[[Path], None]) -> Path:
    """Build a directory unless it is there already, unchanged.

    It is built beside its place and lands by one rename. Two processes build it once.

    Args:
        destination: the directory.
        version: of what ``build`` writes; another version is built anew.
        build: fills an empty directory, among others with ``data.yaml``.

    Returns:
        Path of ``data.yaml``.
    """
    from filelock import FileLock

    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(destination.parent / f".{destination.name}.lock"):
        if not is_written(destination, version):
            _build(destination, version, build)
    return destination / "data.yaml"


def is_written(destination: Path, version: str | None = None) -> bool:
    """Whether `write_once` has built this (or any) version there and no file has changed since."""
    try:
        stamp = json.loads((destination / _STAMP).read_text(encoding="utf-8"))
        right_version = version is None or stamp["version"] == version
        return right_version and bool(stamp["sha256"] == _digest(destination))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(destination: Path, version: str, build: Callable[[Path], None]) -> None:
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        build(partial)
        stamp = {"version": version, "sha256": _digest(partial)}
        (partial / _STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        shutil.rmtree(destination, ignore_errors=True)
        partial.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STAMP):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def write_yaml(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Write ``data.yaml`` for images in ``images/<split>``; paths stay relative to the folder."""
    lines = [f"{split}: images/{split}" for split in splits]
    lines += ["names:", *(f"  {class_id}: {json.dumps(name)}" for class_id, name in enumerate(names))]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_sample(
    folder: Path, split: str, stem: str, image: NDArray[np.uint8], boxes: Sequence[Sequence[float]]
) -> None:
    """Write one image as PNG, and its label file.

    Args:
        folder: root of the data set.
        split: ``train``, ``val`` or ``test``.
        stem: file name without suffix.
        image: uint8 RGB ``(H, W, 3)``.
        boxes: rows of class id, x1, y1, x2, y2 in pixels.
    """
    height, width = image.shape[:2]
    lines = [
        f"{int(c)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
        f" {(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
        for c, x1, y1, x2, y2 in boxes
    ]
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / split / f"{stem}.png")
    (folder / "labels" / split / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")
