"""Label files: per box one line ``class x y w h``, or a class and a polygon.

Where the data yaml has ``kpt_shape``, numbers of keypoints follow each box and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.errors import DataError, expected

_TOLERANCE = 1e-3  # that coordinates may lie outside of 0..1, as those of rounded label files do
# Two boxes of a class are one that was labelled twice where no number differs by more: a share of the image,
# which rounding explains, and a share of the box.
_MOST_BOXES = 20_000  # of an image
_SAME, _SAME_OF_BOX = 1e-4, 0.01


@dataclass(frozen=True)
class Labels:
    """The content of a label file.

    Attributes:
        boxes: float32 ``(M, 5)``: class id and x, y, w, h (centre and size, 0..1 of the image),
            clipped to the image; each box once.
        lines: line number of each box, counted from 1.
        repeated: for each line with a box that an earlier one has already: both line numbers.
        problems: for each line that cannot be used, ``file:line`` and a message that names it.
    """

    boxes: NDArray[np.float32]
    lines: tuple[int, ...]
    repeated: tuple[tuple[int, int], ...]
    problems: tuple[tuple[str, str], ...]


def read_boxes(path: Path, num_classes: int, keypoints: int = 0) -> NDArray[np.float32]:
    """Parse a label file.

    Args:
        path: the label file. A missing one holds no box: its image shows background.
        num_classes: class ids must be below it.
        keypoints: how many numbers of keypoints may follow a box; 0: none, longer lines are polygons.

    Returns:
        ``boxes`` of `Labels`.

    Raises:
        DataError: the file cannot be read, or a line cannot be used; names the first one.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise DataError(f"Cannot read the label file {path}: {error}. Replace or remove it.") from error
    labels = parse_labels(content, num_classes, path, keypoints)
    if labels.problems:
        raise DataError(labels.problems[0][1])
    return labels.boxes


def parse_labels(content: bytes, num_classes: int, path: Path, keypoints: int = 0) -> Labels:
    """Parse the content of a label file, with any line ends, with or without a byte-order mark.

    Args:
        content: the file's bytes.
        num_classes: class ids must be below it.
        path: the file, for messages.
        keypoints: see `read_boxes`.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        problem = f"Cannot read the label file {path}: {error}. Replace or remove it."
        return Labels(np.zeros((0, 5), np.float32), (), (), ((str(path), problem),))
    rows, numbers, problems = [], [], []
    if sum(not line.isspace() for line in lines) > _MOST_BOXES:
        should_be = f"of at most {_MOST_BOXES} boxes"
        problem = expected(
            f"the label file {path}", should_be, f"{len(lines)} lines", "Correct or remove it."
        )
        return Labels(np.zeros((0, 5), np.float32), (), (), ((str(path), problem),))
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            rows.append(_parse_line(words, num_classes, keypoints))
            numbers.append(number)
        except _BadLine as bad:
            where, do = f"{path}:{number}", "Correct or remove the line."
            problems.append((where, expected(f"the label {where}", bad.should_be, bad.got, do)))
    boxes = np.array(rows, np.float32).reshape(-1, 5)
    firsts = _firsts(boxes)
    kept = [index for index, first in enumerate(firsts) if index == first]
    repeated = [(numbers[i], numbers[first]) for i, first in enumerate(firsts) if i != first]
    return Labels(boxes[kept], tuple(numbers[i] for i in kept), tuple(repeated), tuple(problems))


def _firsts(boxes: NDArray[np.float32]) -> list[int]:
    """For each box the index of the first that is the same; its own where there is none."""
    firsts: list[int] = []
    limits = np.minimum(_SAME, _SAME_OF_BOX * np.tile(boxes[:, 3:], 2))
    for index, box in enumerate(boxes):
        near = np.abs(boxes[:index, 1:] - box[1:]) <= limits[index]
        same = np.flatnonzero(near.all(1) & (boxes[:index, 0] == box[0]))
        firsts.append(firsts[same[0]] if len(same) else index)
    return firsts


_NO_POLYGON = (
    "class x y w h, or class and a polygon, not a box with a confidence and a track or with keypoints (with "
    "kpt_shape in the data yaml these are left out)"
)


def _follows_a_box(numbers: list[str]) -> bool:
    """Whether the numbers behind the fourth belong to a box, so that all of them are no polygon.

    A confidence and the number of a track do, and points in the box, each with its visibility 0, 1 or 2.
    """
    (x, y, w, h), rest = map(float, numbers[:4]), numbers[4:]
    if not (w / 2 <= x <= 1 - w / 2 and h / 2 <= y <= 1 - h / 2):
        return False
    if len(rest) == 2:
        return rest[1].isdecimal()
    points = zip(map(float, rest[::3]), map(float, rest[1::3]), rest[2::3], strict=False)
    return len(rest) % 3 == 0 and all(
        seen == "0" or (seen in ("1", "2") and abs(px - x) <= w / 2 and abs(py - y) <= h / 2)
        for px, py, seen in points
    )


class _BadLine(Exception):
    """A line that cannot be used: what it should be, and what it is."""

    def __init__(self, should_be: str, got: list[str]) -> None:
        super().__init__()
        self.should_be, self.got = should_be, " ".join(got)


def _parse_line(words: list[str], num_classes: int, keypoints: int) -> tuple[float, ...]:
    """Class id and x, y, w, h of a line's box; raises `_BadLine`."""
    try:
        class_id, *values = map(float, words)
    except ValueError:
        raise _BadLine("only numbers", words) from None
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    is_box, is_polygon = len(values) == 4, len(values) >= 6 and len(values) % 2 == 0
    if keypoints and not is_box:
        raise _BadLine(f"class x y w h and {keypoints} numbers, as kpt_shape of the data yaml says", words)
    if not (is_box or is_polygon):
        raise _BadLine("class x y w h, or class and the x y of 3 or more corners", words)
    if is_polygon and _follows_a_box(words[1:]):
        raise _BadLine(_NO_POLYGON, words)
    if not (class_id.is_integer() and 0 <= class_id < num_classes):
        raise _BadLine(f"a class id of 0..{num_classes - 1} (see names)", words[:1])
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise _BadLine("coordinates in 0..1 of the image", words[1:])
    if is_box:
        x, y, w, h = values
        edges = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        edges = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in edges)
    if x2 <= x1 or y2 <= y1:
        raise _BadLine("a box wider and higher than 0", words[1:])
    return class_id, x1 + (x2 - x1) / 2, y1 + (y2 - y1) / 2, x2 - x1, y2 - y1
