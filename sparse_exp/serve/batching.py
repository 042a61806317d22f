"""Batches for one engine, gathered from the images of many requests.

A batch goes to the engine when it is full, or when its first image has waited long enough. While the engine
is busy a batch waits in any case, and fills up meanwhile. The engine is given one batch more than it works
on, so that it never waits for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparse_exp.data.letterbox import Letterbox
from sparse_exp.serve.metrics import Metrics

Square = NDArray[np.uint8]
Detections = NDArray[np.float32]
Detect = Callable[[Sequence[Square], Sequence[Letterbox]], Awaitable[list[Detections]]]


@dataclass(frozen=True)
class Answer:
    """The detections in an image.

    Attributes:
        detections: float32 (D, 6): x1, y1, x2, y2 in pixels of the original, confidence, class id.
        engine: seconds from when the engine was given the image's batch to the detections; the time that
            the batch waited there behind another is included.
    """

    detections: Detections
    engine: float


@dataclass
class _Item:
    square: Square
    box: Letterbox
    answer: asyncio.Future[Answer]


class Batcher:
    """Gathers images that arrive one by one into batches, and runs a detector on each batch.

    Args:
        detect: the detector, for ``batch_size`` images at most; at most ``streams + 1`` calls run at once.
        metrics: counts the batches and their seconds.
        batch_size: images of a batch, at least 1.
        max_wait: most seconds that an image waits for others to fill its batch.
        streams: batches that the detector works on at once, at least 1.

    Attributes:
        room: a place for each image that may be decoded; whoever calls `detect` holds one. There are as
            many places again as images in the engine: those are decoded ahead, and memory is bounded.
    """

    def __init__(
        self, detect: Detect, metrics: Metrics, *, batch_size: int, max_wait: float, streams: int
    ) -> None:
        self._detect, self._metrics = detect, metrics
        self._batch_size, self._max_wait = batch_size, max_wait
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._free = asyncio.Semaphore(streams + 1)
        self._running: set[asyncio.Task[None]] = set()
        self.room = asyncio.Semaphore(2 * batch_size * (streams + 1))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Work on images while this context is open."""
        gathering = asyncio.create_task(self._gather())
        try:
            yield
        finally:
            gathering.cancel()
            with suppress(asyncio.CancelledError):
                await gathering

    async def detect(self, square: Square, box: Letterbox) -> Answer:
        """Detect the objects in one image; the caller must have entered `room`.

        Args:
            square: uint8 (S, S, 3), RGB.
            box: how the original lies in the square.

        Raises:
            SparseExpError: the detector failed.
        """
        item = _Item(square, box, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(item)
        return await item.answer

    async def _gather(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self._batch_size > 1:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._fill(batch), self._max_wait)
            await self._free.acquire()
            while len(batch) < self._batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)  # the event loop does not keep a task alive
            task.add_done_callback(self._running.discard)

    async def _fill(self, batch: list[_Item]) -> None:
        while len(batch) < self._batch_size:
            batch.append(await self._queue.get())

    async def _run(self, batch: list[_Item]) -> None:
        try:
            waiting = [item for item in batch if not item.answer.done()]
            if waiting:  # otherwise all requests of the batch were given up
                await self._answer(waiting)
        finally:
            self._free.release()

    async def _answer(self, batch: list[_Item]) -> None:
        start = time.perf_counter()
        self._metrics.batch_images.observe(len(batch))
        try:
            results = await self._detect([item.square for item in batch], [item.box for item in batch])
        except Exception as error:
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        seconds = time.perf_counter() - start
        self._metrics.engine_seconds.observe(seconds)
        for item, detections in zip(batch, results, strict=True):
            if not item.answer.done():
                item.answer.set_result(Answer(detections, seconds))
