"""Label files: per box one line ``class x y w h``, or a class and a polygon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.errors import DataError, expected

_TOLERANCE = 1e-3  # that coordinates may lie outside of 0..1, as those of rounded label files do


@dataclass(frozen=True)
class Labels:
    """The content of a label file.

    Attributes:
        boxes: float32 ``(M, 5)``: class id and x, y, w, h (centre and size, 0..1 of the image),
            clipped to the image.
        lines: line number of each box, counted from 1.
        problems: for each line that cannot be used, ``file:line`` and a message that names it.
    """

    boxes: NDArray[np.float32]
    lines: tuple[int, ...]
    problems: tuple[tuple[str, str], ...]


def read_boxes(path: Path, num_classes: int) -> NDArray[np.float32]:
    """Parse a label file.

    Args:
        path: the label file. A missing one holds no box: its image shows background.
        num_classes: class ids must be below it.

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
    labels = parse_labels(content, num_classes, path)
    if labels.problems:
        raise DataError(labels.problems[0][1])
    return labels.boxes


def parse_labels(content: bytes, num_classes: int, path: Path) -> Labels:
    """Parse the content of a label file, with any line ends, with or without a byte-order mark.

    Args:
        content: the file's bytes.
        num_classes: class ids must be below it.
        path: the file, for messages.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        problem = f"Cannot read the label file {path}: {error}. Replace or remove it."
        return Labels(np.zeros((0, 5), np.float32), (), ((str(path), problem),))
    rows, numbers, problems = [], [], []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            rows.append(_parse_line(words, num_classes))
            numbers.append(number)
        except _BadLine as bad:
            where, do = f"{path}:{number}", "Correct or remove the line."
            problems.append((where, expected(f"the label {where}", bad.should_be, bad.got, do)))
    return Labels(np.array(rows, np.float32).reshape(-1, 5), tuple(numbers), tuple(problems))


class _BadLine(Exception):
    """A line that cannot be used: what it should be, and what it is."""

    def __init__(self, should_be: str, got: list[str]) -> None:
        super().__init__()
        self.should_be, self.got = should_be, " ".join(got)


def _parse_line(words: list[str], num_classes: int) -> tuple[float, ...]:
    """Class id and x, y, w, h of a line's box; raises `_BadLine`."""
    try:
        class_id, *values = map(float, words)
    except ValueError:
        raise _BadLine("only numbers", words) from None
    is_box, is_polygon = len(values) == 4, len(values) >= 6 and len(values) % 2 == 0
    if not (is_box or is_polygon):
        raise _BadLine("class x y w h, or class and the x y of 3 or more corners", words)
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
