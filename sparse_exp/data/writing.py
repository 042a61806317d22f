"""Write data sets in Ultralytics' format; those that are generated, only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.files import landing_directory, remove_left_parts, sha256_of, write_text
from sparse_exp.locks import exclusive
from sparse_exp.text import whole_text

_STAMP = "stamp.json"


def write_once(destination: Path, version: str, build: Callable[[Path], None]) -> Path:
    """Build a data set unless it is there already, unchanged.

    It lands whole or not at all (`sparse_exp.files.landing_directory`). Of two processes that want it at
    the same time one builds it. Its files are hashed again only when one of them looks changed (size, time
    of the last write).

    Args:
        destination: directory of the data set.
        version: of what ``build`` writes; a data set of another version is built again.
        build: fills an empty directory, ``data.yaml`` among its files.

    Returns:
        Path of ``data.yaml``.
    """
    lock = destination.with_name(f".{destination.name}.lock")
    with exclusive(lock, f"The data set {destination} is being built"):
        if not is_written(destination, version):
            with landing_directory(destination) as folder:
                build(folder)
                stamp = {"version": version, "sha256": _digest(folder)}
                (folder / _STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    return destination / "data.yaml"


def is_written(destination: Path, version: str | None = None) -> bool:
    """Whether `write_once` has built this (or any) version there and no file has changed since."""
    try:
        stamp = json.loads((destination / _STAMP).read_text(encoding="utf-8"))
        if version is not None and stamp["version"] != version:
            return False
        seen, look = _marker(destination), f"{stamp['sha256']} {_look(destination)}"
        if seen.is_file() and seen.read_text(encoding="utf-8") == look:
            return True
        if stamp["sha256"] != _digest(destination):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    with suppress(OSError):  # on a disk that cannot be written the files are hashed every time
        remove_left_parts(seen.parent)
        write_text(seen, look)
    return True


def _marker(destination: Path) -> Path:
    """The file beside the data set that says how its files looked when they were last hashed."""
    return destination.with_name(f".{destination.name}.seen")


def _look(folder: Path) -> str:
    """A digest of names, sizes and times of all files; changes whenever a file may have changed."""
    digest = hashlib.sha256()
    for path in _files(folder):
        stat = path.stat()
        line = f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STAMP)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def write_yaml(folder: Path, names: Sequence[str], splits: Sequence[str] | Mapping[str, str]) -> None:
    """Write ``data.yaml``; its paths stay relative to the folder.

    Args:
        folder: root of the data set.
        names: class names.
        splits: folder of images by split; a plain sequence: those in ``images/<split>``.
    """
    places = splits if isinstance(splits, Mapping) else {split: f"images/{split}" for split in splits}
    lines = [f"{split}: {place}" for split, place in places.items()]
    lines += ["names:", *(f"  {class_id}: {_quoted(name)}" for class_id, name in enumerate(names))]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(text: str) -> str:
    """A text in YAML, in ASCII."""
    quoted: str = yaml.safe_dump(whole_text(text), default_style='"', width=float("inf"))
    return quoted.strip()


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
