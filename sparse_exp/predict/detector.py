"""From an image to its detections, with any engine: used by ``predict``, ``serve`` and `sparse_exp.load`.

Letterboxing and non-maximum suppression are the functions that the evaluation calls, too. Nothing here needs
torch, unless it is the engine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.config.imgsz import sides
from sparse_exp.config.places import find_places
from sparse_exp.data.images import read_square, upright_rgb
from sparse_exp.data.letterbox import PADDING, Letterbox, letterbox
from sparse_exp.engines import Engine, create_engine
from sparse_exp.engines.base import NO_OPTIONS, Options
from sparse_exp.errors import ConfigError, DataError, EngineError, expected
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.predict.detections import Detections
from sparse_exp.predict.models import Model, find_model
from sparse_exp.runs.metadata import CONF, IOU
from sparse_exp.yolov5.postprocess import non_max_suppression

__all__ = ["Detector", "Model", "find_model", "load", "prepare_process"]
ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
AnyImage = TypeVar("AnyImage", bound=ImageLike)
_COUNTS = ("batch_size", "cores", "streams", "max_det")
# Parameters of mallopt(3): M_MMAP_THRESHOLD (the largest that glibc accepts), M_TRIM_THRESHOLD, M_ARENA_MAX.
_MALLOC = ((-3, 32 << 20), (-1, 512 << 20), (-8, 1))


class Detector:
    """A model in its engine, loaded and tried with one image; call it with an image, or a list of them.

    Use it as a context manager, or `close` it. Every method may be called from several threads; those that
    infer from ``streams`` at a time.

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
        options: of the engine, see `sparse_exp.engines.base.Engine.load`.
        quiet: throw away what the engine prints while it loads.

    Attributes:
        model: as given.
        names: of all classes; ``class 0`` and so on where the model has no names.
        version: of the engine.

    Raises:
        ConfigError: a number is out of its range.
        MissingDependency: the engine is not installed.
        EngineError: the engine cannot run the model here, or the model is no detector.
    """

    def __init__(
        self, model: Model, *, batch_size: int = 1, cores: int | None = None, streams: int = 1,
        conf: float = CONF, iou: float = IOU, max_det: int = 300, multi_label: bool = False,
        options: Options = NO_OPTIONS, quiet: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.batch_size, self.streams = model, batch_size, streams
        self.cores = cores or usable_physical_cores()
        self.conf, self.iou, self.max_det, self.multi_label = conf, iou, max_det, multi_label
        self._check_settings()
        self._engine: Engine = create_engine(model.engine, quiet=quiet)
        self._engine.load(
            model.path,
            batch_size=batch_size,
            cores=self.cores,
            streams=streams,
            options=options,
            signature=model.signature,
        )
        try:
            self.names = self._try_out()
        except BaseException:
            self.close()
            raise
        self.version = self._engine.version

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __call__(self, images: ImageLike) -> Detections: ...

    @overload
    def __call__(self, images: list[AnyImage] | tuple[AnyImage, ...]) -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | list[AnyImage] | tuple[AnyImage, ...]
    ) -> Detections | list[Detections]:
        """Find the objects in one image, or in each of a list.

        Args:
            images: see `prepare`; or a list or tuple of such, of which ``batch_size`` are inferred at once.

        Returns:
            The detections; for a list those of each image, in order.

        Raises:
            DataError: an image cannot be read.
            EngineError: the engine failed, or is closed.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        found: list[Detections] = []
        for start in range(0, len(images), self.batch_size):
            prepared = [self.prepare(image) for image in images[start : start + self.batch_size]]
            squares, boxes = zip(*prepared, strict=True)
            rows = self.detect(squares, boxes)
            found += [
                Detections.of_rows(one, self.names, box.size) for one, box in zip(rows, boxes, strict=True)
            ]
        return found

    def prepare(self, image: ImageLike) -> tuple[NDArray[np.uint8], Letterbox]:
        """Letterbox an image as the evaluation does.

        Args:
            image: an image file; a picture of Pillow; or RGB, uint8 (H, W, 3). OpenCV reads BGR, which
                ``image[..., ::-1]`` turns round. The orientation that a camera noted is applied.

        Returns:
            The letterboxed image, uint8 (H, W, 3) of the model's size, and how boxes map into it.

        Raises:
            DataError: it is missing, no image, or damaged.
        """
        size = self.model.imgsz
        if isinstance(image, str | os.PathLike):
            return read_square(Path(image), size)
        if isinstance(image, Image.Image):
            return letterbox(upright_rgb(image), size)
        return letterbox(_checked(image), size)

    def infer(self, squares: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Run the engine on prepared images.

        Args:
            squares: at least one, at most ``batch_size``: uint8 (H, W, 3), see `prepare`.

        Returns:
            float32 (N, A, 5 + nc): x, y, w, h in pixels of the prepared images, objectness, class scores.

        Raises:
            EngineError: the engine failed.
        """
        images = np.empty((len(squares), 3, *sides(self.model.imgsz)), np.uint8)
        for image, square in zip(images, squares, strict=True):
            image[:] = square.transpose(2, 0, 1)
        return self._engine.run(images)[0]

    def suppress(self, predictions: NDArray[np.float32], box: Letterbox) -> NDArray[np.float32]:
        """Turn the predictions of one image into detections, by non-maximum suppression.

        Args:
            predictions: float32 (A, 5 + nc), see `infer`.
            box: of the image, see `prepare`.

        Returns:
            float32 (D, 6), best first: x1, y1, x2, y2 in pixels of the image, confidence, class id.
        """
        thresholds = self.conf, self.iou, self.max_det
        (detections,) = non_max_suppression(predictions[None], *thresholds, multi_label=self.multi_label)
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

    def _check_settings(self) -> None:
        shares = [(name, "in 0..1", 0 <= getattr(self, name) <= 1) for name in ("conf", "iou")]
        counts = [(name, "at least 1", getattr(self, name) >= 1) for name in _COUNTS]
        for name, should_be, good in (*shares, *counts):
            if not good:
                raise ConfigError(expected(name, should_be, getattr(self, name), "Change it."))

    def _try_out(self) -> tuple[str, ...]:
        """Run a grey image, compare the shape of the predictions with the class names, return the names."""
        size, names = self.model.imgsz, self.model.names
        square, box = letterbox(np.full((*sides(size), 3), PADDING, np.uint8), size)
        predictions = self.infer([square])
        wanted = f"(1, A, {5 + len(names)})" if names else "(1, A, 5 + classes)"
        classes = predictions.shape[2] - 5 if predictions.ndim == 3 else 0
        if classes < 1 or (names and classes != len(names)):
            what = f"the predictions of {self.model.path}"
            do = "Give a YOLOv5 detector and the names of its classes."
            raise EngineError(expected(what, f"of shape {wanted}", predictions.shape, do))
        self.suppress(predictions[0], box)  # the first call is slow, and the first image must not wait for it
        return names or tuple(f"class {number}" for number in range(classes))


def load(
    model: str | os.PathLike[str], *, engine: str | None = None, conf: float = CONF, iou: float = IOU,
    max_det: int = 300, batch_size: int = 1, cores: int | None = None, streams: int = 1,
    zoo: str | os.PathLike[str] | None = None,
) -> Detector:  # fmt: skip
    """Load a detector, to call it with images.

    >>> detector = load("outputs/runs/DATE/TIME-NAME")  # doctest: +SKIP
    >>> [found.class_name for found in detector("photo.jpg")]  # doctest: +SKIP
    ['tree', 'tree']

    Args:
        model: what `find_model` takes: a run, a stub of the local zoo (``zoo:...``), a directory with
            ``model.onnx``, an ONNX file that this project exported, or for torch a checkpoint.
        engine: deepsparse, onnxruntime, openvino or torch; None: see `find_model`.
        conf: see `Detector`, as the others.
        iou: the overlap at which the weaker box goes.
        max_det: most detections of an image.
        batch_size: images of one inference.
        cores: physical cores for the engine.
        streams: inferences at once, for calls from several threads.
        zoo: directory of the local zoo; None: see `sparse_exp.config.places.find_places`.

    Returns:
        The detector; use it as a context manager, or `Detector.close` it.

    Raises:
        SparseExpError: see `find_model` and `Detector`; its text is one line that says what to do.
    """
    places = find_places(typed={"paths.zoo": os.fspath(zoo)} if zoo else None)
    found = find_model(os.fspath(model), engine=engine, places=places)
    return Detector(
        found, batch_size=batch_size, cores=cores, streams=streams, conf=conf, iou=iou, max_det=max_det
    )


def _checked(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An array as given; refuses what is no RGB image."""
    array = isinstance(image, np.ndarray)
    if array and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    do = "Convert it to RGB with 8 bits; give several images as a list."
    got = f"{image.dtype} {image.shape}" if array else type(image).__name__
    raise DataError(expected("the image", "a file, a picture of Pillow or uint8 (H, W, 3)", got, do))


def prepare_process() -> None:
    """Set this process up for many images; call it once, before a detector is made.

    Glibc is told to keep freed memory, in one arena for all threads. By default it returns large arrays to
    the system, which then clears every page of the next one.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for setting, value in _MALLOC:
            library.mallopt(setting, value)
