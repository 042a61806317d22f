"""From an image to its detections, with any engine: used by ``predict`` and ``serve``.

Letterboxing and non-maximum suppression are the functions that the evaluation calls, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from sparse_exp.data.images import read_square
from sparse_exp.data.letterbox import PADDING, Letterbox, letterbox
from sparse_exp.engines import Engine, IsolatedEngine, create_engine
from sparse_exp.errors import EngineError, expected
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.predict.models import Model, find_model
from sparse_exp.yolov5 import non_max_suppression

__all__ = ["Detector", "Model", "find_model", "prepare_process"]
# Parameters of mallopt(3): M_MMAP_THRESHOLD (the largest that glibc accepts), M_TRIM_THRESHOLD, M_ARENA_MAX.
_MALLOC = ((-3, 32 << 20), (-1, 512 << 20), (-8, 1))


class Detector:
    """A model in its engine, loaded and tried with one image.

    Every method may be called from several threads; `infer` and `detect` from ``streams`` at a time.

    Args:
        model: see `find_model`.
        batch_size: images of one inference, at least 1; a smaller batch is filled up.
        cores: physical cores for the engine; None: all that this process may use.
        streams: inferences at once, which share the cores.
        conf: a detection's confidence must be above it, 0..1.
        iou: a box that overlaps a better one of its class by more than this is dropped, 0..1.
        max_det: most detections of an image.
        multi_label: a box may become several detections, one for each class above ``conf``, as in the
            evaluation of mAP; otherwise only its best class counts.
        isolated: run the engine in a process of its own. It may crash without ending this one; images and
            predictions are copied to it and back.

    Attributes:
        model: as given.
        names: of all classes; ``class 0`` and so on where the model has no names.
        version: of the engine.

    Raises:
        MissingDependency: the engine is not installed.
        EngineError: the engine cannot run the model here, or the model is no detector.
    """

    def __init__(
        self, model: Model, *, batch_size: int = 1, cores: int | None = None, streams: int = 1,
        conf: float = 0.25, iou: float = 0.45, max_det: int = 300, multi_label: bool = False,
        isolated: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.batch_size, self.streams = model, batch_size, streams
        self.cores = cores or usable_physical_cores()
        self.conf, self.iou, self.max_det, self.multi_label = conf, iou, max_det, multi_label
        self._engine: Engine | IsolatedEngine
        self._engine = IsolatedEngine(model.engine) if isolated else create_engine(model.engine)
        self._engine.load(
            model.path,
            batch_size=batch_size,
            cores=self.cores,
            streams=streams,
            signature=model.signature,
        )
        try:
            self.names = self._try_out()
        except BaseException:
            self.close()
            raise
        self.version = self._engine.version

    def prepare(self, image: NDArray[np.uint8] | Path) -> tuple[NDArray[np.uint8], Letterbox]:
        """Letterbox an image as the evaluation does.

        Args:
            image: RGB, uint8 (H, W, 3), or an image file.

        Returns:
            The square, uint8 (S, S, 3), and how boxes of the image map into it.

        Raises:
            DataError: the file is missing, is no image, or is damaged.
        """
        size = self.model.imgsz
        return read_square(image, size) if isinstance(image, Path) else letterbox(image, size)

    def infer(self, squares: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Run the engine on prepared images.

        Args:
            squares: at least one, at most ``batch_size``: uint8 (S, S, 3).

        Returns:
            float32 (N, A, 5 + nc): x, y, w, h in pixels of the square, objectness, class scores.

        Raises:
            EngineError: the engine failed.
        """
        size = self.model.imgsz
        images = np.empty((len(squares), 3, size, size), np.uint8)
        for image, square in zip(images, squares, strict=True):
            cv2.split(square, list(image))  # numpy's transposed copy takes ten times as long
        return self._engine.run(images)[0]

    def suppress(self, predictions: NDArray[np.float32], box: Letterbox) -> NDArray[np.float32]:
        """Turn the predictions of one image into detections, by non-maximum suppression.

        Args:
            predictions: float32 (A, 5 + nc), see `infer`.
            box: of the image, see `prepare`.

        Returns:
            float32 (D, 6), best first: x1, y1, x2, y2 in pixels of the image, confidence, class id.
        """
        batch = torch.from_numpy(predictions)[None]
        (kept,) = non_max_suppression(batch, self.conf, self.iou, self.max_det, multi_label=self.multi_label)
        detections: NDArray[np.float32] = kept.numpy()
        detections[:, :4] = box.boxes_back(detections[:, :4])
        return detections

    def detect(
        self, squares: Sequence[NDArray[np.uint8]], boxes: Sequence[Letterbox]
    ) -> list[NDArray[np.float32]]:
        """Find the detections in prepared images: `infer`, then `suppress` for each."""
        predictions = self.infer(squares)
        return [self.suppress(one, box) for one, box in zip(predictions, boxes, strict=True)]

    def close(self) -> None:
        """Free the engine; closing twice does nothing."""
        self._engine.close()

    def _try_out(self) -> tuple[str, ...]:
        """Run a grey image, compare the shape of the predictions with the class names, return the names."""
        size, names = self.model.imgsz, self.model.names
        square, box = letterbox(np.full((size, size, 3), PADDING, np.uint8), size)
        predictions = self.infer([square])
        wanted = f"(1, A, {5 + len(names)})" if names else "(1, A, 5 + classes)"
        classes = predictions.shape[2] - 5 if predictions.ndim == 3 else 0
        if classes < 1 or (names and classes != len(names)):
            what = f"the predictions of {self.model.path}"
            do = "Give a YOLOv5 detector and the names of its classes."
            raise EngineError(expected(what, f"of shape {wanted}", predictions.shape, do))
        self.suppress(predictions[0], box)  # the first call is slow, and the first image must not wait for it
        return names or tuple(f"class {number}" for number in range(classes))


def prepare_process() -> None:
    """Set this process up for many images; call it once, before a detector is made.

    Torch only suppresses boxes here. It gets one thread, since more would take the engine's cores. And glibc
    is told to keep freed memory, in one arena for all threads. By default it returns large arrays to the
    system, which then clears every page of the next one.
    """
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for setting, value in _MALLOC:
            library.mallopt(setting, value)
