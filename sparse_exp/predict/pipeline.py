"""Decode, infer, suppress and draw at the same time, and give the results in the order of the images.

Each step has threads of its own, since decoders, engines and encoders work outside of Python's lock. Only a
few images wait between two steps, so that memory does not grow with the number of images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.data.images import read_image, read_picture
from sparse_exp.data.letterbox import Letterbox, letterbox
from sparse_exp.errors import DataError
from sparse_exp.predict.detector import Detector
from sparse_exp.predict.drawing import draw

Item = TypeVar("Item")
Result = TypeVar("Result")
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Input:
    """An image, or a frame of a video.

    Attributes:
        file: the image or video.
        frame: number of the frame, from 0; None for an image.
        pixels: of the frame: RGB, uint8 (H, W, 3); None for an image, which is read from its file.
    """

    file: Path
    frame: int | None = None
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ImageResult(Generic[Drawn]):
    """The detections in an image.

    Attributes:
        input: the image.
        size: its width and height, px.
        detections: float32 (D, 6), see `sparse_exp.predict.detector.Detector.suppress`.
        drawn: the picture with the detections, as ``render`` returned it; None without ``render``.
        problem: why the image cannot be read; empty where it can.
    """

    input: Input
    size: tuple[int, int]
    detections: NDArray[np.float32]
    drawn: Drawn | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Prepared:
    """A letterboxed image; ``picture`` is the whole one, None where it is not needed or must be read anew."""

    input: Input
    square: NDArray[np.uint8]
    box: Letterbox
    picture: Image.Image | None


class Pipeline(Generic[Drawn]):
    """Runs one detector on many images; use it as a context manager, which ends its threads.

    Args:
        detector: called by ``streams`` threads.
        render: called with each picture that the detections were drawn into; its result becomes ``drawn``.
            None: nothing is drawn.
        threads: of each step but the inference.
    """

    def __init__(
        self, detector: Detector, render: Callable[[Image.Image], Drawn] | None, *, threads: int
    ) -> None:
        self._detector, self._render, self._threads = detector, render, threads
        self._stack = ExitStack()

    def __enter__(self) -> Pipeline[Drawn]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, inputs: Iterable[Input]) -> Iterator[ImageResult[Drawn]]:
        """Yield the result of each image, in order.

        Raises:
            EngineError: the engine failed.
        """
        detector = self._detector
        ahead = 2 * (detector.batch_size * detector.streams + self._threads)
        prepared = self._in_threads(self._prepare, inputs, self._threads, ahead)
        batches = in_batches(prepared, detector.batch_size, lambda one: isinstance(one, _Prepared))
        inferred = self._in_threads(self._infer, batches, detector.streams, detector.streams + 1)
        pairs = (pair for batch in inferred for pair in batch)
        yield from self._in_threads(self._finish, pairs, self._threads, ahead)

    def _in_threads(
        self, function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
    ) -> Iterator[Result]:
        pool = ThreadPoolExecutor(threads)
        # At the end the threads finish their images and begin no others.
        self._stack.callback(pool.shutdown, cancel_futures=True)
        return in_order(pool, function, items, ahead)

    def _prepare(self, one: Input) -> _Prepared | ImageResult[Drawn]:
        imgsz = self._detector.model.imgsz
        try:
            if one.pixels is None:
                square, box, picture = read_picture(one.file, imgsz)
            else:
                square, box = letterbox(one.pixels, imgsz)
                picture = Image.fromarray(one.pixels)
        except DataError as error:
            return ImageResult(one, (0, 0), np.empty((0, 6), np.float32), problem=str(error))
        return _Prepared(one, square, box, picture if self._render else None)

    def _infer(
        self, batch: list[_Prepared | ImageResult[Drawn]]
    ) -> list[tuple[_Prepared | ImageResult[Drawn], NDArray[np.float32]]]:
        squares = [one.square for one in batch if isinstance(one, _Prepared)]
        predictions = iter(self._detector.infer(squares) if squares else ())
        none = np.empty((0, 6), np.float32)
        return [(one, next(predictions) if isinstance(one, _Prepared) else none) for one in batch]

    def _finish(self, pair: tuple[_Prepared | ImageResult[Drawn], NDArray[np.float32]]) -> ImageResult[Drawn]:
        one, predictions = pair
        if not isinstance(one, _Prepared):
            return one
        detections = self._detector.suppress(predictions, one.box)
        drawn = None
        if self._render:
            # A JPEG much larger than the square was scaled down while it was decoded. It is read again whole.
            picture = one.picture or Image.fromarray(read_image(one.input.file))
            drawn = self._render(draw(picture, detections, self._detector.names))
        return ImageResult(one.input, one.box.size, detections, drawn)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Call a function for each item in threads, and yield the results in the order of the items.

    At most ``ahead`` items are being worked on, or are done and wait to be yielded. Where ``items`` raises,
    the results of the items before come first.
    """
    items, running = iter(items), deque[Future[Result]]()
    failure: Exception | None = None
    while True:
        try:
            running.extend(pool.submit(function, item) for item in islice(items, ahead - len(running)))
        except Exception as error:
            items, failure = iter(()), error
        if running:
            yield running.popleft().result()
        elif failure:
            raise failure
        else:
            return


def in_batches(items: Iterable[Item], size: int, counts: Callable[[Item], bool]) -> Iterator[list[Item]]:
    """Lists of items in order, each with ``size`` items that ``counts`` is true of; the last may have fewer.

    >>> list(in_batches([1, 2, 3, 4, 5], 2, lambda item: item != 2))
    [[1, 2, 3], [4, 5]]
    """
    batch: list[Item] = []
    counted = 0
    for item in items:
        batch.append(item)
        counted += counts(item)
        if counted == size:
            yield batch
            batch, counted = [], 0
    if batch:
        yield batch
