"""One pass over the files of a data set: hashes, image sizes, boxes, and problems.

The results are kept in the cache directory, never beside the user's files. The next start then only asks the
file system whether a file has changed: its size, its time of writing (mtime), or its time of any change
(ctime). If the cache cannot be read, it is built again; if it cannot be written, the next start scans again.
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
from sparse_exp.data.labels import Longer, parse_labels
from sparse_exp.errors import DataError
from sparse_exp.files import landing, remove_left_parts
from sparse_exp.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_FORMAT = 3  # of the cache; raise it when a scan finds something else in the same files
EMPTY = hashlib.sha256(b"").hexdigest()
"""The hash that stands for a file that is not there; that of an empty file."""


class Scan(NamedTuple):
    """The facts about one image and its label file.

    Attributes:
        stamp: sizes and times of both files when they were read.
        image_sha256: SHA-256 of the image file, 64 hex digits; `EMPTY` without one.
        label_sha256: SHA-256 of the label file; `EMPTY` without one.
        width: of the upright image, px; 0 where it cannot be read.
        height: of the upright image, px; 0 where it cannot be read.
        boxes: float32 rows of `sparse_exp.data.labels.Labels`, as bytes.
        problems: for each problem the file, or ``file:line`` in a label file, and a message that names it.
        repeated: number of lines with a box that an earlier line has already, which are left out.
        longer: `sparse_exp.data.labels.Labels.longer`.
    """

    stamp: list[int]
    image_sha256: str
    label_sha256: str
    width: int
    height: int
    boxes: bytes
    problems: list[tuple[str, str]]
    repeated: int = 0
    longer: Sequence[Longer] = ()

    @property
    def has_label(self) -> bool:
        """Whether there is a label file; an empty one counts."""
        return self.stamp[3] >= 0


def scan_files(
    pairs: Iterable[tuple[Path, Path]],
    num_classes: int,
    cache_file: Path | None = None,
    keypoints: int | None = None,
) -> dict[Path, Scan]:
    """Scan images and their label files; what has not changed since the last scan is taken from the cache.

    Args:
        pairs: image and label file; neither needs to exist.
        num_classes: class ids must be below it.
        cache_file: keeps the scans; None: they are not kept.
        keypoints: see `sparse_exp.data.labels.read_boxes`.

    Returns:
        The scans by image.
    """
    labels, reading = dict(pairs), (num_classes, keypoints)
    known = _read_cache(cache_file, reading) if cache_file else {}
    scans = {image: known[str(image)] for image in labels if str(image) in known}
    scans = {
        image: scan for image, scan in scans.items() if scan.stamp == stamp(image) + stamp(labels[image])
    }
    fresh = [image for image in labels if image not in scans]
    if fresh:
        with progress("Checking images", total=len(fresh), unit="images") as bar:
            found = in_threads(lambda image: _scan(image, labels[image], reading), fresh)
            for image, scan in zip(fresh, found, strict=True):
                scans[image] = scan
                bar.advance()
        if cache_file:
            _write_cache(cache_file, reading, scans)
    return {image: scans[image] for image in labels}


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Apply a function to items in threads, and yield the results in the order of the items.

    When one call raises, or on Ctrl-C, calls that have not begun are dropped.
    """
    pool = ThreadPoolExecutor()
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _scan(image: Path, label: Path, reading: tuple[int, int | None]) -> Scan:
    seen = stamp(image) + stamp(label)  # before reading: the next scan then notices a change made meanwhile
    problems: list[tuple[str, str]] = []
    content, text = _read(image, "image", problems), b""
    width, height = 0, 0
    if not problems:
        try:
            width, height = measure_image(content, image)
        except DataError as error:
            problems.append((str(image), str(error)))
    if label.exists():  # an image without a label file shows background
        text = _read(label, "label file", problems)
    num_classes, keypoints = reading
    labels = parse_labels(text, num_classes, label, keypoints)
    image_sha256, label_sha256 = (hashlib.sha256(data).hexdigest() for data in (content, text))
    problems.extend(labels.problems)
    boxes, repeated = labels.boxes.tobytes(), len(labels.repeated)
    return Scan(seen, image_sha256, label_sha256, width, height, boxes, problems, repeated, labels.longer)


def _read(path: Path, what: str, problems: list[tuple[str, str]]) -> bytes:
    """The bytes of a file; where it cannot be read, none, and a new entry in ``problems``."""
    try:
        return path.read_bytes()
    except OSError as error:
        problems.append(
            (str(path), f"Cannot read the {what} {path}: {error.strerror}. Replace or remove it.")
        )
        return b""


def stamp(path: Path) -> list[int]:
    """Size, mtime and ctime of a file; -1, 0, 0 for one that is not there."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - twice as fast as Path.stat over many thousand files
    except OSError:
        return [-1, 0, 0]
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_cache(file: Path, reading: tuple[int, int | None]) -> dict[str, Scan]:
    """The scans in a cache file by the image's path; none where the cache is of no use."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if (stored["format"], stored["reading"]) != (_FORMAT, list(reading)):
            return {}
        return {image: _from_entry(entry) for image, entry in stored["scans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.debug("The cache %s cannot be read (%s) and is built again", file, error)
        return {}


def _from_entry(entry: list[Any]) -> Scan:
    problems = [(str(where), str(text)) for where, text in entry[6]]
    longer = [Longer(*counts) for counts in entry[8]]
    boxes = base64.b64decode(entry[5], validate=True)
    return Scan(*entry)._replace(boxes=boxes, problems=problems, longer=longer)


def _write_cache(file: Path, reading: tuple[int, int | None], scans: Mapping[Path, Scan]) -> None:
    entries = {
        str(image): scan._replace(boxes=base64.b64encode(scan.boxes).decode())  # type: ignore[arg-type]
        for image, scan in scans.items()
    }
    try:
        remove_left_parts(file.parent)
        with landing(file) as temporary:
            stored = {"format": _FORMAT, "reading": reading, "scans": entries}
            temporary.write_text(json.dumps(stored), encoding="utf-8")
    except OSError as error:
        _log.warning("Images will be checked again next time: cannot write %s (%s)", file, error.strerror)
