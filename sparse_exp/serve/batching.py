"""Images of many requests, gathered into batches for one engine.

A batch leaves when it is full, or when its first image has waited long enough; while the engine is busy
it waits anyway, and fills up meanwhile. One batch more than the engine works on is handed over in advance,
so that the engine need not wait for us.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparse_exp.data.letterbox import Letterbox
from sparse_exp.serve.metrics import Metrics

Square = NDArray[np.uint8]
Detections = NDArray[np.float32]
Detect = Callable[[Sequence[Square], Sequence[Letterbox]], Awaitable[list[Detections]]]


@dataclass(frozen=True)
class Answer:
    """What became of an image.

    Attributes:
        detections: float32 (D, 6): x1, y1, x2, y2 in pixels of the original, confidence, class id.
        waited: seconds from the queue to the engine.
        engine: seconds that its batch was in the engine, with what waited there before it.
    """

    detections: Detections
    waited: float
    engine: float


@dataclass
class _Item:
    square: Square
    box: Letterbox
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs a detector on images that arrive one by one.

    Args:
        detect: the detector; of at most ``batch_size`` images; called ``streams + 1`` times at once at most.
        metrics: what it counts in.
        batch_size: images of a batch, at least 1.
        max_wait: seconds that an image waits at most for others to fill its batch.
        streams: batches that the detector works on at once, at least 1.
    """

    def __init__(
        self, detect: Detect, metrics: Metrics, *, batch_size: int, max_wait: float, streams: int
    ) -> None:
        self._detect, self._metrics = detect, metrics
        self._batch_size, self._max_wait = batch_size, max_wait
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._free = asyncio.Semaphore(streams + 1)
        self._running: set[asyncio.Task[None]] = set()
        # As many images again as are with the engine: decoded ahead, and no more of them in memory.
        self.room = asyncio.Semaphore(2 * batch_size * (streams + 1))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """While this is open images are worked on."""
        gathering = asyncio.create_task(self._gather())
        try:
            yield
        finally:
            gathering.cancel()
            with suppress(asyncio.CancelledError):
                await gathering

    async def detect(self, square: Square, box: Letterbox) -> Answer:
        """Detections of one image; to be called by who has entered `room`.

        Args:
            square: uint8 (S, S, 3), RGB.
            box: how it lies in its original.

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
            self._running.add(task)  # the loop itself would forget it
            task.add_done_callback(self._running.discard)

    async def _fill(self, batch: list[_Item]) -> None:
        while len(batch) < self._batch_size:
            batch.append(await self._queue.get())

    async def _run(self, batch: list[_Item]) -> None:
        try:
            await self._answer([item for item in batch if not item.answer.done()])
        finally:
            self._free.release()

    async def _answer(self, batch: list[_Item]) -> None:
        if not batch:  # all of them were given up
            return
        start = time.perf_counter()
        self._metrics.batch_images.observe(len(batch))
        try:
            found = await self._detect([item.square for item in batch], [item.box for item in batch])
        except Exception as error:
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        took = time.perf_counter() - start
        self._metrics.engine_seconds.observe(took)
        for item, detections in zip(batch, found, strict=True):
            if not item.answer.done():
                item.answer.set_result(Answer(detections, start - item.since, took))
