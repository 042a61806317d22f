"""One pass over the files of a data set: hashes, image sizes, boxes, and what cannot be used.

What was found is kept in the cache directory, never beside the user's files, so that the next start
only asks the file system whether a file has changed (its size, or the times of its last write and of
its last change of any kind). A cache that cannot be read is rebuilt, one that cannot be written is
done without.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparse_exp.data.images import measure_image
from sparse_exp.data.labels import parse_labels
from sparse_exp.errors import DataError
from sparse_exp.files import landing
from sparse_exp.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_FORMAT = 1  # of the cache, and of what scanning means; another one is not read
EMPTY = hashlib.sha256(b"").hexdigest()


class Scan(NamedTuple):
    """What is known of one image and its label file.

    Attributes:
        stamp: sizes and times of both files when they were read.
        image_sha256: of the image file, 64 hex digits; `EMPTY` where there is none.
        label_sha256: of the label file; `EMPTY` where there is none.
        width: of the image as it is meant to be seen, px; 0 where it cannot be read.
        height: likewise.
        boxes: float32 rows of `sparse_exp.data.labels.Labels`, as bytes.
        problems: a file and, in a label, the line; and a sentence that names both.
    """

    stamp: list[int]
    image_sha256: str
    label_sha256: str
    width: int
    height: int
    boxes: bytes
    problems: list[tuple[str, str]]

    @property
    def has_label(self) -> bool:
        """Whether there is a label file, be it empty."""
        return self.stamp[3] >= 0


def scan_files(
    pairs: Iterable[tuple[Path, Path]], num_classes: int, cache_file: Path | None = None
) -> dict[Path, Scan]:
    """Look at images and their label files; at what has not changed since the last time, not again.

    Args:
        pairs: image and label file; neither needs to exist.
        num_classes: class ids must be below it.
        cache_file: keeps what was found; None: nothing is kept.

    Returns:
        What was found, by image.
    """
    labels = dict(pairs)
    known = _read_cache(cache_file, num_classes) if cache_file else {}
    scans = {image: known[str(image)] for image in labels if str(image) in known}
    scans = {image: scan for image, scan in scans.items() if scan.stamp == _stamp(image, labels[image])}
    fresh = [image for image in labels if image not in scans]
    if fresh:
        with progress("Checking images", total=len(fresh), unit="images") as bar:
            found = in_threads(lambda image: _look(image, labels[image], num_classes), fresh)
            for image, scan in zip(fresh, found, strict=True):
                scans[image] = scan
                bar.advance()
        if cache_file:
            _write_cache(cache_file, num_classes, scans)
    return {image: scans[image] for image in labels}


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results in the order of items; when one raises, or on Ctrl-C, what has not begun is not done."""
    pool = ThreadPoolExecutor()
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _look(image: Path, label: Path, num_classes: int) -> Scan:
    stamp = _stamp(image, label)  # before reading: what changes in between is noticed next time
    problems: list[tuple[str, str]] = []
    content, text = _content(image, "image", problems), b""
    width, height = 0, 0
    if not problems:
        try:
            width, height = measure_image(content, image)
        except DataError as error:
            problems.append((str(image), str(error)))
    if label.exists():  # else it is an image of background
        text = _content(label, "label file", problems)
    labels = parse_labels(text, num_classes, label)
    image_sha256, label_sha256 = (hashlib.sha256(data).hexdigest() for data in (content, text))
    problems.extend(labels.problems)
    return Scan(stamp, image_sha256, label_sha256, width, height, labels.boxes.tobytes(), problems)


def _content(path: Path, what: str, problems: list[tuple[str, str]]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problems.append(
            (str(path), f"Cannot read the {what} {path}: {error.strerror}. Replace or remove it.")
        )
        return b""


def _stamp(image: Path, label: Path) -> list[int]:
    numbers = []
    for path in (image, label):
        try:
            stat = os.stat(path)  # noqa: PTH116 - twice as fast as Path.stat over many thousand files
            numbers += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        except OSError:
            numbers += [-1, 0, 0]
    return numbers


def _read_cache(file: Path, num_classes: int) -> dict[str, Scan]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if (stored["format"], stored["classes"]) != (_FORMAT, num_classes):
            return {}
        return {image: _unpack(entry) for image, entry in stored["scans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.debug("The cache %s cannot be read (%s) and is built again", file, error)
        return {}


def _unpack(entry: list[Any]) -> Scan:
    problems = [(str(where), str(text)) for where, text in entry[6]]
    return Scan(*entry)._replace(boxes=base64.b64decode(entry[5], validate=True), problems=problems)


def _write_cache(file: Path, num_classes: int, scans: Mapping[Path, Scan]) -> None:
    entries = {
        str(image): scan._replace(boxes=base64.b64encode(scan.boxes).decode())  # type: ignore[arg-type]
        for image, scan in scans.items()
    }
    try:
        with landing(file) as temporary:
            stored = {"format": _FORMAT, "classes": num_classes, "scans": entries}
            temporary.write_text(json.dumps(stored), encoding="utf-8")
    except OSError as error:
        _log.warning("Images will be checked again next time: cannot write %s (%s)", file, error.strerror)
