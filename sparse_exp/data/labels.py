"""Label files: per box one line ``class x y w h``, or a class and a polygon.

Where the data yaml has ``kpt_shape``, numbers of keypoints follow each box and are left out. Where it has
not, a longer line is a polygon; that it is no box with keypoints only all lines of a set can show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparse_exp.errors import DataError, expected

_TOLERANCE = 1e-3  # that coordinates may lie outside of 0..1, as those of rounded label files do
_MOST_BOXES = 20_000  # of an image
# Two boxes of a class are one that was labelled twice where no number differs by more: a share of the image,
# which rounding explains, and a share of the box.
_SAME, _SAME_OF_BOX = 1e-4, 0.01
# Share of the lines of one length that by chance, as polygons, never look like boxes with keypoints: with a
# visibility each, and without. Unless they are all longer lines of a set, those without must be this many.
_MARKED, _INSIDE, _MANY = 0.5, 0.9, 10


class Longer(NamedTuple):
    """The lines of a label file with one number of numbers behind the class, 6 or more.

    Attributes:
        numbers: how many numbers stand behind the class.
        rows: number of these lines.
        marked: lines that read as a box with a confidence and a track, or with points in it, each with its
            visibility.
        inside: lines that read as a box with points in it.
        line: the first of either kind, counted from 1; 0: none.
    """

    numbers: int
    rows: int
    marked: int
    inside: int
    line: int


@dataclass(frozen=True)
class Labels:
    """The content of a label file.

    Attributes:
        boxes: float32 ``(M, 5)``: class id and x, y, w, h (centre and size, 0..1 of the image),
            clipped to the image; each box once.
        lines: line number of each box, counted from 1.
        repeated: for each line with a box that an earlier one has already: both line numbers.
        problems: for each line that cannot be used, ``file:line`` and a message that names it.
        longer: what longer lines look like, by their length; see `not_told_apart`.
    """

    boxes: NDArray[np.float32]
    lines: tuple[int, ...]
    repeated: tuple[tuple[int, int], ...]
    problems: tuple[tuple[str, str], ...]
    longer: tuple[Longer, ...] = ()


def read_boxes(path: Path, num_classes: int, keypoints: int | None = None) -> NDArray[np.float32]:
    """Parse a label file.

    Args:
        path: the label file. A missing one holds no box: its image shows background.
        num_classes: class ids must be below it.
        keypoints: how many numbers of keypoints may follow a box; 0: none, longer lines are polygons; None:
            that is not said.

    Returns:
        ``boxes`` of `Labels`.

    Raises:
        DataError: the file cannot be read, or a line cannot be used; names the first one. Or nothing tells
            whether its longer lines are polygons or boxes with keypoints.
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
    if unclear := not_told_apart([(path, labels.longer)]):
        raise DataError(unclear[1])
    return labels.boxes


def parse_labels(content: bytes, num_classes: int, path: Path, keypoints: int | None = None) -> Labels:
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
        return _unusable(path, f"Cannot read the label file {path}: {error}. Replace or remove it.")
    rows, numbers, problems = [], [], []
    if sum(not line.isspace() for line in lines) > _MOST_BOXES:
        what, should_be = f"the label file {path}", f"of at most {_MOST_BOXES} boxes"
        return _unusable(path, expected(what, should_be, f"{len(lines)} lines", "Correct or remove it."))
    longer: dict[int, Longer] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            rows.append(_parse_line(words, num_classes, keypoints))
            numbers.append(number)
            if len(words) > _BOX_WORDS and keypoints is None:
                _count(longer, words, number)
        except _BadLine as bad:
            where, do = f"{path}:{number}", "Correct or remove the line."
            problems.append((where, expected(f"the label {where}", bad.should_be, bad.got, do)))
    boxes = np.array(rows, np.float32).reshape(-1, 5)
    firsts = _firsts(boxes)
    kept = [index for index, first in enumerate(firsts) if index == first]
    repeated = [(numbers[i], numbers[first]) for i, first in enumerate(firsts) if i != first]
    lines_kept = tuple(numbers[i] for i in kept)
    return Labels(boxes[kept], lines_kept, tuple(repeated), tuple(problems), tuple(longer.values()))


def _unusable(path: Path, problem: str) -> Labels:
    """Of a file none of whose lines can be used."""
    return Labels(np.zeros((0, 5), np.float32), (), (), ((str(path), problem),))


def not_told_apart(files: Iterable[tuple[Path, Sequence[Longer]]]) -> tuple[str, str] | None:
    """Say where lines of a set may be boxes with keypoints, or with a track, as well as polygons.

    Polygons have many lengths, and their first four numbers are a box around the others by chance only. Lines
    of keypoints all have one length, and are such boxes.

    Args:
        files: each label file of the set, and what its longer lines look like.

    Returns:
        ``file:line`` of the first such line, and a message that names it; None: all are polygons.
    """
    groups = defaultdict[int, list[tuple[Path, Longer]]](list)
    for path, found in files:
        for longer in found:
            groups[longer.numbers].append((path, longer))
    for numbers, group in groups.items():
        rows, marked, inside = (
            sum(getattr(longer, name) for _, longer in group) for name in ("rows", "marked", "inside")
        )
        enough = len(groups) == 1 or rows >= _MANY
        if marked >= _MARKED * rows or (inside >= _INSIDE * rows and enough):
            where = next(f"{path}:{longer.line}" for path, longer in group if longer.line)
            got, do = _reading(numbers, with_marks=marked >= _MARKED * rows)
            return where, expected(f"the label {where}", _NO_POLYGON, got, f"{do}; {_POLYGONS}.")
    return None


def _firsts(boxes: NDArray[np.float32]) -> list[int]:
    """For each box the index of the first that is the same; its own where there is none."""
    firsts: list[int] = []
    limits = np.minimum(_SAME, _SAME_OF_BOX * np.tile(boxes[:, 3:], 2))
    for index, box in enumerate(boxes):
        near = np.abs(boxes[:index, 1:] - box[1:]) <= limits[index]
        same = np.flatnonzero(near.all(1) & (boxes[:index, 0] == box[0]))
        firsts.append(firsts[same[0]] if len(same) else index)
    return firsts


_BOX_WORDS = 5
_NO_POLYGON = "class x y w h, or class and a polygon, without doubt which"
_ONLY_BOX = (
    "class x y w h, or class and a polygon, not a box with a confidence and a track or with keypoints (with "
    "kpt_shape in the data yaml these are left out)"
)
_POLYGONS = "if all longer lines are polygons, write kpt_shape: null"


def _reading(numbers: int, *, with_marks: bool) -> tuple[str, str]:
    """What lines may be, and what to do if they are."""
    rest = numbers - 4
    if with_marks and rest == 2:
        return "a box with a confidence and a track, or a polygon", "Remove what follows the box"
    each = 3 if with_marks else 2
    shape = f"kpt_shape: [{rest // each}, {each}]"
    return f"a box with {rest // each} keypoints, or a polygon", f"If so, write {shape} into the data yaml"


def _count(longer: dict[int, Longer], words: list[str], line: int) -> None:
    """Add a line to those of its length."""
    numbers = list(map(float, words[1:]))
    marked, inside = _is_marked(numbers), _points_inside(numbers, each=2)
    before = longer.get(len(numbers), Longer(len(numbers), 0, 0, 0, 0))
    longer[len(numbers)] = Longer(
        len(numbers),
        before.rows + 1,
        before.marked + marked,
        before.inside + inside,
        before.line or (line if marked or inside else 0),
    )


def _is_marked(numbers: Sequence[float]) -> bool:
    """Whether numbers read as a box with a confidence and a track, or with points and their visibility."""
    if len(numbers) == 6:
        return _is_box(numbers) and numbers[5].is_integer()
    seen = numbers[6::3]
    return len(numbers) % 3 == 1 and {*seen} <= {0.0, 1.0, 2.0} and _points_inside(numbers, each=3)


def _is_box(numbers: Sequence[float]) -> bool:
    """Whether the first four of the numbers may be a box in the image."""
    x, y, w, h = numbers[:4]
    return all(w > 0 and half <= at + _TOLERANCE and at + half <= 1 + _TOLERANCE
               for at, w, half in ((x, w, w / 2), (y, h, h / 2)))  # fmt: skip


def _points_inside(numbers: Sequence[float], each: int) -> bool:
    """Whether the first four of the numbers may be a box, and the others points in it, or 0 where unseen.

    Args:
        numbers: of a line.
        each: numbers of a point; the first two are x and y.
    """
    (x, y, w, h), rest = numbers[:4], numbers[4:]
    points = zip(rest[::each], rest[1::each], strict=False)
    return _is_box(numbers) and all(
        (px, py) == (0, 0) or (abs(px - x) <= w / 2 + _TOLERANCE and abs(py - y) <= h / 2 + _TOLERANCE)
        for px, py in points
    )


class _BadLine(Exception):
    """A line that cannot be used: what it should be, and what it is."""

    def __init__(self, should_be: str, got: list[str]) -> None:
        super().__init__()
        self.should_be, self.got = should_be, " ".join(got)


def _parse_line(words: list[str], num_classes: int, keypoints: int | None) -> tuple[float, ...]:
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
    if keypoints is None and not is_box and _is_marked(values) and (max(values) > 1 or not is_polygon):
        raise _BadLine(_ONLY_BOX, words)
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
