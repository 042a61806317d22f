"""What a detector has found in one image, for those who call it from Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Detection(NamedTuple):
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the upright image, clipped to it.
        score: confidence, objectness times class score, 0..1.
        class_id: position of its class among the detector's names, from 0.
        class_name: name of its class.
    """

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    class_name: str


@dataclass(frozen=True, eq=False)
class Detections:
    """The D objects in one image, best first; iterating gives a `Detection` each.

    Attributes:
        boxes: float32 (D, 4): x1, y1, x2, y2 in pixels of the upright image, clipped to it.
        scores: float32 (D,): confidences, 0..1.
        class_ids: int64 (D,): positions in the detector's names.
        class_names: D names.
        size: width and height of the upright image, px.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    size: tuple[int, int]

    @classmethod
    def of_rows(cls, rows: NDArray[np.float32], names: Sequence[str], size: tuple[int, int]) -> Detections:
        """Take the columns of detections apart.

        Args:
            rows: float32 (D, 6), see `sparse_exp.predict.detector.Detector.suppress`.
            names: of all classes.
            size: width and height of the image, px.
        """
        class_ids = rows[:, 5].astype(np.int64)
        return cls(rows[:, :4], rows[:, 4], class_ids, tuple(names[i] for i in class_ids), size)

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        columns = self.boxes.tolist(), self.scores.tolist(), self.class_ids.tolist(), self.class_names
        for box, score, class_id, name in zip(*columns, strict=True):
            yield Detection(tuple(box), score, class_id, name)
